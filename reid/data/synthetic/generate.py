"""A generated benchmark of people in the Market-1501 layout."""

from __future__ import annotations

import json
import math
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reid.data.benchmarks.folders import complete_folder
from reid.data.benchmarks.market_layout import FOLDERS, GALLERY, QUERY, TRAIN
from reid.data.benchmarks.splits import DISTRACTOR_PID, JUNK_PID, data_error
from reid.data.synthetic.cameras import Camera, photograph
from reid.data.synthetic.people import Person
from reid.errors import SettingsError

FORMAT_VERSION = 1  # raise it with every change of a pixel or name, so that a folder of older images is refused
MANIFEST = "synthetic.json"
KILOBYTES_PER_IMAGE = 4  # a file of 2 kB fills one block of the disk
DISTRACTORS_PER_IMAGE, JUNK_PER_IMAGE = 0.06, 0.03  # extra gallery images for each image of a test identity
RARE, RARE_SHARE, SHARE = 0.15, 0.35, (0.7, 1.5)  # chance of an identity with few images; images over images_per_pid
JUNK_ZOOM = 2.2  # a junk box shows parts of a body
EMPTY = 0.4  # chance of a junk or distractor box without a person
JPEG_QUALITY = (55, 92)
PERSON_STREAM, CAMERA_STREAM, SHOT_STREAM, PLAN_STREAM = range(4)  # second seed: makes the streams independent


class Shot(NamedTuple):
    """An image of the benchmark; `number` counts the images of its pid."""

    folder: str
    pid: int
    camid: int
    number: int

    @property
    def file(self) -> str:
        pid = f"{self.pid:04d}" if self.pid >= 0 else str(self.pid)
        return f"{self.folder}/{pid}_c{self.camid}s1_{self.number:06d}_00.jpg"


class Parameters(NamedTuple):
    """Parameters that determine the content of the benchmark; see `generate`."""

    num_train_pids: int
    num_test_pids: int
    images_per_pid: int
    num_cameras: int
    seed: int

    def validate(self) -> None:
        minimums = Parameters(num_train_pids=1, num_test_pids=1, images_per_pid=4, num_cameras=2, seed=0)
        for name, value, minimum in zip(self._fields, self, minimums, strict=True):
            if value < minimum:
                key = f"DATASETS.SYNTHETIC.{name.upper()}"
                raise SettingsError(f"{key} ({name}) must be at least {minimum}, got {value}. Fix: raise it.", key=key)

    def manifest(self) -> dict[str, int]:
        return {"format_version": FORMAT_VERSION, **self._asdict()}


def _sightings(params: Parameters, rng: np.random.Generator, at_least: int) -> list[int]:
    """Return the camera of each image of an identity: two cameras or more, each `at_least` times."""
    share = RARE_SHARE if rng.random() < RARE else rng.uniform(*SHARE)
    num_images = max(2 * at_least, round(params.images_per_pid * share))
    num_seen = min(int(rng.integers(2, params.num_cameras + 1)), num_images // at_least)
    seen = rng.choice(np.arange(1, params.num_cameras + 1), num_seen, replace=False).tolist()
    rest = rng.choice(seen, num_images - at_least * num_seen).tolist()
    return sorted(seen * at_least + rest)


def plan_shots(params: Parameters) -> list[Shot]:
    """Return all images, split as in Market-1501: the first of a test identity in each camera is a query."""
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
    for pid, per_image in ((DISTRACTOR_PID, DISTRACTORS_PER_IMAGE), (JUNK_PID, JUNK_PER_IMAGE)):
        for number in range(math.ceil(num_test_images * per_image)):
            shots.append(Shot(GALLERY, pid, 1 + number % params.num_cameras, number))
    return shots


def _write(root: Path, seed: int, shot: Shot) -> None:
    """Draw and save one image; it depends on the seed and the shot only, so any process may do it."""
    rng = np.random.default_rng([seed, SHOT_STREAM, shot.pid + 1, shot.camid, shot.number])
    camera = Camera(np.random.default_rng([seed, CAMERA_STREAM, shot.camid]), shot.camid)
    if shot.pid > 0:
        image = photograph(camera, Person(np.random.default_rng([seed, PERSON_STREAM, shot.pid])), rng)
    else:
        stranger = None if rng.random() < EMPTY else Person(rng)
        image = photograph(camera, stranger, rng, zoom=JUNK_ZOOM if shot.pid == JUNK_PID else 1.0)
    image.save(root / shot.file, quality=int(rng.integers(*JPEG_QUALITY)))


def _write_all(root: Path, params: Parameters, num_workers: int) -> None:
    shots = plan_shots(params)
    for folder in FOLDERS:
        (root / folder).mkdir()
    write = partial(_write, root, params.seed)
    if num_workers > 1:  # processes, as drawing holds the interpreter's lock: measured, threads gain nothing
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            deque(pool.map(write, shots, chunksize=32), maxlen=0)
    else:
        for shot in shots:
            write(shot)
    (root / MANIFEST).write_text(json.dumps(params.manifest(), indent=2) + "\n")


def _is_complete(root: Path, params: Parameters) -> bool:
    """Return whether `root` holds this benchmark: False if it is absent or empty, an error if it holds another."""
    try:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
        existing = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise data_error(
            f"{root} must be absent, empty or a synthetic benchmark, got no readable {MANIFEST}: {error}",
            "choose another DATASETS.ROOT_DIR",
        ) from error
    expected = params.manifest()
    if existing != expected:
        raise data_error(
            f"{root} must hold the benchmark {expected}, got {existing}",
            "remove it or change DATASETS.ROOT_DIR",
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
    """Write the benchmark, unless `root` already holds it.

    The bytes of the files depend on the arguments only, not on `num_workers`. The folder gets its name when it is
    complete, so several processes may call this at once; a killed one leaves only a hidden `.NAME.*.partial`.

    Example:
        generate(Path("data/synthetic"), num_train_pids=100)

    Args:
        root: Folder that is absent, empty, or this very benchmark.
        num_train_pids: Number of training identities.
        num_test_pids: Number of other identities, which are the query and gallery.
        images_per_pid: Approximate mean number of images of an identity; some have a third of it.
        num_cameras: Number of cameras.
        seed: Seed of all random numbers.
        num_workers: Number of spawned processes, for tens of thousands of images (450 images/s each); None for this
            process only.

    Raises:
        SettingsError: A number is too small.
        DataError: `root` holds something else.
        WorldError: `root` cannot be written.
    """
    params = Parameters(num_train_pids, num_test_pids, images_per_pid, num_cameras, seed)
    params.validate()
    root = root.resolve()
    if _is_complete(root, params):
        return
    num_megabytes = 1 + (num_train_pids + num_test_pids) * images_per_pid * KILOBYTES_PER_IMAGE // 1000
    with complete_folder(root, num_megabytes) as temporary:
        _write_all(temporary, params, num_workers or 1)
    _is_complete(root, params)  # raises if another process was faster with other parameters
