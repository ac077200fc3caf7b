"""A gallery on disk: embeddings in a file that numpy can map, the paths of their images, and metadata."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reid.data.benchmarks.market_layout import parse_name
from reid.errors import DataError
from reid.process.files import atomic_write, disk_errors, write_text
from reid.process.side_effects import error_summary

FORMAT_VERSION = 1
EMBEDDINGS, IMAGES, METADATA, UNREADABLE = "embeddings.npy", "images.csv", "gallery.json", "unreadable.txt"

_COLUMNS = ("path", "pid", "camid")
_FIX = "Fix: make the gallery with: reid embed FOLDER."
_WRITTEN_BY, _READ_BY = "--output", "--gallery"  # options that name the folder


class GalleryImage(NamedTuple):
    """Image of a gallery; pid and camid are None unless the file name states them."""

    path: str  # relative to the folder of images, with slashes
    pid: int | None
    camid: int | None  # counted from 0

    @classmethod
    def of(cls, path: str) -> GalleryImage:
        ids = parse_name(path.rpartition("/")[2])
        return cls(path, *(ids or (None, None)))


@dataclass(frozen=True)
class Metadata:
    """Content of gallery.json.

    Attributes:
        folder: Absolute path of the folder of images.
        num_images: Number G of embeddings.
        num_features: Length D of an embedding.
        num_unreadable: Number of images left out because they cannot be read.
        distance: Distance between embeddings.
        normalised: Whether embeddings have length 1 (spelling of the file format).
        weight: Absolute path of the checkpoint.
        checksum: Checksum of the weights.
        config: All settings, as YAML.
        format_version: Version of the gallery's files.
    """

    folder: str
    num_images: int
    num_features: int
    num_unreadable: int
    distance: Literal["cosine", "euclidean"]
    normalised: bool
    weight: str
    checksum: str
    config: str
    format_version: int = FORMAT_VERSION


class Gallery(NamedTuple):
    """A gallery read from disk."""

    metadata: Metadata
    embedding: NDArray[np.float32]  # [G, D], memory-mapped copy-on-write
    images: tuple[GalleryImage, ...]  # G


class EmbeddingFile:
    """Writer of `embeddings.npy`, float32 [G, D], where G is known only at the end.

    Args:
        file: Stream open for writing.
        num_features: Length D of an embedding.
    """

    def __init__(self, file: io.BufferedWriter, num_features: int) -> None:
        self._file, self._num_features, self._num_rows = file, num_features, 0
        self._file.write(self._header())

    def append(self, rows: NDArray[np.float32]) -> None:
        """Write more rows [n, D], by the file and not by a memory map, where a full disk raises SIGBUS.

        Raises:
            WorldError: The rows cannot be written.
        """
        with disk_errors(Path(self._file.name).parent, key=_WRITTEN_BY):
            self._file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self._num_rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()

    def _header(self) -> bytes:
        """Return the header; numpy pads it, so that its length is the same for any number of rows."""
        stream = io.BytesIO()
        shape = (self._num_rows, self._num_features)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return stream.getvalue()


@contextmanager
def writing_embeddings(folder: Path, num_features: int) -> Iterator[EmbeddingFile]:
    """Write the embeddings of a new gallery, which replace those of an older one in the folder at the end.

    Raises:
        WorldError: The folder cannot be written to.
    """
    with disk_errors(folder, key=_WRITTEN_BY):
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".embeddings.*.tmp.npy"):
            unfinished.unlink(missing_ok=True)  # left by a process that was killed while writing
    with atomic_write(folder / EMBEDDINGS, key=_WRITTEN_BY) as temporary:
        with temporary.open("wb") as stream:
            file = EmbeddingFile(stream, num_features)
            yield file
            file.close()
        (folder / METADATA).unlink(missing_ok=True)  # it would describe the replaced embeddings


def write_gallery(folder: Path, paths: Sequence[str], metadata: Metadata) -> None:
    """Write the paths and the metadata of a gallery next to its embeddings.

    Raises:
        WorldError: The folder cannot be written to.
    """
    rows = [GalleryImage.of(path) for path in paths]
    with atomic_write(folder / IMAGES, key=_WRITTEN_BY) as temporary, _open_text(temporary, "w") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    write_text(folder / METADATA, json.dumps(asdict(metadata), indent=2) + "\n", key=_WRITTEN_BY)


def write_unreadable(folder: Path, lines: Sequence[str]) -> Path:
    """Write the list of images left out of the gallery, or remove it if there are none; return its path."""
    file = folder / UNREADABLE
    with disk_errors(file, key=_WRITTEN_BY):
        file.unlink(missing_ok=True)
    if lines:
        with atomic_write(file, key=_WRITTEN_BY) as temporary, _open_text(temporary, "w") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    return file


def read_metadata(folder: Path) -> Metadata:
    """Return the content of gallery.json in `folder`.

    Raises:
        DataError: The file is missing, damaged or of another format.
    """
    with _translated_errors(folder):
        content: dict[str, Any] = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{folder / METADATA} must be of format {FORMAT_VERSION}, got {content['format_version']}. {_FIX}",
                key=_READ_BY,
            )
        return Metadata(**{field.name: content[field.name] for field in fields(Metadata)})


def read_gallery(folder: Path) -> Gallery:
    """Return the gallery in `folder`.

    Raises:
        DataError: Its files are missing, damaged or do not belong together.
    """
    metadata = read_metadata(folder)
    with _translated_errors(folder):
        embedding = np.load(folder / EMBEDDINGS, mmap_mode="c")
        with _open_text(folder / IMAGES, "r") as stream:
            rows = list(csv.DictReader(stream))
        ids = [[int(row[name]) if row[name] else None for name in ("pid", "camid")] for row in rows]
        images = tuple(GalleryImage(row["path"], *pair) for row, pair in zip(rows, ids, strict=True))
    shape = (metadata.num_images, metadata.num_features)
    if embedding.shape != shape or embedding.dtype != np.float32 or len(images) != len(embedding):
        raise DataError(
            f"{folder} must hold {shape[0]} embeddings (float32) of {shape[1]} features and as many images, got "
            f"{embedding.dtype} {list(embedding.shape)} and {len(images)} images. {_FIX}",
            key=_READ_BY,
        )
    return Gallery(metadata, embedding, images)


@contextmanager
def _translated_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"--gallery must be a folder that reid embed wrote, got {folder}: {error_summary(error)}. {_FIX}",
            key=_READ_BY,
        ) from error


def _open_text(file: Path, mode: Literal["r", "w"]) -> Any:
    """Open a file so that names that are not valid text are read as they were written."""
    return file.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
