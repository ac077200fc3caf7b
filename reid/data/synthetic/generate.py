"""A generated benchmark of people in the Market-1501 layout."""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from reid.data.synthetic.cameras import HEIGHTS, WIDTHS, Camera, photograph
from reid.data.synthetic.people import Person
from reid.errors import DataError, SettingsError, WorldError

FORMAT_VERSION = 1  # raise it with every change of a pixel or name: an older folder is then refused, not taken for new
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
MANIFEST = "synthetic.json"
NAME = re.compile(r"(-1|\d+)_c(\d+)")
KILOBYTES_PER_IMAGE = 4  # a file of 2 kB fills one block of the disk
DISTRACTOR, JUNK = 0, -1  # Market-1501's two special pids
DISTRACTORS_PER_IMAGE, JUNK_PER_IMAGE = 0.06, 0.03  # extra gallery images for each image of a test identity
RARE, RARE_SHARE, SHARE = 0.15, 0.35, (0.7, 1.5)  # chance of an identity with few images; images over images_per_pid
JUNK_ZOOM = 2.2  # a junk box shows parts of a body
EMPTY = 0.4  # chance of nobody in a junk or distractor box
JPEG_QUALITY = (55, 92)
PERSON_STREAM, CAMERA_STREAM, SHOT_STREAM, PLAN_STREAM = range(4)  # the word after the seed: independent random numbers


class Shot(NamedTuple):
    """One image of the benchmark; `number` counts the images of its pid."""

    folder: str
    pid: int
    camid: int
    number: int

    @property
    def file(self) -> str:
        return f"{self.folder}/{_pid_name(self.pid)}_c{self.camid}s1_{self.number:06d}_00.jpg"


class Parameters(NamedTuple):
    """What the benchmark's content depends on."""

    num_train_pids: int
    num_test_pids: int
    images_per_pid: int
    num_cameras: int
    seed: int

    def check(self) -> None:
        least = Parameters(num_train_pids=1, num_test_pids=1, images_per_pid=4, num_cameras=2, seed=0)
        for name, value, minimum in zip(self._fields, self, least, strict=True):
            if value < minimum:
                raise SettingsError(
                    f"{name} of a synthetic benchmark must be at least {minimum}, got {value}; raise it",
                    key=f"DATASETS.SYNTHETIC.{name.upper()}",
                )

    def manifest(self) -> dict[str, int]:
        return {"format_version": FORMAT_VERSION, **self._asdict()}


def _pid_name(pid: int) -> str:
    return f"{pid:04d}" if pid >= 0 else str(pid)


def _sightings(params: Parameters, rng: np.random.Generator, at_least: int) -> list[int]:
    """Camera of each image of one identity: two cameras or more, each of them `at_least` times."""
    share = RARE_SHARE if rng.random() < RARE else rng.uniform(*SHARE)
    num_images = max(2 * at_least, round(params.images_per_pid * share))
    num_seen = min(int(rng.integers(2, params.num_cameras + 1)), num_images // at_least)
    seen = rng.choice(np.arange(1, params.num_cameras + 1), num_seen, replace=False).tolist()
    rest = rng.choice(seen, num_images - at_least * num_seen).tolist()
    return sorted(seen * at_least + rest)


def plan_shots(params: Parameters) -> list[Shot]:
    """Every image, split like Market-1501: the first of a test identity in each camera is a query."""
    rng = np.random.default_rng([params.seed, PLAN_STREAM])
    pids = (1 + rng.permutation(params.num_train_pids + params.num_test_pids)).tolist()
    shots = []
    for pid in pids[: params.num_train_pids]:
        shots += [Shot(TRAIN, pid, camid, number) for number, camid in enumerate(_sightings(params, rng, 1))]
    for pid in pids[params.num_train_pids :]:
        camids = _sightings(params, rng, 2)  # a query and a gallery image: every query has a match in another camera
        for number, camid in enumerate(camids):
            shots.append(Shot(QUERY if number == camids.index(camid) else GALLERY, pid, camid, number))
    num_test_images = params.num_test_pids * params.images_per_pid
    for pid, per_image in ((DISTRACTOR, DISTRACTORS_PER_IMAGE), (JUNK, JUNK_PER_IMAGE)):
        for number in range(math.ceil(num_test_images * per_image)):
            shots.append(Shot(GALLERY, pid, 1 + number % params.num_cameras, number))
    return shots


def _write(root: Path, seed: int, shot: Shot) -> None:
    """Draw and save one image, from the seed and the shot alone, so that any process may do it."""
    rng = np.random.default_rng([seed, SHOT_STREAM, shot.pid + 1, shot.camid, shot.number])
    camera = Camera(np.random.default_rng([seed, CAMERA_STREAM, shot.camid]), shot.camid)
    if shot.pid > 0:
        image = photograph(camera, Person(np.random.default_rng([seed, PERSON_STREAM, shot.pid])), rng)
    else:
        stranger = None if rng.random() < EMPTY else Person(rng)
        image = photograph(camera, stranger, rng, closer=JUNK_ZOOM if shot.pid == JUNK else 1.0)
    image.save(root / shot.file, quality=int(rng.integers(*JPEG_QUALITY)))


def _write_all(root: Path, params: Parameters, num_workers: int) -> None:
    shots = plan_shots(params)
    for folder in (TRAIN, QUERY, GALLERY):
        (root / folder).mkdir(parents=True)
    write = partial(_write, root, params.seed)
    if num_workers > 1:  # processes, as drawing holds the interpreter's lock: measured, threads gain nothing
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            deque(pool.map(write, shots, chunksize=32), maxlen=0)
    else:
        for shot in shots:
            write(shot)
    (root / MANIFEST).write_text(json.dumps(params.manifest(), indent=2) + "\n")


def _is_complete(root: Path, params: Parameters) -> bool:
    """Whether `root` holds this benchmark; False if it is absent or empty, an error if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        must = "must be absent, empty or a synthetic benchmark"
        raise DataError(
            f"{root} {must}, and has no readable {MANIFEST}; choose another folder", key="DATASETS.ROOT_DIR"
        ) from error
    wanted = params.manifest()
    if found != wanted:
        raise DataError(
            f"{root} must hold the benchmark {wanted}, and holds {found}; remove it or choose another folder",
            key="DATASETS.ROOT_DIR",
        )
    return True


def generate(
    root: Path,
    *,
    num_train_pids: int = 64,
    num_test_pids: int = 48,
    images_per_pid: int = 12,
    num_cameras: int = 4,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Write the benchmark, unless `root` holds it already.

    The files are a function of the arguments, to the byte, whatever `num_workers`. The folder gets its name when it is
    complete, so several processes may call this at once, and one that is killed leaves only a hidden `.NAME.*.partial`.

    Args:
        root: absent, empty, or this very benchmark.
        images_per_pid: about the mean; some identities have a third of it.
        num_workers: spawned processes, for tens of thousands of images (450 images/s each); None draws in this one.

    Raises:
        SettingsError: a number is too small.
        DataError: `root` holds something else.
        WorldError: `root` cannot be written.
    """
    params = Parameters(num_train_pids, num_test_pids, images_per_pid, num_cameras, seed)
    params.check()
    root = root.resolve()
    unfinished = root.parent / f".{root.name}.{uuid.uuid4().hex}.partial"
    try:
        if _is_complete(root, params):
            return
        _write_all(unfinished, params, num_workers or 1)
        try:
            unfinished.rename(root)
        except OSError:
            if not _is_complete(root, params):  # if it is, another process was faster
                raise
    except OSError as error:
        megabytes = 1 + (num_train_pids + num_test_pids) * images_per_pid * KILOBYTES_PER_IMAGE // 1000
        must = f"must be writable and its disk have {megabytes} MB free"
        raise WorldError(
            f"{root} {must}, got: {error}; free the space or choose another folder", key="DATASETS.ROOT_DIR"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def contact_sheet(root: Path, file: Path, *, num_rows: int = 8, num_columns: int = 8) -> None:
    """Draw training identities (rows) in images of all their cameras (columns), then distractors and junk."""
    photos: dict[int, list[tuple[int, Path]]] = {}
    strangers = [path for pid in (DISTRACTOR, JUNK) for path in (root / GALLERY).glob(f"{_pid_name(pid)}_*.jpg")]
    for path in [*(root / TRAIN).glob("*.jpg"), *strangers]:
        if match := NAME.match(path.name):
            photos.setdefault(int(match[1]), []).append((int(match[2]), path))
    known = [pid for pid in sorted(photos) if pid > 0 and len(photos[pid]) >= num_columns]
    rows = [*known[:num_rows], DISTRACTOR, JUNK]
    margin, cell_width, cell_height = 36, WIDTHS[1] + 4, HEIGHTS[1] + 14
    sheet = Image.new("RGB", (margin + num_columns * cell_width, len(rows) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, pid in enumerate(rows):
        top = row * cell_height
        draw.text((4, top + cell_height // 2), _pid_name(pid), fill="black")
        spread = np.linspace(0, len(photos[pid]) - 1, num_columns).astype(int).tolist()
        for column, (camid, path) in enumerate(sorted(photos[pid])[place] for place in spread):
            left = margin + column * cell_width
            draw.text((left, top), f"camera {camid}", fill="black")
            with Image.open(path) as photo:
                sheet.paste(photo, (left, top + 12))
    sheet.quantize(256).save(file, optimize=True)
