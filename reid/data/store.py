"""Images decoded and resized once, kept as uint8, memory-mapped, shared by all ranks of a node.

A store is one `.npy` file per split, uint8 [N, H, W, 3] in RGB, which `numpy.load(file, mmap_mode="r")` opens anywhere.
Its name holds a fingerprint of the image files, so a changed data set asks for another store and gets it built.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from reid.errors import DataError, WorldError
from reid.process.files import reserved_file, write_at

FORMAT_VERSION = 1  # raise it when the same image files would give other pixels

_CHUNK = 64  # images per task of a thread; one image takes about 0.6 ms
_NUM_SHOWN = 20  # bad files in a message
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

logger = logging.getLogger("reid.data")


def store_file(cache_dir: Path, name: str, paths: Sequence[Path], size: tuple[int, int]) -> Path:
    """Where the store of these images belongs; another file as soon as one image is added, replaced or touched.

    Args:
        cache_dir: need not exist.
        name: which split it is, for people (`market1501-train`).
        paths: N image files, in the order of the store.
        size: (H, W) of the stored images in pixels.

    Returns:
        `cache_dir/NAME-HxW-FINGERPRINT.npy`. The fingerprint covers the names, lengths and times of modification
        of the files, but not the folder above all of them: a data set that was moved keeps its store.
    """
    height, width = size
    below = _names_below(paths)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {height}x{width}\n".encode())
    for path in paths:
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "unreadable"  # build_store reports it, together with all others
        digest.update(os.fsencode(f"{below[path.parent]}{path.name}") + f"\0{state}\n".encode())
    return cache_dir / f"{name}-{height}x{width}-{digest.hexdigest()[:16]}.npy"


def build_store(
    file: Path,
    paths: Sequence[Path],
    size: tuple[int, int],
    *,
    num_threads: int | None = None,
    progress: bool = False,
) -> None:
    """Decode and resize all images into `file`, unless a whole store is there already.

    The file appears by an atomic rename, so it is either absent or whole, and any number of processes may build it
    at once (each in a temporary file of its own; the last rename wins). What a killed build left behind in the folder
    is removed first.

    Args:
        file: as `store_file` names it.
        paths: N >= 1 image files.
        size: (H, W) in pixels.
        num_threads: None for one on each CPU that this process may use.
        progress: show a bar, where stderr is a terminal.

    Raises:
        DataError: images that cannot be read, all of them in one message; or no images.
        WorldError: the file cannot be written, or there is no room for it.
    """
    if not paths:
        raise DataError(
            f"{file} must hold at least one image, got none; correct DATASETS.ROOT_DIR", key="DATASETS.ROOT_DIR"
        )
    if _fault(file, len(paths), size) is None:
        return
    num_threads = num_threads or len(os.sched_getaffinity(0))
    header = _header(len(paths), size)
    num_bytes = len(header) + _num_pixel_bytes(len(paths), size)
    logger.info("%s: decoding %d images with %d threads, %.1f MB", file, len(paths), num_threads, num_bytes / 1e6)
    start = time.monotonic()
    with (
        _disk_errors(file, num_bytes),
        reserved_file(file, num_bytes) as descriptor,
        tqdm(total=len(paths), desc=file.stem, unit="img", disable=not (progress and sys.stderr.isatty())) as bar,
    ):
        write_at(descriptor, header, 0)
        bad = _write_images(descriptor, len(header), paths, size, num_threads, bar.update)
        if bad:
            raise DataError(_describe(bad, len(paths), file.with_suffix(".unreadable.txt")), key="DATASETS.ROOT_DIR")
    logger.info("%s: %d images in %.1f s, %.1f MB", file, len(paths), time.monotonic() - start, num_bytes / 1e6)


def open_store(file: Path, num_images: int, size: tuple[int, int]) -> np.ndarray:
    """The images of a built store, memory-mapped and read-only.

    Args:
        file: as `store_file` names it.
        num_images: N.
        size: (H, W) in pixels.

    Returns:
        uint8 [N, H, W, 3], RGB.

    Raises:
        WorldError: the file is missing, cut off or another array.
    """
    fault = _fault(file, num_images, size)
    if fault is not None:
        raise WorldError(
            f"{file} must be a whole store, but {fault}; start again to rebuild it in DATASETS.CACHE_DIR",
            key="DATASETS.CACHE_DIR",
        )
    images: np.ndarray = np.load(file, mmap_mode="r")
    return images


def decode(path: Path, size: tuple[int, int]) -> bytes:
    """The image as H*W*3 bytes of RGB, resized by antialiased bilinear interpolation.

    The EXIF orientation is not applied and transparency is ignored, as in reid-strong-baseline.
    """
    # Read at once: PIL reads a JPEG's header in many small pieces, and that costs 10 % of all the time here.
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return pixels_of(image, size)


def pixels_of(image: Image.Image, size: tuple[int, int]) -> bytes:
    """Return the image as H*W*3 bytes of RGB, resized as in `decode`."""
    height, width = size
    # PIL warns when a palette with transparency becomes RGB at once; by way of RGBA the colors are the same.
    opaque = image.convert("RGBA") if image.mode == "P" else image
    rgb = opaque if opaque.mode == "RGB" else opaque.convert("RGB")
    return rgb.resize((width, height), Image.Resampling.BILINEAR).tobytes()


def fault_of_image(path: Path) -> str | None:
    """Why an image cannot be read, as building a store would say; None where it can be."""
    try:
        decode(path, (1, 1))
    except Exception as error:  # a broken file makes PIL's decoders raise nearly anything
        return reason_of(error)
    return None


def _names_below(paths: Sequence[Path]) -> dict[Path, str]:
    """For each folder of an image, what leads there from the folder above them all: "" or "NAME/.../"."""
    folders = {path.parent: path.parent.absolute() for path in paths}
    above = os.path.commonpath(folders.values()) if folders else ""
    relative = {folder: os.path.relpath(absolute, above) for folder, absolute in folders.items()}
    return {folder: "" if name == os.curdir else f"{name}/" for folder, name in relative.items()}


def _write_images(
    descriptor: int,
    offset: int,
    paths: Sequence[Path],
    size: tuple[int, int],
    num_threads: int,
    on_progress: Callable[[int], object],
) -> list[str]:
    """Write image i at `offset` + i * H*W*3; returns the files that cannot be read, each with the reason."""
    stride = _num_pixel_bytes(1, size)

    def write_chunk(start: int) -> list[str]:
        bad = []
        for i, path in enumerate(paths[start : start + _CHUNK], start):
            try:
                pixels = decode(path, size)
            except Exception as error:  # a broken file makes PIL's decoders raise nearly anything
                bad.append(f"{path} ({reason_of(error)})")
            else:
                write_at(descriptor, pixels, offset + i * stride)
        return bad

    # PIL loads the plug-ins of rare formats at the first file that needs one, which two threads must not do at once.
    Image.init()
    starts, bad = range(0, len(paths), _CHUNK), []
    with ThreadPoolExecutor(num_threads, thread_name_prefix="store") as pool:
        for start, bad_of_chunk in zip(starts, pool.map(write_chunk, starts), strict=True):
            bad += bad_of_chunk
            on_progress(min(_CHUNK, len(paths) - start))
    return bad


@contextmanager
def _disk_errors(file: Path, num_bytes: int) -> Iterator[None]:
    """Say what an error of the file system means for the user."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise WorldError(
                f"DATASETS.CACHE_DIR must be a folder that can be written, but {file.parent} is not "
                f"({error.strerror}); point DATASETS.CACHE_DIR at another folder",
                key="DATASETS.CACHE_DIR",
            ) from error
        existing = next(folder for folder in file.absolute().parents if folder.exists())
        free = shutil.disk_usage(existing).free
        raise WorldError(
            f"the store {file} needs {num_bytes:,} bytes, but {free:,} bytes are free ({error.strerror}); "
            "make room or point DATASETS.CACHE_DIR at another disk",
            key="DATASETS.CACHE_DIR",
        ) from error


def _fault(file: Path, num_images: int, size: tuple[int, int]) -> str | None:
    """Why `file` is not the whole store of these images; None when it is."""
    header = _header(num_images, size)
    num_bytes = len(header) + _num_pixel_bytes(num_images, size)
    try:
        with file.open("rb") as stream:
            if stream.read(len(header)) != header:
                return f"it is no array of {num_images} images of {size[0]}x{size[1]}"
            length = os.fstat(stream.fileno()).st_size
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if length == num_bytes else f"it has {length:,} of {num_bytes:,} bytes"


def _header(num_images: int, size: tuple[int, int]) -> bytes:
    """What `numpy.save` writes before uint8 [N, H, W, 3]."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(np.uint8))
    header = {"descr": descr, "fortran_order": False, "shape": (num_images, *size, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def _num_pixel_bytes(num_images: int, size: tuple[int, int]) -> int:
    return num_images * size[0] * size[1] * 3


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "empty or not an image"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _describe(bad: Sequence[str], num_images: int, whole_list: Path) -> str:
    """The sentence; what is too much for it goes into a file."""
    shown = ", ".join(bad[:_NUM_SHOWN])
    more = ""
    if len(bad) > _NUM_SHOWN:
        whole_list.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
        more = f" and {len(bad) - _NUM_SHOWN} more, all listed in {whole_list}"
    return (
        f"every image must be readable, but {len(bad)} of {num_images} are not: {shown}{more}; "
        "copy them again from the data set's archive, or remove them"
    )
