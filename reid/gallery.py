"""A gallery on disk: embeddings that numpy and faiss can map, the images that they are of, and what made them."""

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

from reid.data.folders import parse_name
from reid.errors import DataError
from reid.process.files import atomic_write, disk_errors, write_text

FORMAT_VERSION = 1
EMBEDDINGS, IMAGES, FACTS, UNREADABLE = "embeddings.npy", "images.csv", "gallery.json", "unreadable.txt"

_COLUMNS = ("path", "pid", "camid")
_REMEDY = "make the gallery with launch/embed.py"
_WRITTEN_BY, _READ_BY = "--output", "--gallery"  # options that name the folder


class GalleryImage(NamedTuple):
    """One image; who and where only if its file name states it."""

    path: str  # below the gallery's folder of images, with slashes
    pid: int | None
    camid: int | None  # counted from 0

    @classmethod
    def of(cls, path: str) -> GalleryImage:
        ids = parse_name(path.rpartition("/")[2])
        return cls(path, *(ids or (None, None)))


@dataclass(frozen=True)
class Facts:
    """What gallery.json says.

    Attributes:
        folder: that the images' paths are below, absolute.
        num_images: G.
        num_features: D.
        num_unreadable: images that were left out.
        distance: by which embeddings compare.
        normalised: whether they are of length 1, so that their inner product is the cosine.
        weight: the checkpoint, absolute.
        checksum: of its weights.
        config: all settings, as YAML.
        format_version: of these files.
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
    """A gallery as it was read."""

    facts: Facts
    embedding: NDArray[np.float32]  # [G, D], memory-mapped
    images: tuple[GalleryImage, ...]  # G


class EmbeddingFile:
    """`embeddings.npy`, float32 [G, D], while it is written; G is known at the end.

    Args:
        file: open for writing.
        num_features: D.
    """

    def __init__(self, file: io.BufferedWriter, num_features: int) -> None:
        self._file, self._num_features, self._num_rows = file, num_features, 0
        self._file.write(self._header())

    def append(self, rows: NDArray[np.float32]) -> None:
        """More rows [n, D]; written through the file and not a map, which a full disk would answer with SIGBUS.

        Raises:
            WorldError: they cannot be written.
        """
        with disk_errors(Path(self._file.name).parent, key=_WRITTEN_BY):
            self._file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self._num_rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()

    def _header(self) -> bytes:
        """Of the same length for any number of rows, as numpy leaves room for that number to grow."""
        stream = io.BytesIO()
        shape = (self._num_rows, self._num_features)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return stream.getvalue()


@contextmanager
def writing_embeddings(folder: Path, num_features: int) -> Iterator[EmbeddingFile]:
    """The embeddings of a new gallery; those of an older one in this folder stay until the end, and then go.

    Raises:
        WorldError: the folder cannot be written to.
    """
    with disk_errors(folder, key=_WRITTEN_BY):
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".embeddings.*.tmp.npy"):
            unfinished.unlink(missing_ok=True)  # of a process that was killed while it wrote
    with atomic_write(folder / EMBEDDINGS, key=_WRITTEN_BY) as temporary:
        with temporary.open("wb") as stream:
            file = EmbeddingFile(stream, num_features)
            yield file
            file.close()
        (folder / FACTS).unlink(missing_ok=True)  # of the older one: gallery.json always tells of its neighbours


def write_gallery(folder: Path, paths: Sequence[str], facts: Facts) -> None:
    """The rest of a gallery, beside its embeddings.

    Raises:
        WorldError: the folder cannot be written to.
    """
    rows = [GalleryImage.of(path) for path in paths]
    with atomic_write(folder / IMAGES, key=_WRITTEN_BY) as temporary, _open_text(temporary, "w") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    write_text(folder / FACTS, json.dumps(asdict(facts), indent=2) + "\n", key=_WRITTEN_BY)


def write_unreadable(folder: Path, lines: Sequence[str]) -> Path:
    """The list of images that are not in the gallery; none where all are."""
    file = folder / UNREADABLE
    with disk_errors(file, key=_WRITTEN_BY):
        file.unlink(missing_ok=True)
    if lines:
        with atomic_write(file, key=_WRITTEN_BY) as temporary, _open_text(temporary, "w") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    return file


def read_facts(folder: Path) -> Facts:
    """What gallery.json in `folder` says.

    Raises:
        DataError: there is none, or one of another format.
    """
    file = folder / FACTS
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{file} must be of format {FORMAT_VERSION}, got {found['format_version']}; {_REMEDY}", key=_READ_BY
            )
        return Facts(**{field.name: found[field.name] for field in fields(Facts)})
    except OSError as error:
        reason = f"{file} cannot be read ({error.strerror})"
        raise DataError(f"{folder} must hold a gallery, but {reason}; {_REMEDY}", key=_READ_BY) from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file} must be what launch/embed.py wrote, but it is damaged ({error}); {_REMEDY}", key=_READ_BY
        ) from error


def read_gallery(folder: Path) -> Gallery:
    """The gallery in `folder`.

    Raises:
        DataError: its files are missing or do not belong together.
    """
    facts = read_facts(folder)
    try:
        embedding = np.load(folder / EMBEDDINGS, mmap_mode="r")
        with _open_text(folder / IMAGES, "r") as stream:
            rows = list(csv.DictReader(stream))
        images = tuple(GalleryImage(row["path"], _number(row["pid"]), _number(row["camid"])) for row in rows)
    except (OSError, EOFError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{folder} must hold a whole gallery, but is damaged ({error}); {_REMEDY}", key=_READ_BY
        ) from error
    shape = (facts.num_images, facts.num_features)
    if embedding.shape != shape or embedding.dtype != np.float32 or len(images) != len(embedding):
        raise DataError(
            f"{folder} must hold {shape[0]} embeddings (float32) of {shape[1]} features and as many images, but holds "
            f"{embedding.dtype} {list(embedding.shape)} and {len(images)} images; {_REMEDY}",
            key=_READ_BY,
        )
    return Gallery(facts, embedding, images)


def _open_text(file: Path, mode: Literal["r", "w"]) -> Any:
    """File names that are no valid text come back as they were."""
    return file.open(mode, encoding="utf-8", errors="surrogateescape", newline="")


def _number(word: str) -> int | None:
    return int(word) if word else None
