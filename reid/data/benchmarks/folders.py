"""Folders and files of benchmarks: locate, list, read, and write them completely or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reid.data.benchmarks.sources import SOURCES
from reid.data.benchmarks.splits import CORRECT_ROOT, IMAGE_SUFFIXES, data_error, is_file, is_folder, shown
from reid.errors import WorldError


def find_root(name: str, root_dir: Path, *alternatives: Sequence[str]) -> Path:
    """Return the first folder of a benchmark that holds all names of one of the alternatives.

    Args:
        name: Key of `SOURCES`, which names the folders to search below `root_dir`.
        root_dir: DATASETS.ROOT_DIR. It is searched last, except for the generated benchmark.
        alternatives: Names of files (with a suffix) and folders (without one) in each possible layout.

    Raises:
        DataError: No folder is complete; the message is about the one that lacks the fewest names.
    """
    if not is_folder(root_dir):
        raise data_error(
            f"DATASETS.ROOT_DIR must be a readable folder, got {root_dir}", "set it to the folder of your data sets"
        )
    homes = SOURCES[name].homes if name == "synthetic" else (*SOURCES[name].homes, "")
    candidates: list[tuple[Path, Sequence[str], Sequence[str]]] = []
    for root in (root_dir / home for home in homes):
        for needed in alternatives:
            missing = [item for item in needed if not (is_file if Path(item).suffix else is_folder)(root / item)]
            if not missing:
                return root
            if is_folder(root):
                candidates.append((root, needed, missing))
    no_folder = (root_dir, alternatives[0], alternatives[0])
    root, needed, lacking = min(candidates, key=lambda candidate: len(candidate[2]), default=no_folder)
    raise data_error(
        f"{root} must hold {', '.join(needed)}, but lacks {', '.join(lacking)} (it holds {shown(list_names(root))})",
        f"unpack the data set to {root_dir / homes[0]} or set DATASETS.ROOT_DIR to the folder that holds {homes[0]}",
    )


def list_names(folder: Path, *, images_only: bool = False) -> list[str]:
    """Return the sorted names in `folder`, without hidden ones (macOS writes a `._x.jpg` for each `x.jpg`).

    A broken link with an image's name is listed, so that it is reported as unreadable instead of being skipped.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            if images_only:
                visible = [e for e in visible if Path(e.name).suffix.lower() in IMAGE_SUFFIXES and not e.is_dir()]
            return sorted(entry.name for entry in visible)
    except OSError as error:
        raise data_error(
            f"{folder} must be readable, got: {error.strerror}", "change its permissions or DATASETS.ROOT_DIR"
        ) from error


def require_present(
    source: object, paths: Sequence[Path], fix: str = CORRECT_ROOT, *, key: str = "DATASETS.ROOT_DIR"
) -> None:
    """Raise DataError with the first missing images of a list; each folder is read once, not each image."""
    names: dict[Path, set[str]] = {}
    for folder in {path.parent for path in paths}:
        try:
            with os.scandir(folder) as entries:
                names[folder] = {entry.name for entry in entries}
        except (OSError, ValueError):  # ValueError: a NUL in the name
            names[folder] = set()
    missing = [str(path) for path in paths if path.name not in names[path.parent]]
    if missing:
        raise data_error(
            f"the images listed in {source} must exist, but {len(missing)} of {len(paths)} do not ({shown(missing)})",
            fix,
            key,
        )


def read_text(file: Path, key: str = "DATASETS.ROOT_DIR") -> str:
    """Return a text file in UTF-8, without a byte order mark; raise DataError if it is something else."""
    fix = f"save it as UTF-8 or correct {key}"
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise data_error(f"{file} must be readable, got: {error.strerror}", "change its permissions", key) from error
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        raise data_error(f"{file} must be UTF-8 text, got the byte {byte:#x} in line {line}", fix, key) from error
    if "\0" in text:
        raise data_error(f"{file} must be UTF-8 text, got a zero byte", fix, key)
    return text


@contextmanager
def complete_folder(folder: Path, num_megabytes: int) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end, or is removed after an error.

    Any number of processes may do so at once: the first one that is complete wins.

    Raises:
        WorldError: The folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not is_folder(folder):  # else another process was faster
                raise
    except OSError as error:
        raise WorldError(
            f"{folder} must be writable, on a disk with {num_megabytes:,} MB free, got: {error}. Fix: free the space, "
            "change its permissions, or write it elsewhere and copy it there.",
            key="DATASETS.ROOT_DIR",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
