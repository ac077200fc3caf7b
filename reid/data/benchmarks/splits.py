"""What every benchmark is: train, query and gallery; and what its readers share."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reid.config.benchmark_names import Part
from reid.errors import DataError
from reid.process.files import printable

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})

JUNK_PID = -1  # a bad detection: counts neither as a match nor as a mistake
DISTRACTOR_PID = 0  # in the layout of Market-1501, somebody who is no query: always a mistake

CORRECT_ROOT = "unpack the data set again or correct DATASETS.ROOT_DIR"
_NUM_SHOWN = 8  # names in a message
INT64_MAX = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, eq=False)
class Split:
    """One set of images; position i of each field is about the same image.

    Attributes:
        paths: N files, sorted by name.
        pids: [N] int64, identity of the person.
        camids: [N] int64, camera, counted from 0.
    """

    paths: tuple[Path, ...]
    pids: np.ndarray
    camids: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A data set with its evaluation protocol.

    Attributes:
        name: its key in `BENCHMARKS`, or the name of its table without the suffix.
        root: the folder that holds all of it; of a table, the table.
        train: pids are labels 0..C-1, in the order of the sorted pids on disk; empty where it was not asked for.
        query: pids as on disk; empty where it was not asked for, as the gallery then is.
        gallery: pids as on disk.
        single_gallery_shot: the published protocol draws one gallery image of each identity, many times.
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
        """By name: train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def statistics(self) -> str:
        """A table of identities, images and cameras for each split that was read."""
        rows = [f"{self.name:<12}{'ids':>8}{'images':>10}{'cameras':>10}"]
        for name, split in self.splits.items():
            if len(split):
                num_pids, num_cameras = len(np.unique(split.pids)), len(np.unique(split.camids))
                rows.append(f"{name:<12}{num_pids:>8,}{len(split):>10,}{num_cameras:>10,}")
        return "\n".join(rows)


class Layout(NamedTuple):
    """A folder and what must be in it: files have a suffix, folders have none."""

    root: Path
    needs: tuple[str, ...]

    def missing(self) -> list[str]:
        return [name for name in self.needs if not (is_file if Path(name).suffix else is_folder)(self.root / name)]


def splits_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """The names of the splits that the parts consist of."""
    asked = set(parts)
    return (("train",) if "train" in asked else ()) + (("query", "gallery") if "test" in asked else ())


def fingerprint(data: Split | Benchmark) -> str:
    """SHA-256 (hex) over relative names, pids and camids: equal data anywhere on any machine, equal fingerprint.

    It does not depend on where the folder lies, on times of modification or on what is in the images.
    """
    if isinstance(data, Split):
        return _fingerprint(data, "")
    folder = data.root.parent if is_file(data.root) else data.root
    digest = hashlib.sha256()
    for name, split in data.splits.items():
        digest.update(f"{name} {_fingerprint(split, f'{folder}{os.sep}')}\n".encode())
    return digest.hexdigest()


def _fingerprint(split: Split, above: str) -> str:
    """Names are relative to `above` where the image lies below it, else to the folder above the image's own."""
    digest = hashlib.sha256()
    for path in split.paths:
        is_below = above and str(path).startswith(above)
        name = str(path)[len(above) :] if is_below else f"{path.parent.name}/{path.name}"
        digest.update(os.fsencode(name) + b"\0")
    for values in (split.pids, split.camids):
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()


# ---- from raw splits to a benchmark ----


def make_split(rows: Iterable[tuple[Path, int, int]]) -> Split:
    """Rows of path, pid and camid, sorted by path: the order of a list or of a listing means nothing."""
    ordered = sorted(rows, key=lambda row: str(row[0]))
    ids = np.array([row[1:] for row in ordered], dtype=np.int64).reshape(-1, 2)
    return Split(tuple(row[0] for row in ordered), ids[:, 0].copy(), ids[:, 1].copy())


def without(split: Split, pid: int) -> Split:
    keep = np.flatnonzero(split.pids != pid)
    return Split(tuple(split.paths[i] for i in keep), split.pids[keep], split.camids[keep])


def build_benchmark(
    name: str,
    root: Path,
    raw: Mapping[str, Split],
    places: Mapping[str, object],
    *,
    remedy: str = CORRECT_ROOT,
    key: str = "DATASETS.ROOT_DIR",
    single_gallery_shot: bool = False,
) -> Benchmark:
    """Drops junk (pid -1) everywhere, numbers the identities to train, and checks what will be used.

    Args:
        name: of the benchmark.
        root: of the benchmark.
        raw: the splits that were read, with the pids on disk; those not read are missing.
        places: where each of them was read, for messages.
        remedy: what to do about a split that cannot be used.
        key: Setting that the errors are about.
        single_gallery_shot: of the benchmark.

    Raises:
        DataError: a split has no image of a person, there are fewer than two identities to train, or no query has a
            match in the gallery.
    """
    splits = {split: without(images, JUNK_PID) for split, images in raw.items()}
    for split, images in splits.items():
        if len(images) == 0:
            raise DataError(
                f"{places[split]} must hold images of people, but has none: junk (pid -1) does not count, "
                f"nor do distractors in training; {remedy}",
                key=key,
            )
    if "train" in splits:
        train = splits["train"]
        pids, labels = np.unique(train.pids, return_inverse=True)
        if len(pids) < 2:
            raise DataError(f"{places['train']} must hold at least 2 identities, got {len(pids)}; {remedy}", key=key)
        splits["train"] = Split(train.paths, labels.astype(np.int64), train.camids)
    if "query" in splits and not _any_match(splits["query"], splits["gallery"]):
        raise DataError(
            f"a query in {places['query']} must have a match in {places['gallery']} (same pid, another camera), "
            f"but none of the {len(splits['query'])} queries has one; {remedy}",
            key=key,
        )
    nothing = make_split(())
    train, query, gallery = (splits.get(split, nothing) for split in ("train", "query", "gallery"))
    return Benchmark(name, root, train, query, gallery, single_gallery_shot)


def _any_match(query: Split, gallery: Split) -> bool:
    """Whether any query's identity was seen in the gallery by another camera."""
    seen_by: dict[int, set[int]] = {}
    for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True):
        seen_by.setdefault(pid, set()).add(camid)
    return any(
        seen_by.get(pid, set()) - {camid} for pid, camid in zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    )


# ---- files ----


def find_layout(root_dir: Path, layouts: Sequence[Layout]) -> Layout:
    """The first layout of which all is there.

    Raises:
        DataError: none is; the message is about the one that lacks the least.
    """
    if not is_folder(root_dir):
        raise DataError(
            f"DATASETS.ROOT_DIR must be a folder that can be read, got {root_dir}; point it at your data sets",
            key="DATASETS.ROOT_DIR",
        )
    for layout in layouts:
        if not layout.missing():
            return layout
    present = [layout for layout in layouts if is_folder(layout.root)]
    nearest = min(present, key=lambda layout: len(layout.missing())) if present else Layout(root_dir, layouts[0].needs)
    raise DataError(
        f"{nearest.root} must hold {', '.join(nearest.needs)}, but lacks {', '.join(nearest.missing())} "
        f"(it holds {shown(list_names(nearest.root))}); unpack the data set to {layouts[0].root} "
        f"or point DATASETS.ROOT_DIR at the folder that holds {layouts[0].root.name}",
        key="DATASETS.ROOT_DIR",
    )


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:  # a folder above it may not be entered
        return False


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:
        return False


def list_names(folder: Path, *, images_only: bool = False) -> list[str]:
    """Sorted names in `folder`, without hidden ones (macOS writes a `._x.jpg` for each `x.jpg`).

    A broken link with an image's name is listed, so that it is reported as unreadable and not passed over.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            if images_only:
                visible = [e for e in visible if Path(e.name).suffix.lower() in IMAGE_SUFFIXES and not e.is_dir()]
            return sorted(entry.name for entry in visible)
    except OSError as error:
        raise DataError(
            f"{folder} must be readable, but is not ({error.strerror}); change its permissions or DATASETS.ROOT_DIR",
            key="DATASETS.ROOT_DIR",
        ) from error


def require_present(
    source: object, paths: Sequence[Path], remedy: str = CORRECT_ROOT, *, key: str = "DATASETS.ROOT_DIR"
) -> None:
    """Refuses a list of images when some of them are not on disk; each folder is listed once.

    Raises:
        DataError: naming the first ones.
    """
    names: dict[Path, set[str]] = {}
    for folder in {path.parent for path in paths}:
        try:
            with os.scandir(folder) as entries:
                names[folder] = {entry.name for entry in entries}
        except (OSError, ValueError):  # ValueError: a NUL in the name
            names[folder] = set()
    missing = [str(path) for path in paths if path.name not in names[path.parent]]
    if missing:
        raise DataError(
            f"the images that {source} lists must be there, but {len(missing)} of {len(paths)} are not "
            f"({shown(missing)}); {remedy}",
            key=key,
        )


def require_distinct(source: object, paths: Sequence[Path], remedy: str, *, key: str) -> None:
    """Refuses a split that names an image twice.

    Raises:
        DataError: naming the first ones.
    """
    twice = [str(path) for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise DataError(
            f"{source} must name an image of a split once, but names {len(twice)} again ({shown(twice)}); {remedy}",
            key=key,
        )


def shown(names: Sequence[str]) -> str:
    """The first names, for a message."""
    text = printable(", ".join(names[:_NUM_SHOWN]))
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{text}{more}" if names else "nothing"
