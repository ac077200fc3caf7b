"""Images decoded and resized once, stored as uint8, memory-mapped, shared by all ranks of a node.

A store is one `.npy` file per split, uint8 [N, H, W, 3] in RGB, which `numpy.load(file, mmap_mode="r")` opens anywhere.
Its name holds a fingerprint of the image files, so a changed data set gets a new store.
"""

from __future__ import annotations

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

logger = logging.getLogger(__name__)


def store_file(cache_dir: Path, name: str, paths: Sequence[Path], size: tuple[int, int]) -> Path:
    """Return the path of the store of these images; another path if an image was added, replaced or touched.

    Args:
        cache_dir: Folder of all stores, which need not exist.
        name: Readable name of the split (`market1501-train`).
        paths: Paths of N images, in the order of the store.
        size: Height and width of the stored images in pixels.

    Returns:
        `cache_dir/NAME-HxW-FINGERPRINT.npy`. The fingerprint covers the names, sizes and modification times of the
        files, but not their common parent folder: a data set that was moved keeps its store.
    """
    height, width = size
    below = _names_below(paths)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {height}x{width}\n".encode())
    for path in paths:
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "unreadable"  # build_store reports it, with all others
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
    """Decode and resize all images into `file`, unless it is already complete.

    The file is renamed atomically, so it is either absent or complete, and any number of processes may build it at once
    (each in another temporary file; the last rename wins). Temporary files of killed builds are removed first.

    Args:
        file: Path that `store_file` returned.
        paths: Paths of N >= 1 images.
        size: Height and width in pixels.
        num_threads: Number of threads; None for one on each CPU that this process may use.
        progress: Whether to show a progress bar if stderr is a terminal.

    Raises:
        DataError: Images cannot be read (all are in one message), or there are none.
        WorldError: The file cannot be written, or does not fit on the disk.
    """
    if not paths:
        raise DataError(
            f"{file} must hold at least one image, got none. Fix: correct DATASETS.ROOT_DIR.", key="DATASETS.ROOT_DIR"
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
    """Return the images of a built store, memory-mapped and read-only.

    Args:
        file: Path that `store_file` returned.
        num_images: Number N of images.
        size: Height and width in pixels.

    Returns:
        uint8 [N, H, W, 3], RGB.

    Raises:
        WorldError: The file is missing, truncated or another array.
    """
    fault = _fault(file, num_images, size)
    if fault is not None:
        raise WorldError(
            f"{file} must be a complete store, but {fault}. Fix: start again to rebuild it in DATASETS.CACHE_DIR.",
            key="DATASETS.CACHE_DIR",
        )
    images: np.ndarray = np.load(file, mmap_mode="r")
    return images


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; its text is the reason."""


def decode(source: Path | Image.Image, size: tuple[int, int]) -> bytes:
    """Return the image as H*W*3 bytes of RGB, resized by antialiased bilinear interpolation.

    The EXIF orientation is not applied and transparency is ignored, as in reid-strong-baseline.

    Raises:
        UnreadableImageError: The file is missing, damaged or not an image.
    """
    try:
        # Read at once: PIL reads a JPEG's header in many small pieces, and that costs 10 % of all the time here.
        image = Image.open(io.BytesIO(source.read_bytes())) if isinstance(source, Path) else source
        # PIL warns when a palette with transparency becomes RGB at once; by way of RGBA the colors are the same.
        opaque = image.convert("RGBA") if image.mode == "P" else image
        rgb = opaque if opaque.mode == "RGB" else opaque.convert("RGB")
        return rgb.resize(size[::-1], Image.Resampling.BILINEAR).tobytes()
    except UnidentifiedImageError as error:
        raise UnreadableImageError("empty or not an image") from error
    except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UnreadableImageError(reason) from error


def fault_of_image(path: Path) -> str | None:
    """Return why an image cannot be read, as `build_store` reports it; None if it can be."""
    try:
        decode(path, (1, 1))
    except UnreadableImageError as error:
        return str(error)
    return None


def _names_below(paths: Sequence[Path]) -> dict[Path, str]:
    """Return, for each folder of an image, its path below their common parent folder: "" or "NAME/.../"."""
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
    """Write image i at `offset` + i * H*W*3; return the unreadable files, each with the reason."""
    stride = _num_pixel_bytes(1, size)

    def write_chunk(start: int) -> list[str]:
        bad = []
        for i, path in enumerate(paths[start : start + _CHUNK], start):
            try:
                pixels = decode(path, size)
            except UnreadableImageError as error:
                bad.append(f"{path} ({error})")
            else:
                write_at(descriptor, pixels, offset + i * stride)
        return bad

    # PIL loads the plug-ins of rare formats when a file first needs one, which two threads must not do at once.
    Image.init()
    starts, bad = range(0, len(paths), _CHUNK), []
    with ThreadPoolExecutor(num_threads, thread_name_prefix="store") as pool:
        for start, bad_of_chunk in zip(starts, pool.map(write_chunk, starts), strict=True):
            bad += bad_of_chunk
            on_progress(min(_CHUNK, len(paths) - start))
    return bad


@contextmanager
def _disk_errors(file: Path, num_bytes: int) -> Iterator[None]:
    """Translate an error of the file system into one for the user."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(filter(os.path.exists, file.absolute().parents))).free
        raise WorldError(
            f"DATASETS.CACHE_DIR must be a writable folder with {num_bytes:,} bytes for {file}, got {error.strerror!r} "
            f"while {free:,} bytes are free. Fix: free some space, or set DATASETS.CACHE_DIR to another folder.",
            key="DATASETS.CACHE_DIR",
        ) from error


def _fault(file: Path, num_images: int, size: tuple[int, int]) -> str | None:
    """Return why `file` is not the complete store of these images; None if it is."""
    header = _header(num_images, size)
    num_bytes = len(header) + _num_pixel_bytes(num_images, size)
    try:
        with file.open("rb") as stream:
            if stream.read(len(header)) != header:
                return f"it is not an array of {num_images} images of {size[0]}x{size[1]}"
            length = os.fstat(stream.fileno()).st_size
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if length == num_bytes else f"it has {length:,} of {num_bytes:,} bytes"


def _header(num_images: int, size: tuple[int, int]) -> bytes:
    """Return the header that `numpy.save` writes for uint8 [N, H, W, 3]."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(np.uint8))
    header = {"descr": descr, "fortran_order": False, "shape": (num_images, *size, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def _num_pixel_bytes(num_images: int, size: tuple[int, int]) -> int:
    return num_images * size[0] * size[1] * 3


def _describe(bad: Sequence[str], num_images: int, full_list: Path) -> str:
    """Return the message; a list that is too long for it is written to a file."""
    shown = ", ".join(bad[:_NUM_SHOWN])
    more = ""
    if len(bad) > _NUM_SHOWN:
        full_list.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
        more = f" and {len(bad) - _NUM_SHOWN} more, all listed in {full_list}"
    return (
        f"every image must be readable, but {len(bad)} of {num_images} are not: {shown}{more}. Fix: copy them again "
        "from the data set's archive, or remove them."
    )
