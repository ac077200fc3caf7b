"""Benchmarks that name the images of each split in a list file: MSMT17 and VehicleID."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from reid.config.benchmark_names import DEFAULTS, PARTS, BenchmarkOptions, Part
from reid.data.benchmarks.sources import SOURCES
from reid.data.benchmarks.splits import (
    CORRECT_ROOT,
    INT64_MAX,
    Benchmark,
    Layout,
    Split,
    build_benchmark,
    find_layout,
    is_folder,
    make_split,
    require_present,
    splits_of,
)
from reid.errors import DataError

_V1_FOLDERS = {"train": "train", "test": "test"}
_V2_FOLDERS = {"train": "mask_train_v2", "test": "mask_test_v2"}  # the faces are masked


def msmt17(root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS) -> Benchmark:
    """MSMT17: 30,248 training images of 1,041 people (32,621 with validation), 11,659 queries, 82,161 gallery images.

    A line of a list is `PATH PID`; the camera, 1 to 15, is the third `_` field of the file's own name. The pids of
    training and test both start from 0 and mean different people; 0 is a person as any other.

    Args:
        root_dir: holds, directly or in `msmt17/`, `MSMT17_V2/` (folders `mask_train_v2` and `mask_test_v2`) or
            `MSMT17_V1/` (`train` and `test`); or one of these layouts lies in it or in `msmt17/` itself. V2 is
            preferred where both are there.
        options: `msmt17_train` says whether the list of the validation images is trained on too.
        parts: what to read.

    Raises:
        DataError: a folder, list or image is missing, a line has another form, there are fewer than two identities to
            train, or no query has a match in the gallery.

    Source: Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018.
    """
    lists = {"train": ["list_train.txt"], "query": ["list_query.txt"], "gallery": ["list_gallery.txt"]}
    if options.msmt17_train == "train+val":
        lists["train"].append("list_val.txt")
    splits = splits_of(parts)
    needed_lists = [name for split in splits for name in lists[split]]
    layouts = [
        Layout(root_dir / home, (*(folders[part] for part in parts), *needed_lists))
        for home in (*SOURCES["msmt17"].homes, "")
        for folders in (_V2_FOLDERS, _V1_FOLDERS)
    ]
    root = find_layout(root_dir, layouts).root
    folders = _V2_FOLDERS if all(is_folder(root / _V2_FOLDERS[part]) for part in parts) else _V1_FOLDERS
    raw, places = {}, {}
    for split in splits:
        images = root / folders["train" if split == "train" else "test"]
        files = [root / name for name in lists[split]]
        raw[split], places[split] = _read_msmt17_lists(files, images), " and ".join(map(str, files))
    return build_benchmark("msmt17", root, raw, places)


def vehicleid(root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS) -> Benchmark:
    """PKU VehicleID: 113,346 training images of 13,164 vehicles, and a test list of 800 to 13,164 others.

    A line of a list is `IMAGE VEHICLE`. One image of each vehicle in the test list is the gallery, the rest are
    queries: the image whose name has the smallest SHA-256, which is as good as drawn, but everywhere the same.

    VehicleID does not say which camera took an image. Training images and queries have camera 0 and the gallery
    camera 1, so that no pair is left out as taken by one camera.

    Args:
        root_dir: holds `VehicleID_V1.0/` or `vehicleid/`, or is that folder itself.
        options: `vehicleid_test` names the test list.
        parts: what to read.

    Raises:
        DataError: a folder, list or image is missing, a line has another form, or as `msmt17`.

    Source: Liu et al., Deep Relative Distance Learning: Tell the Difference Between Similar Vehicles, CVPR 2016.
    """
    lists = {
        "train": "train_test_split/train_list.txt",
        "test": f"train_test_split/test_list_{options.vehicleid_test}.txt",
    }
    needs = ("image", *(lists[part] for part in parts))
    homes = (*SOURCES["vehicleid"].homes, "")
    root = find_layout(root_dir, [Layout(root_dir / home, needs) for home in homes]).root
    raw, places = {}, {}
    if "train" in parts:
        file = root / lists["train"]
        rows = _read_vehicles(file, root / "image")
        raw["train"], places["train"] = make_split((path, pid, 0) for path, pid in rows), file
    if "test" in parts:
        file = root / lists["test"]
        raw["query"], raw["gallery"] = _divide_vehicles(_read_vehicles(file, root / "image"))
        places["query"] = places["gallery"] = file
        if len(raw["query"]) == 0:
            raise DataError(
                f"{file} must list two images or more of a vehicle, but lists one of each; {CORRECT_ROOT}",
                key="DATASETS.ROOT_DIR",
            )
    return build_benchmark("vehicleid", root, raw, places)


class Line(NamedTuple):
    """An image that a list names."""

    where: str  # "FILE, line N"
    name: str
    pid: int


def _read_list(file: Path) -> Iterator[Line]:
    """The lines `NAME PID`; empty ones are passed over."""
    form = "NAME PID, such as 0000/0000_000_01_0303morning_0015_0.jpg 0"
    is_empty = True
    for number, line in enumerate(_text_of(file).splitlines(), 1):
        words = line.rsplit(maxsplit=1)
        if not words:
            continue
        pid = words[-1]
        digits = pid.removeprefix("-")
        if len(words) != 2 or not (digits.isascii() and digits.isdigit()) or not -1 <= int(pid) <= INT64_MAX:
            raise DataError(
                f"a line of {file} must be {form}, got {line.strip()!r} in line {number}; {CORRECT_ROOT}",
                key="DATASETS.ROOT_DIR",
            )
        is_empty = False
        yield Line(f"{file}, line {number}", words[0].strip(), int(pid))
    if is_empty:
        raise DataError(f"{file} must hold lines {form}, but is empty; {CORRECT_ROOT}", key="DATASETS.ROOT_DIR")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"{file} must be a list that can be read, got: {reason}; {CORRECT_ROOT}", key="DATASETS.ROOT_DIR"
        ) from error


def _pid_of_each(lines: Iterable[Line]) -> dict[str, int]:
    """An image that is listed again counts once; one that is listed as two people is an error."""
    pids: dict[str, int] = {}
    for line in lines:
        if pids.setdefault(line.name, line.pid) != line.pid:
            raise DataError(
                f"an image must have one pid, but {line.name} has {pids[line.name]} and {line.pid} ({line.where}); "
                f"{CORRECT_ROOT}",
                key="DATASETS.ROOT_DIR",
            )
    return pids


def _read_msmt17_lists(files: Sequence[Path], folder: Path) -> Split:
    lines = [line for file in files for line in _read_list(file)]
    pids = _pid_of_each(lines)
    camids = {line.name: _msmt17_camera(line) - 1 for line in lines}
    rows = [(folder / name, pid, camids[name]) for name, pid in pids.items()]
    require_present(" and ".join(map(str, files)), [path for path, _, _ in rows])
    return make_split(rows)


def _msmt17_camera(line: Line) -> int:
    """The third field of the file's own name; what stands in the folder's name means nothing."""
    fields = line.name.rpartition("/")[2].partition(".")[0].split("_")
    text = fields[2] if len(fields) > 2 else ""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= INT64_MAX:
        raise DataError(
            f"an image of MSMT17 must be named PID_NUMBER_CAMERA_..., with cameras counted from 1, got {line.name!r} "
            f"in {line.where}; {CORRECT_ROOT}",
            key="DATASETS.ROOT_DIR",
        )
    return int(text)


def _read_vehicles(file: Path, folder: Path) -> list[tuple[Path, int]]:
    pids = _pid_of_each(_read_list(file))
    names = {name: name if name.lower().endswith(".jpg") else f"{name}.jpg" for name in pids}
    rows = [(folder / names[name], pid) for name, pid in pids.items()]
    require_present(file, [path for path, _ in rows])
    return rows


def _divide_vehicles(rows: Sequence[tuple[Path, int]]) -> tuple[Split, Split]:
    """Query and gallery; independent of the order of the list."""
    drawn: dict[int, tuple[bytes, Path]] = {}
    for path, pid in rows:
        ticket = (hashlib.sha256(path.stem.encode("utf-8", "surrogateescape")).digest(), path)
        drawn[pid] = min(drawn.get(pid, ticket), ticket)
    in_gallery = {path for _, path in drawn.values()}
    query = make_split((path, pid, 0) for path, pid in rows if path not in in_gallery)
    return query, make_split((path, pid, 1) for path, pid in rows if path in in_gallery)
