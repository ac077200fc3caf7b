"""CUHK03, from the authors' .mat file or from extracted images, in both of its protocols and with both of its boxes."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reid.config.benchmark_names import DEFAULTS, PARTS, BenchmarkOptions, Part
from reid.data.benchmarks.market_layout import FOLDERS, read_market_like
from reid.data.benchmarks.sources import SOURCES
from reid.data.benchmarks.splits import (
    CORRECT_ROOT,
    Benchmark,
    Layout,
    Split,
    build_benchmark,
    find_layout,
    is_file,
    is_folder,
    list_names,
    make_split,
    require_present,
    shown,
    splits_of,
)
from reid.errors import DataError, WorldError

_MAT = "cuhk03_release/cuhk-03.mat"
_NAME = re.compile(r"(\d+)_(\d+)_([12])_(\d+)\.png", re.ASCII)  # camera pair, person within it, view, image
_IMAGES_OF_VIEW_1 = 5  # of the ten places for images of a person

logger = logging.getLogger(__name__)


def cuhk03(root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS) -> Benchmark:
    """CUHK03: 1,467 people, each seen by one of five pairs of cameras, up to ten images a person.

    The new protocol (767 people to train, 700 to test) is scored as Market-1501. The classic one has 20 splits of
    1,367 and 100 people; query and gallery are both the whole test set, and one gallery image of each identity is
    drawn many times (`single_gallery_shot`). A camera is the view, 0 or 1, of whichever pair, as published.

    Args:
        root_dir: holds `cuhk03/` (or `CUHK03/`, `cuhk03-np/`, `CUHK03-NP/`), or is that folder itself, in one of two
            layouts: `cuhk03_release/cuhk-03.mat`, from which `images_detected/` or `images_labeled/` is extracted once
            (or these two as others have extracted them), with `cuhk03_new_protocol_config_{detected,labeled}.mat`
            beside either; or CUHK03-NP, `detected/` and `labeled/` with the three folders of Market-1501, for the new
            protocol only.
        options: the fields `cuhk03_...`.
        parts: what to read.

    Raises:
        DataError: a file or image is missing, a file is not what it should be, or as `market1501`.
        WorldError: h5py or scipy is not installed, or the extracted images cannot be written.

    Source: Li et al., DeepReID, CVPR 2014 (classic); Zhong et al., Re-ranking Person Re-identification with
    k-reciprocal Encoding, CVPR 2017 (new).
    """
    root = _find_root(root_dir, options)
    boxes, is_new = options.cuhk03_boxes, options.cuhk03_protocol == "new"
    if is_new and _is_market_like(root / boxes):
        return read_market_like("cuhk03", root / boxes, parts)
    images = prepare_cuhk03(root_dir, options)
    if images is None:
        raise DataError(
            f"{root} must hold {_MAT} or images_{boxes} (it holds {shown(list_names(root))}); {CORRECT_ROOT}",
            key="DATASETS.ROOT_DIR",
        )
    if is_new:
        source = _find_config(root, boxes)
        raw = _split_as_configured(source, images, parts)
    else:
        source = root / _MAT
        raw = _split_classically(images, _read_test_set(source, options.cuhk03_split), parts)
    places = dict.fromkeys(raw, f"{images} (split by {source})")
    require_present(
        source, [path for split in raw.values() for path in split.paths], f"remove {images} and start again"
    )
    return build_benchmark("cuhk03", root, raw, places, single_gallery_shot=not is_new)


def prepare_cuhk03(root_dir: Path, options: BenchmarkOptions) -> Path | None:
    """Extracts the images from the .mat file, unless they are there; the reader finds them then.

    The folder gets its name when it is complete, so several processes may do this at once.

    Returns:
        The folder of the images; None where they are not needed or there is nothing to extract them from.

    Raises:
        DataError, WorldError: as `cuhk03`.
    """
    root, boxes = _find_root(root_dir, options), options.cuhk03_boxes
    folder = root / f"images_{boxes}"
    if is_folder(folder):
        return folder
    if (options.cuhk03_protocol == "new" and _is_market_like(root / boxes)) or not is_file(root / _MAT):
        return None
    unfinished = root / f".{folder.name}.{uuid.uuid4().hex}.partial"
    logger.info("%s: extracting the %s images to %s, once", root / _MAT, boxes, folder)
    try:
        unfinished.mkdir()
        for name, pixels in _images_in(root / _MAT, boxes):
            Image.fromarray(pixels).save(unfinished / name, compress_level=1)
        try:
            unfinished.rename(folder)
        except OSError:
            if not is_folder(folder):  # if it is, another process was faster
                raise
    except OSError as error:
        raise WorldError(
            f"{root} must be writable and its disk have 1 GB free, got: {error}; free the space, change its "
            f"permissions, or extract {folder.name} elsewhere and copy it there",
            key="DATASETS.ROOT_DIR",
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _find_root(root_dir: Path, options: BenchmarkOptions) -> Path:
    """The folder that holds CUHK03 in any of its layouts."""
    boxes, homes = options.cuhk03_boxes, (*SOURCES["cuhk03"].homes, "")
    needs: list[tuple[str, ...]] = [(_MAT,), (f"images_{boxes}",)]
    if options.cuhk03_protocol == "new":
        needs.append(tuple(f"{boxes}/{folder}" for folder in FOLDERS))
    return find_layout(root_dir, [Layout(root_dir / home, need) for home in homes for need in needs]).root


def _is_market_like(folder: Path) -> bool:
    return all(is_folder(folder / name) for name in FOLDERS)


# ---- which image belongs where ----


def _find_config(root: Path, boxes: str) -> Path:
    name = f"cuhk03_new_protocol_config_{boxes}.mat"
    places = [root / name, root / "cuhk03_release" / name]
    for place in places:
        if is_file(place):
            return place
    raise DataError(
        f"{root} must hold {name} when DATASETS.CUHK03.PROTOCOL is new (it holds {shown(list_names(root))}); "
        "get it from the authors of the new protocol, or use DATASETS.CUHK03.PROTOCOL classic",
        key="DATASETS.CUHK03.PROTOCOL",
    )


def _split_as_configured(source: Path, images: Path, parts: Sequence[Part]) -> dict[str, Split]:
    """The new protocol: numbers of images in a list of names, counted from 1."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise _missing_package(error, source) from error
    try:
        content = loadmat(source)
        names = [str(np.asarray(entry).item()) for entry in content["filelist"].ravel()]
        pids = [int(pid) for pid in content["labels"].ravel()]
        chosen = {split: content[f"{split}_idx"].ravel().astype(np.int64) - 1 for split in splits_of(parts)}
        raw = {}
        for split, places in chosen.items():
            if len(places) == 0 or places.min() < 0 or len(names) != len(pids):
                raise ValueError(f"it holds {len(names)} names, {len(pids)} labels and {len(places)} of {split}")
            raw[split] = make_split((images / names[i], pids[i], _parse(names[i])[2]) for i in places)
    except Exception as error:  # a broken file makes the reader raise nearly anything
        raise DataError(
            f"{source} must be the configuration of CUHK03's new protocol (filelist, labels, train_idx, query_idx, "
            f"gallery_idx), got: {type(error).__name__}: {error}; get it again from the authors of the new protocol",
            key="DATASETS.ROOT_DIR",
        ) from error
    return raw


def _split_classically(images: Path, test_set: set[tuple[int, int]], parts: Sequence[Part]) -> dict[str, Split]:
    """The classic protocol: a person is a camera pair and a number; numbered here in the order of the pairs."""
    names = [name for name in list_names(images, images_only=True) if _NAME.fullmatch(name)]
    parsed = {name: _parse(name) for name in names}
    pids = {person: pid for pid, person in enumerate(sorted({ids[:2] for ids in parsed.values()}))}
    rows = {name: (images / name, pids[ids[:2]], ids[2]) for name, ids in parsed.items()}
    train = make_split(rows[name] for name, ids in parsed.items() if ids[:2] not in test_set)
    test = make_split(rows[name] for name, ids in parsed.items() if ids[:2] in test_set)
    raw = {split: train if split == "train" else test for split in splits_of(parts)}
    if any(len(split) == 0 for split in raw.values()):
        raise DataError(
            f"{images} must hold images named PAIR_PERSON_VIEW_IMAGE.png of people to train and to test, but has "
            f"{len(names)} images and {len(test)} to test; remove it to have it extracted again",
            key="DATASETS.ROOT_DIR",
        )
    return raw


def _parse(name: str) -> tuple[int, int, int]:
    """Camera pair and person, counted from 1 as in the file, and the view, counted from 0."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"an image must be named PAIR_PERSON_VIEW_IMAGE.png, got {name}")
    return int(match[1]), int(match[2]), int(match[3]) - 1


# ---- the .mat file ----


def _images_in(mat: Path, boxes: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels (uint8 [H, W, 3]) of each image; cells of MATLAB are references, in its order of axes."""
    with _open(mat) as content:
        try:
            for pair, of_pair in enumerate(content[boxes][0], 1):
                for person, places in enumerate(content[of_pair][:].T, 1):
                    for place, reference in enumerate(places):
                        pixels = np.asarray(content[reference][:]).T
                        if pixels.ndim == 3 and pixels.size:  # else a place without an image
                            if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
                                raise ValueError(f"an image is {pixels.dtype} {list(pixels.shape)}")
                            view = 1 if place < _IMAGES_OF_VIEW_1 else 2
                            yield f"{pair}_{person:03d}_{view}_{place + 1:02d}.png", np.ascontiguousarray(pixels)
        except Exception as error:
            raise _unreadable(mat, error) from error


def _read_test_set(mat: Path, split: int) -> set[tuple[int, int]]:
    """Camera pair and person, counted from 1, of everybody in the test set of a classic split."""
    if not is_file(mat):
        raise DataError(
            f"{mat} must be there when DATASETS.CUHK03.PROTOCOL is classic, as it holds the 20 splits; unpack it, or "
            "use DATASETS.CUHK03.PROTOCOL new",
            key="DATASETS.CUHK03.PROTOCOL",
        )
    with _open(mat) as content:
        try:
            references = content["testsets"][0]
            if split >= len(references):
                raise DataError(
                    f"DATASETS.CUHK03.SPLIT must be one of the {len(references)} splits in {mat}, got {split}; "
                    f"use 0 to {len(references) - 1}",
                    key="DATASETS.CUHK03.SPLIT",
                )
            return {(int(pair), int(person)) for pair, person in content[references[split]][:].T}
        except DataError:
            raise
        except Exception as error:
            raise _unreadable(mat, error) from error


def _open(mat: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise _missing_package(error, mat) from error
    try:
        return h5py.File(mat, "r")
    except OSError as error:
        raise _unreadable(mat, error) from error


def _unreadable(mat: Path, error: Exception) -> DataError:
    return DataError(
        f"{mat} must be the file of the CUHK03 release (detected, labeled, testsets), got: "
        f"{type(error).__name__}: {error}; unpack it again",
        key="DATASETS.ROOT_DIR",
    )


def _missing_package(error: ModuleNotFoundError, file: Path) -> WorldError:
    return WorldError(
        f"the package {error.name}, which reads {file}, is not installed; run: uv sync --extra cuhk03",
        key="DATASETS.NAMES",
    )
