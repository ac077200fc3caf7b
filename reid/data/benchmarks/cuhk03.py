"""CUHK03 from the authors' .mat file or from extracted images, with both of its protocols and sets of boxes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reid.config.benchmark_names import DEFAULTS, PARTS, BenchmarkOptions, Part
from reid.data.benchmarks.folders import complete_folder, find_root, list_names, require_present
from reid.data.benchmarks.market_layout import FOLDERS, MARKET_FOLDERS, read_folders
from reid.data.benchmarks.splits import (
    Benchmark,
    Row,
    build_benchmark,
    data_error,
    is_file,
    is_folder,
    shown,
    splits_of,
)
from reid.errors import ReidError, WorldError

_MAT = "cuhk03_release/cuhk-03.mat"
_NAME = re.compile(r"(\d+)_(\d+)_([12])_(\d+)\.png", re.ASCII)  # camera pair, person of the pair, view, image
_SLOTS_OF_VIEW_1 = 5  # of the ten slots for images of a person
_MEGABYTES = 1000  # disk space for the extracted images
_PROTOCOL = "DATASETS.CUHK03.PROTOCOL"

logger = logging.getLogger(__name__)


def cuhk03(root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS) -> Benchmark:
    """Return CUHK03: 1,467 people, each seen by one of five pairs of cameras in up to ten images.

    The new protocol (767 people to train, 700 to test) is scored as Market-1501. The classic one has 20 splits of
    1,367 and 100 people; query and gallery are both the complete test set, and one gallery image of each identity is
    drawn many times (`single_gallery_shot`). The camera is the view, 0 or 1, of any pair, as published.

    Args:
        root_dir: Folder that holds one of the benchmark's folders, or is it, in one of the layouts of `SOURCES`.
        options: Options, of which those named `cuhk03_...` are used.
        parts: Parts to read.

    Raises:
        DataError: A file or image is missing or damaged, or as in `read_market_layout`.
        WorldError: The package h5py or scipy is not installed, or the extracted images cannot be written.
    """
    boxes, is_new = options.cuhk03_boxes, options.cuhk03_protocol == "new"
    images = prepare_cuhk03(root_dir, options)
    root = images.parent
    if images.name == boxes:
        return read_folders("cuhk03", images, MARKET_FOLDERS, parts)
    if is_new:
        source = _find_config(root, boxes)
        rows = _split_as_configured(source, images, parts)
    else:
        source = root / _MAT
        rows = _split_classically(images, _read_test_set(source, options.cuhk03_split), parts)
    fix = f"remove {images} and start again to extract it again"
    require_present(source, [row[0] for images_of_split in rows.values() for row in images_of_split], fix)
    sources = dict.fromkeys(rows, f"{images} (split by {source})")
    return build_benchmark("cuhk03", root, rows, sources, fix=fix, single_gallery_shot=not is_new)


def prepare_cuhk03(root_dir: Path, options: BenchmarkOptions) -> Path:
    """Extract the images from the .mat file unless they are there; several processes may do so at once.

    Returns:
        Folder of the images: `images_BOXES`, or `BOXES` in the layout of CUHK03-NP.

    Raises:
        DataError, WorldError: As in `cuhk03`.
    """
    boxes, needs = options.cuhk03_boxes, [[_MAT], [f"images_{options.cuhk03_boxes}"]]
    if options.cuhk03_protocol == "new":
        needs.append([f"{boxes}/{folder}" for folder in FOLDERS])
    root = find_root("cuhk03", root_dir, *needs)
    if options.cuhk03_protocol == "new" and all(is_folder(root / boxes / name) for name in FOLDERS):
        return root / boxes
    folder = root / f"images_{boxes}"
    if not is_folder(folder):
        logger.info("%s: extracting the %s images to %s, once", root / _MAT, boxes, folder)
        with complete_folder(folder, _MEGABYTES) as temporary:
            for name, pixels in _images_in(root / _MAT, boxes):
                Image.fromarray(pixels).save(temporary / name, compress_level=1)
    return folder


# ---- assignment of images to splits ----


def _find_config(root: Path, boxes: str) -> Path:
    name = f"cuhk03_new_protocol_config_{boxes}.mat"
    for path in (root / name, root / "cuhk03_release" / name):
        if is_file(path):
            return path
    raise data_error(
        f"{root} must hold {name} if {_PROTOCOL} is new (it holds {shown(list_names(root))})",
        f"get it from the authors of the new protocol, or use {_PROTOCOL} classic",
        _PROTOCOL,
    )


def _split_as_configured(source: Path, images: Path, parts: Sequence[Part]) -> dict[str, list[Row]]:
    """Return the rows of the new protocol, whose splits are indices into a list of names, counted from 1."""
    content = "the configuration of CUHK03's new protocol (filelist, labels, train_idx, query_idx, gallery_idx)"
    with _errors_of(source, content, "get it again from the authors of the new protocol"):
        from scipy.io import loadmat

        config = loadmat(source)
        names = [str(np.asarray(entry).item()) for entry in config["filelist"].ravel()]
        pids = [int(pid) for pid in config["labels"].ravel()]
        rows = {}
        for split in splits_of(parts):
            indices = config[f"{split}_idx"].ravel().astype(np.int64) - 1
            if len(indices) == 0 or indices.min() < 0 or len(names) != len(pids):
                raise ValueError(f"it holds {len(names)} names, {len(pids)} labels and {len(indices)} of {split}")
            rows[split] = [(images / names[i], pids[i], _parse(names[i])[2]) for i in indices]
        return rows


def _split_classically(images: Path, test_set: set[tuple[int, int]], parts: Sequence[Part]) -> dict[str, list[Row]]:
    """Return the rows of the classic protocol, whose people are numbered in the order of pair and person."""
    parsed = {name: _parse(name) for name in list_names(images, images_only=True) if _NAME.fullmatch(name)}
    pids = {person: pid for pid, person in enumerate(sorted({ids[:2] for ids in parsed.values()}))}
    return {
        split: [
            (images / name, pids[ids[:2]], ids[2])
            for name, ids in parsed.items()
            if (ids[:2] in test_set) == (split != "train")
        ]
        for split in splits_of(parts)
    }


def _parse(name: str) -> tuple[int, int, int]:
    """Return camera pair and person, counted from 1 as in the file, and the view, counted from 0."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"an image must be named PAIR_PERSON_VIEW_IMAGE.png, got {name}")
    return int(match[1]), int(match[2]), int(match[3]) - 1


# ---- the .mat files ----


def _images_in(mat: Path, boxes: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pixels (uint8 [H, W, 3]) of each image; cells of MATLAB are references, axes are reversed."""
    with _open(mat) as content:
        for pair, pair_reference in enumerate(content[boxes][0], 1):
            for person, slots in enumerate(content[pair_reference][:].T, 1):
                for slot, reference in enumerate(slots):
                    pixels = np.asarray(content[reference][:]).T
                    if pixels.ndim != 3 or not pixels.size:  # a slot without an image
                        continue
                    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
                        raise ValueError(f"an image is {pixels.dtype} {list(pixels.shape)}")
                    view = 1 if slot < _SLOTS_OF_VIEW_1 else 2
                    yield f"{pair}_{person:03d}_{view}_{slot + 1:02d}.png", np.ascontiguousarray(pixels)


def _read_test_set(mat: Path, split: int) -> set[tuple[int, int]]:
    """Return camera pair and person, counted from 1, of the people in the test set of a classic split."""
    if not is_file(mat):
        raise data_error(
            f"{mat} must exist if {_PROTOCOL} is classic, as it holds the 20 splits",
            f"unpack it, or use {_PROTOCOL} new",
            _PROTOCOL,
        )
    with _open(mat) as content:
        references = content["testsets"][0]
        if split >= len(references):
            raise data_error(
                f"DATASETS.CUHK03.SPLIT must be one of the {len(references)} splits in {mat}, got {split}",
                f"use 0 to {len(references) - 1}",
                "DATASETS.CUHK03.SPLIT",
            )
        return {(int(pair), int(person)) for pair, person in content[references[split]][:].T}


@contextmanager
def _open(mat: Path) -> Iterator[Any]:
    with _errors_of(mat, "the file of the CUHK03 release (detected, labeled, testsets)", "unpack it again"):
        import h5py

        with h5py.File(mat, "r") as content:
            yield content


@contextmanager
def _errors_of(file: Path, content: str, fix: str) -> Iterator[None]:
    """Translate errors of reading a file into one for the user."""
    try:
        yield
    except ReidError:
        raise
    except ModuleNotFoundError as error:
        raise WorldError(
            f"{file} needs the package {error.name}, which is not installed. Fix: run uv sync --extra cuhk03.",
            key="DATASETS.NAMES",
        ) from error
    except Exception as error:  # a damaged file makes h5py and scipy raise nearly anything
        raise data_error(f"{file} must be {content}, got {type(error).__name__}: {error}", fix) from error
