"""Data sets on disk: a folder in, the train, query and gallery splits out."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reid.errors import DataError, SettingsError

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
FOLDERS = (TRAIN, QUERY, GALLERY)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})

JUNK_PID = -1  # a bad detection: counts neither as a match nor as a mistake
DISTRACTOR_PID = 0  # somebody who is no query: always a mistake

_NAME = re.compile(r"(-1|\d+)_c(\d+)", re.ASCII)
_INT64_MAX = int(np.iinfo(np.int64).max)
_NUM_SHOWN = 8  # names in a message

logger = logging.getLogger("reid.data")


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
        name: its key in `BENCHMARKS`.
        root: the folder that holds the three split folders.
        train: pids are labels 0..C-1, in the order of the sorted pids in the file names.
        query: pids as in the file names.
        gallery: pids as in the file names; pid 0 is a distractor.
    """

    name: str
    root: Path
    train: Split
    query: Split
    gallery: Split

    @property
    def num_train_pids(self) -> int:
        """C, the number of classes to train."""
        return len(np.unique(self.train.pids))

    def statistics(self) -> str:
        """A table of identities, images and cameras for each split."""
        rows = [f"{self.name:<12}{'ids':>8}{'images':>10}{'cameras':>10}"]
        for name, split in _splits(self):
            num_pids, num_cameras = len(np.unique(split.pids)), len(np.unique(split.camids))
            rows.append(f"{name:<12}{num_pids:>8,}{len(split):>10,}{num_cameras:>10,}")
        return "\n".join(rows)


def market1501(root_dir: Path) -> Benchmark:
    """Market-1501: 12,936 training images of 751 people, 3,368 queries, 15,913 gallery images, six cameras.

    Only the file name of an image says who and where, `PID_cCAMERA...`; the folders above it say nothing.
    Junk (pid -1) is dropped everywhere, as every published number assumes. Distractors (pid 0) stay in the gallery,
    where they can only be mistakes. In the training folder, where the official archive has none, they are dropped
    with a warning: they are many people, and as one class they would teach that strangers look alike.

    Args:
        root_dir: holds `market1501/` or `Market-1501-v15.09.15/` (the official archive's name), or is that folder
            itself.

    Raises:
        DataError: a folder is missing or holds no usable image, a file name has another form, there are fewer than
            two identities to train, or no query has a match in the gallery.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.
    """
    candidates = (root_dir / "market1501", root_dir / "Market-1501-v15.09.15", root_dir)
    return _read_benchmark("market1501", _find_root(root_dir, candidates))


def synthetic(root_dir: Path) -> Benchmark:
    """Generated people, in the layout of Market-1501 in `root_dir/synthetic`; raises what `market1501` raises."""
    return _read_benchmark("synthetic", _find_root(root_dir, (root_dir / "synthetic",)))


BENCHMARKS: dict[str, Callable[[Path], Benchmark]] = {"market1501": market1501, "synthetic": synthetic}


def load_benchmark(name: str, root_dir: Path) -> Benchmark:
    """The benchmark called `name` from below `root_dir`.

    Raises:
        SettingsError: no benchmark has this name.
        DataError: as its reader says.
    """
    if name not in BENCHMARKS:
        choices = ", ".join(sorted(BENCHMARKS))
        raise SettingsError(f"DATASETS.NAMES must be one of {choices}, got {name!r}; choose one of these")
    return BENCHMARKS[name](root_dir)


def fingerprint(data: Split | Benchmark) -> str:
    """SHA-256 (hex) over relative names, pids and camids: equal data anywhere on any machine, equal fingerprint.

    It does not depend on where the folder lies, on times of modification or on what is in the images.
    """
    digest = hashlib.sha256()
    if isinstance(data, Benchmark):
        for name, split in _splits(data):
            digest.update(f"{name} {fingerprint(split)}\n".encode())
        return digest.hexdigest()
    for path in data.paths:
        digest.update(os.fsencode(f"{path.parent.name}/{path.name}") + b"\0")
    for values in (data.pids, data.camids):
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()


def parse_name(name: str) -> tuple[int, int] | None:
    """The pid and the camera, counted from 0, that a file name states; None where it has another form.

    The names count cameras from 1: `0002_c1s1_000451_03.jpg` is (2, 0). A camera 0 is another form.
    """
    match = _NAME.match(name)
    if match is None:
        return None
    pid, camera = int(match[1]), int(match[2])
    if camera < 1 or max(pid, camera) > _INT64_MAX:
        return None
    return pid, camera - 1


def _splits(benchmark: Benchmark) -> tuple[tuple[str, Split], ...]:
    return ("train", benchmark.train), ("query", benchmark.query), ("gallery", benchmark.gallery)


def _find_root(root_dir: Path, candidates: Sequence[Path]) -> Path:
    """The first candidate with all three folders."""
    if not _is_folder(root_dir):
        raise DataError(
            f"DATASETS.ROOT_DIR must be a folder that can be read, got {root_dir}; point it at your data sets"
        )
    for candidate in candidates:
        if not _missing_folders(candidate):
            return candidate
    present = [candidate for candidate in candidates if _is_folder(candidate)] or [root_dir]
    nearest = min(present, key=lambda folder: len(_missing_folders(folder)))
    raise DataError(
        f"{nearest} must hold the folders {', '.join(FOLDERS)}, but lacks {', '.join(_missing_folders(nearest))} "
        f"(it holds {_shown(_list_names(nearest))}); unpack the data set to {candidates[0]} "
        f"or point DATASETS.ROOT_DIR at the folder that holds {candidates[0].name}"
    )


def _missing_folders(folder: Path) -> list[str]:
    return [name for name in FOLDERS if not _is_folder(folder / name)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:  # a folder above it may not be entered
        return False


def _read_benchmark(name: str, root: Path) -> Benchmark:
    """Read the three folders in `root` and check that they can be trained on and evaluated."""
    train = _without(_read_split(root / TRAIN), JUNK_PID)
    num_distractors = int(np.sum(train.pids == DISTRACTOR_PID))
    if num_distractors:
        logger.warning(
            "%s: the %d images of pid 0 are distractors (many people) and are left out; "
            "if they show one person, give that person another number",
            root / TRAIN,
            num_distractors,
        )
        train = _without(train, DISTRACTOR_PID)
    query = _without(_read_split(root / QUERY), JUNK_PID)
    gallery = _without(_read_split(root / GALLERY), JUNK_PID)
    _check(root, train, query, gallery)
    labels = np.unique(train.pids, return_inverse=True)[1].astype(np.int64)  # [N]
    return Benchmark(name, root, Split(train.paths, labels, train.camids), query, gallery)


def _read_split(folder: Path) -> Split:
    """All images that lie directly in `folder`, sorted by name, with raw pids."""
    names = _list_names(folder, images_only=True)
    if not names:
        raise DataError(
            f"{folder} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), but has none "
            f"(it holds {_shown(_list_names(folder))}); unpack the data set again or correct DATASETS.ROOT_DIR"
        )
    parsed = [parse_name(name) for name in names]
    misnamed = [name for name, ids in zip(names, parsed, strict=True) if ids is None]
    if misnamed:
        raise DataError(
            f"images in {folder} must be named PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg, with cameras counted "
            f"from 1, but {len(misnamed)} of {len(names)} are not ({_shown(misnamed)}); "
            "rename or remove them, or correct DATASETS.ROOT_DIR"
        )
    ids = np.array(parsed, dtype=np.int64)  # [N, 2]
    return Split(tuple(folder / name for name in names), ids[:, 0].copy(), ids[:, 1].copy())


def _list_names(folder: Path, *, images_only: bool = False) -> list[str]:
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
            f"{folder} must be readable, but is not ({error.strerror}); change its permissions or DATASETS.ROOT_DIR"
        ) from error


def _without(split: Split, pid: int) -> Split:
    keep = np.flatnonzero(split.pids != pid)
    return Split(tuple(split.paths[i] for i in keep), split.pids[keep], split.camids[keep])


def _check(root: Path, train: Split, query: Split, gallery: Split) -> None:
    remedy = "unpack the data set again or correct DATASETS.ROOT_DIR"
    for folder, split in ((TRAIN, train), (QUERY, query), (GALLERY, gallery)):
        if len(split) == 0:
            unusable = "junk (pid -1) or distractors (pid 0)" if folder == TRAIN else "junk (pid -1)"
            raise DataError(f"{root / folder} must hold images of people, but all of them are {unusable}; {remedy}")
    num_pids = len(np.unique(train.pids))
    if num_pids < 2:
        raise DataError(f"{root / TRAIN} must hold at least 2 identities, got {num_pids}; {remedy}")
    if not _any_match(query, gallery):
        raise DataError(
            f"a query in {root / QUERY} must have a match in {root / GALLERY} (same pid, another camera), "
            f"but none of the {len(query)} queries has one; {remedy}"
        )


def _any_match(query: Split, gallery: Split) -> bool:
    """Whether any query's identity was seen in the gallery by another camera."""
    seen_by: dict[int, set[int]] = {}
    for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True):
        seen_by.setdefault(pid, set()).add(camid)
    return any(
        seen_by.get(pid, set()) - {camid} for pid, camid in zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    )


def _shown(names: Sequence[str]) -> str:
    """The first names, for a message."""
    shown = ", ".join(names[:_NUM_SHOWN]).encode("utf-8", "backslashreplace").decode()  # a name may be no valid text
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{shown}{more}" if names else "nothing"
