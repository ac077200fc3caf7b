"""Benchmarks with one folder for each split and file names that state the identity and the camera.

These are Market-1501, DukeMTMC-reID, Occluded-Duke, VeRi-776, CUHK03-NP and the generated one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from reid.config.benchmark_names import DEFAULTS, PARTS, BenchmarkOptions, Part
from reid.data.benchmarks.folders import find_root, list_names
from reid.data.benchmarks.splits import (
    DISTRACTOR_PID,
    IMAGE_SUFFIXES,
    INT64_MAX,
    Benchmark,
    Row,
    build_benchmark,
    data_error,
    is_folder,
    shown,
    splits_of,
)

TRAIN, QUERY, GALLERY = FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
MARKET_FOLDERS = {"train": TRAIN, "query": QUERY, "gallery": GALLERY}
VERI_FOLDERS = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
FOLDERS_OF = {
    "market1501": MARKET_FOLDERS,
    "dukemtmc": MARKET_FOLDERS,  # 408 identities of the gallery have no query
    "occluded_duke": MARKET_FOLDERS,  # DukeMTMC-reID, split again so that the queries are occluded
    "veri": VERI_FOLDERS,
    "synthetic": MARKET_FOLDERS,
}
DISTRACTOR_FOLDERS = ("images", "distractors_500k", "distractors")

_NAME = re.compile(r"(-1|\d+)_c(\d+)", re.ASCII)

logger = logging.getLogger(__name__)


def read_market_layout(
    name: str, root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS
) -> Benchmark:
    """Return a benchmark of `FOLDERS_OF`.

    Only the name of an image's file, `PID_cCAMERA...`, states its identity and camera; folder names are ignored.
    Junk (pid -1) is dropped from all splits, as every published number assumes. Distractors (pid 0) stay in the
    gallery, where they can only be mistakes. They are dropped from the training folder with a warning (the archive of
    Market-1501 has none there): they are many people, and as one class they would teach that strangers look alike.

    Args:
        name: Key of `FOLDERS_OF`.
        root_dir: Folder that holds one of the benchmark's folders (see `SOURCES`), or is it.
        options: Options, of which `market1501_distractors` adds the 500,000 distractors of Market-1501+500k to the
            gallery, with pid 0 whatever their names state.
        parts: Parts to read.

    Raises:
        DataError: A folder is missing or holds no usable image, a file name has another form, there are fewer than
            two identities to train, or no query has a match in the gallery.
    """
    folders = FOLDERS_OF[name]
    root = find_root(name, root_dir, [folders[split] for split in splits_of(parts)])
    has_distractors = name == "market1501" and options.market1501_distractors
    return read_folders(name, root, folders, parts, has_distractors=has_distractors)


def read_folders(
    name: str, root: Path, folders: Mapping[str, str], parts: Sequence[Part], *, has_distractors: bool = False
) -> Benchmark:
    """Return the benchmark in `root`; see `read_market_layout`."""
    sources = {split: root / folder for split, folder in folders.items()}
    rows = {split: _read_folder(sources[split]) for split in splits_of(parts)}
    if "train" in rows:
        rows["train"] = _without_distractors(rows["train"], sources["train"])
    if has_distractors and "gallery" in rows:
        rows["gallery"] += _read_distractors(root)
    return build_benchmark(name, root, rows, sources)


def parse_name(name: str) -> tuple[int, int] | None:
    """Return the pid and the camera, counted from 0, that a file name states; None if it has another form.

    The names count cameras from 1: `0002_c1s1_000451_03.jpg` is (2, 0). A camera 0 is another form.
    """
    match = _NAME.match(name)
    if match is None:
        return None
    pid, camera = int(match[1]), int(match[2])
    return None if camera < 1 or max(pid, camera) > INT64_MAX else (pid, camera - 1)


def _read_folder(folder: Path) -> list[Row]:
    """Return all images directly in `folder`, with pids as in their names."""
    parsed = {name: parse_name(name) for name in _image_names(folder)}
    misnamed = [name for name, ids in parsed.items() if ids is None]
    if misnamed:
        raise data_error(
            f"images in {folder} must be named PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg, with cameras counted "
            f"from 1, but {len(misnamed)} of {len(parsed)} are not ({shown(misnamed)})",
            "rename or remove them, or correct DATASETS.ROOT_DIR",
        )
    return [(folder / name, *ids) for name, ids in parsed.items() if ids is not None]


def _image_names(folder: Path) -> list[str]:
    names = list_names(folder, images_only=True)
    if not names:
        raise data_error(
            f"{folder} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none (it holds "
            f"{shown(list_names(folder))})"
        )
    return names


def _without_distractors(rows: Sequence[Row], folder: Path) -> list[Row]:
    kept = [row for row in rows if row[1] != DISTRACTOR_PID]
    if len(kept) < len(rows):
        logger.warning(
            "%s: the %d images of pid 0 are dropped as distractors (many people); if they show one person, give it "
            "another pid",
            folder,
            len(rows) - len(kept),
        )
    return kept


def _read_distractors(root: Path) -> list[Row]:
    """Return the further distractors; if a name states no camera, camera 0, since no score depends on it."""
    folder = next((root / name for name in DISTRACTOR_FOLDERS if is_folder(root / name)), None)
    if folder is None:
        raise data_error(
            f"{root} must hold the 500,000 distractors in one of the folders {', '.join(DISTRACTOR_FOLDERS)} if "
            f"DATASETS.MARKET1501.DISTRACTORS is yes (it holds {shown(list_names(root))})",
            "unpack them there, or use DATASETS.MARKET1501.DISTRACTORS no",
            "DATASETS.MARKET1501.DISTRACTORS",
        )
    return [(folder / name, DISTRACTOR_PID, (parse_name(name) or (0, 0))[1]) for name in _image_names(folder)]
