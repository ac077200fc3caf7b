"""Splits and benchmarks: the types, how readers build them, and their fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reid.config.benchmark_names import PARTS, Part
from reid.errors import DataError
from reid.process.files import printable

Row = tuple[Path, int, int]  # path, pid and camid of an image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})
INT64_MAX = int(np.iinfo(np.int64).max)

JUNK_PID = -1  # a bad detection: counts neither as a match nor as a mistake
DISTRACTOR_PID = 0  # in the layout of Market-1501, a person that no query shows: always a mistake

CORRECT_ROOT = "unpack the data set again or correct DATASETS.ROOT_DIR"
_NUM_SHOWN = 8  # names in a message
# Unlike the methods of Path, these return False if a folder above may not be entered.
is_folder, is_file = os.path.isdir, os.path.isfile
_SPLITS_OF: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("query", "gallery")}


@dataclass(frozen=True, eq=False)
class Split:
    """A set of images; index i of each field is about the same image.

    Attributes:
        paths: Paths of N files, sorted.
        pids: [N] int64, identities.
        camids: [N] int64, cameras, counted from 0.
    """

    paths: tuple[Path, ...]
    pids: np.ndarray
    camids: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A data set with its evaluation protocol. Splits that were not requested are empty.

    Attributes:
        name: Key of `BENCHMARKS`, or the name of a table without its suffix.
        root: Folder that holds all of it, or the table.
        train: Training images; pids are labels 0..C-1, in the order of the sorted pids on disk.
        query: Query images, with pids as on disk.
        gallery: Gallery images, with pids as on disk.
        single_gallery_shot: Whether the published protocol draws one gallery image of each identity, many times.
    """

    name: str
    root: Path
    train: Split
    query: Split
    gallery: Split
    single_gallery_shot: bool = False

    @property
    def num_train_pids(self) -> int:
        """C, the number of classes to train."""
        return len(np.unique(self.train.pids))

    @property
    def splits(self) -> dict[str, Split]:
        """Splits by name: train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def statistics(self) -> str:
        """Return a table of identities, images and cameras for each split that was read."""
        rows = [f"{self.name:<12}{'ids':>8}{'images':>10}{'cameras':>10}"]
        for name, split in self.splits.items():
            if len(split):
                num_pids, num_cameras = len(np.unique(split.pids)), len(np.unique(split.camids))
                rows.append(f"{name:<12}{num_pids:>8,}{len(split):>10,}{num_cameras:>10,}")
        return "\n".join(rows)


def splits_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """Return the names of the splits that the parts consist of."""
    requested = set(parts)
    return tuple(split for part in PARTS if part in requested for split in _SPLITS_OF[part])


def fingerprint(data: Split | Benchmark) -> str:
    """Return a SHA-256 (hex) over relative names, pids and camids.

    It depends neither on the folder's location, nor on modification times, nor on the content of the images.
    """
    if isinstance(data, Split):
        return _fingerprint(data, "")
    folder = data.root.parent if is_file(data.root) else data.root
    digest = hashlib.sha256()
    for name, split in data.splits.items():
        digest.update(f"{name} {_fingerprint(split, f'{folder}{os.sep}')}\n".encode())
    return digest.hexdigest()


def _fingerprint(split: Split, above: str) -> str:
    """Return the fingerprint of one split, with names relative to `above`; outside of it, FOLDER/FILE."""
    digest = hashlib.sha256()
    for path in split.paths:
        is_below = above and str(path).startswith(above)
        name = str(path)[len(above) :] if is_below else f"{path.parent.name}/{path.name}"
        digest.update(os.fsencode(name) + b"\0")
    for values in (split.pids, split.camids):
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()


# ---- from rows to a benchmark ----


def make_split(rows: Iterable[Row]) -> Split:
    """Return the rows as a split, sorted by path: the order of a list or folder listing has no meaning."""
    ordered = sorted(rows, key=lambda row: str(row[0]))
    ids = np.array([row[1:] for row in ordered], dtype=np.int64).reshape(-1, 2)
    return Split(tuple(row[0] for row in ordered), ids[:, 0].copy(), ids[:, 1].copy())


def build_benchmark(
    name: str,
    root: Path,
    rows: Mapping[str, Iterable[Row]],
    sources: Mapping[str, object],
    *,
    fix: str = CORRECT_ROOT,
    key: str = "DATASETS.ROOT_DIR",
    single_gallery_shot: bool = False,
) -> Benchmark:
    """Drop junk (pid -1) from all splits, number the training identities, and verify that the splits can be used.

    Args:
        name: Name of the benchmark.
        root: Root of the benchmark.
        rows: Images of each split that was read, with pids as on disk.
        sources: Files or folders from which each split was read, for messages.
        fix: Remedy for a split that cannot be used.
        key: Setting that the errors are about.
        single_gallery_shot: Whether the protocol draws one gallery image of each identity.

    Raises:
        DataError: A split has no image of a person, there are fewer than two identities to train, or no query has a
            match in the gallery.
    """
    splits = {split: make_split(row for row in images if row[1] != JUNK_PID) for split, images in rows.items()}
    for split, images in splits.items():
        if len(images) == 0:
            raise data_error(
                f"{sources[split]} must hold images of people, got none (junk, pid -1, does not count, nor do "
                "distractors in training)",
                fix,
                key,
            )
    if "train" in splits:
        train = splits["train"]
        pids, labels = np.unique(train.pids, return_inverse=True)
        if len(pids) < 2:
            raise data_error(f"{sources['train']} must hold at least 2 identities, got {len(pids)}", fix, key)
        splits["train"] = Split(train.paths, labels.astype(np.int64), train.camids)
    if "query" in splits and not _any_match(splits["query"], splits["gallery"]):
        raise data_error(
            f"a query in {sources['query']} must have a match in {sources['gallery']} (same pid, another camera), got "
            f"none for any of {len(splits['query'])} queries",
            fix,
            key,
        )
    train, query, gallery = (splits.get(split) or make_split(()) for split in ("train", "query", "gallery"))
    return Benchmark(name, root, train, query, gallery, single_gallery_shot)


def _any_match(query: Split, gallery: Split) -> bool:
    """Return whether another camera saw the identity of any query in the gallery."""
    of_pid = Counter(gallery.pids.tolist())
    of_pid_and_camera = Counter(zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True))
    pairs = zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    return any(of_pid[pair[0]] > of_pid_and_camera[pair] for pair in pairs)


# ---- messages ----


def data_error(problem: str, fix: str = CORRECT_ROOT, key: str = "DATASETS.ROOT_DIR") -> DataError:
    """Return an error about data on disk, in the form `PROBLEM. Fix: FIX.`"""
    return DataError(f"{problem}. Fix: {fix}.", key=key)


def shown(names: Sequence[str]) -> str:
    """Return the first names, for a message."""
    text = printable(", ".join(names[:_NUM_SHOWN]))
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{text}{more}" if names else "nothing"
