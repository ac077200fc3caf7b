"""Benchmarks that name the images of each split in a list file: MSMT17 and VehicleID."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from reid.config.benchmark_names import DEFAULTS, PARTS, BenchmarkOptions, Part
from reid.data.benchmarks.folders import find_root, read_text, require_present
from reid.data.benchmarks.splits import INT64_MAX, Benchmark, build_benchmark, data_error, is_folder, splits_of

_V1_FOLDERS = {"train": "train", "test": "test"}
_V2_FOLDERS = {"train": "mask_train_v2", "test": "mask_test_v2"}  # with masked faces


def msmt17(root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS) -> Benchmark:
    """Return MSMT17, in version 2 if both are there.

    A line of a list is `PATH PID`; the camera, 1 to 15, is the third `_` field of the file name. The pids of training
    and test both start from 0 and mean different people; here pid 0 is no distractor.

    Args:
        root_dir: Folder that holds one of the benchmark's folders (see `SOURCES`), or is it.
        options: Options, of which `msmt17_train` adds the list of the validation images to the training images.
        parts: Parts to read.

    Raises:
        DataError: A folder, list or image is missing, a line has another form, there are fewer than two identities to
            train, or no query has a match in the gallery.
    """
    lists = {"train": ["list_train.txt"], "query": ["list_query.txt"], "gallery": ["list_gallery.txt"]}
    if options.msmt17_train == "train+val":
        lists["train"].append("list_val.txt")
    needed_lists = [name for split in splits_of(parts) for name in lists[split]]
    layouts = [[*(folders[part] for part in parts), *needed_lists] for folders in (_V2_FOLDERS, _V1_FOLDERS)]
    root = find_root("msmt17", root_dir, *layouts)
    folders = _V2_FOLDERS if all(is_folder(root / _V2_FOLDERS[part]) for part in parts) else _V1_FOLDERS
    rows, sources = {}, {}
    for split in splits_of(parts):
        files = [root / name for name in lists[split]]
        lines = [line for file in files for line in _read_list(file)]
        camids = {line.name: _msmt17_camid(line) for line in lines}
        sources[split] = " and ".join(map(str, files))
        folder = root / folders["train" if split == "train" else "test"]
        rows[split] = [(folder / name, pid, camids[name]) for name, pid in _pid_of_each(lines).items()]
        require_present(sources[split], [row[0] for row in rows[split]])
    return build_benchmark("msmt17", root, rows, sources)


def vehicleid(root_dir: Path, options: BenchmarkOptions = DEFAULTS, parts: Sequence[Part] = PARTS) -> Benchmark:
    """Return PKU VehicleID.

    A line of a list is `IMAGE VEHICLE`. One image of each vehicle in the test list is the gallery, the others are
    queries: the image whose name has the smallest SHA-256, a pseudo-random draw that is the same everywhere.

    VehicleID does not state which camera took an image. Training images and queries have camera 0 and the gallery
    camera 1, so that no pair is excluded as seen by the same camera.

    Args:
        root_dir: Folder that holds one of the benchmark's folders (see `SOURCES`), or is it.
        options: Options, of which `vehicleid_test` selects the test list.
        parts: Parts to read.

    Raises:
        DataError: As in `msmt17`.
    """
    lists = {
        "train": "train_test_split/train_list.txt",
        "test": f"train_test_split/test_list_{options.vehicleid_test}.txt",
    }
    root = find_root("vehicleid", root_dir, ["image", *(lists[part] for part in parts)])
    rows, sources = {}, {split: root / lists["train" if split == "train" else "test"] for split in splits_of(parts)}
    if "train" in parts:
        rows["train"] = [(path, pid, 0) for path, pid in _read_vehicles(sources["train"], root / "image")]
    if "test" in parts:
        vehicles = _read_vehicles(sources["query"], root / "image")
        in_gallery = _draw_gallery(vehicles)
        rows["query"] = [(path, pid, 0) for path, pid in vehicles if path not in in_gallery]
        rows["gallery"] = [(path, pid, 1) for path, pid in vehicles if path in in_gallery]
        if not rows["query"]:
            raise data_error(f"{sources['query']} must list at least two images of a vehicle, got one of each")
    return build_benchmark("vehicleid", root, rows, sources)


class _Line(NamedTuple):
    """An image in a list."""

    location: str  # "FILE, line N", for messages
    name: str
    pid: int


def _read_list(file: Path) -> Iterator[_Line]:
    """Yield the lines `NAME PID`, without the empty ones."""
    form = "NAME PID, such as 0000/0000_000_01_0303morning_0015_0.jpg 0"
    is_empty = True
    for number, line in enumerate(read_text(file).splitlines(), 1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            continue
        pid = fields[-1]
        digits = pid.removeprefix("-")
        if len(fields) != 2 or not (digits.isascii() and digits.isdigit()) or not -1 <= int(pid) <= INT64_MAX:
            raise data_error(f"a line of {file} must be {form}, got {line.strip()!r} in line {number}")
        is_empty = False
        yield _Line(f"{file}, line {number}", fields[0].strip(), int(pid))
    if is_empty:
        raise data_error(f"{file} must hold lines {form}, got an empty file")


def _pid_of_each(lines: Iterable[_Line]) -> dict[str, int]:
    """Return the pid by name; an image that is listed twice counts once, one with two pids is an error."""
    pids: dict[str, int] = {}
    for line in lines:
        if pids.setdefault(line.name, line.pid) != line.pid:
            raise data_error(f"{line.name} must have one pid, got {pids[line.name]} and {line.pid} ({line.location})")
    return pids


def _msmt17_camid(line: _Line) -> int:
    """Return the camera, counted from 0; names of folders may hold such fields too and are ignored."""
    fields = line.name.rpartition("/")[2].partition(".")[0].split("_")
    text = fields[2] if len(fields) > 2 else ""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= INT64_MAX:
        raise data_error(
            "an image of MSMT17 must be named PID_NUMBER_CAMERA_..., with cameras counted from 1, got "
            f"{line.name!r} in {line.location}"
        )
    return int(text) - 1


def _read_vehicles(file: Path, folder: Path) -> list[tuple[Path, int]]:
    pids = _pid_of_each(_read_list(file))
    rows = [(folder / (name if name.lower().endswith(".jpg") else f"{name}.jpg"), pid) for name, pid in pids.items()]
    require_present(file, [path for path, _ in rows])
    return rows


def _draw_gallery(vehicles: Sequence[tuple[Path, int]]) -> set[Path]:
    """Return one image of each vehicle, independent of the order of the list."""
    smallest: dict[int, tuple[bytes, Path]] = {}
    for path, pid in vehicles:
        candidate = (hashlib.sha256(path.stem.encode("utf-8", "surrogateescape")).digest(), path)
        smallest[pid] = min(smallest.get(pid, candidate), candidate)
    return {path for _, path in smallest.values()}
