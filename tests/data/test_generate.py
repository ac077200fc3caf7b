"""The generated benchmark: Market-1501's layout and rules, the same bytes each time, never half of it, not too easy.

Also covers reid.data.synthetic.people, reid.data.synthetic.cameras.
"""

import errno
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from refusals import refused

from reid.data.benchmarks.market_layout import GALLERY, QUERY, TRAIN
from reid.data.synthetic import generate as module
from reid.data.synthetic.generate import MANIFEST, Parameters, generate, plan_shots
from reid.errors import DataError, SettingsError, WorldError

SMALL = {"num_train_pids": 4, "num_test_pids": 16, "images_per_pid": 8, "num_cameras": 4, "seed": 3}
TINY = {"num_train_pids": 2, "num_test_pids": 2, "images_per_pid": 4, "num_cameras": 2, "seed": 0}
NAME = re.compile(r"^(-1|\d{4,})_c(\d+)s(\d+)_(\d{6})_(\d{2})\.jpg$")
SCRIPT = (
    "import sys; from pathlib import Path; from reid.data.synthetic import generate; "
    "generate.generate(Path(sys.argv[1]), {})"
)


@pytest.fixture(scope="module")
def benchmark_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "people"
    generate(root, **SMALL)
    return root


def labels(folder):
    """(pid, camid) of every image, by file."""
    matches = {file: NAME.match(file.name) for file in sorted(folder.iterdir())}
    return {file: (int(match[1]), int(match[2])) for file, match in matches.items()}


def contents(root):
    return {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def start(root, arguments):
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(arguments), root], stderr=subprocess.PIPE, text=True)


def test_the_folder_has_market1501s_layout(benchmark_root):
    assert sorted(path.name for path in benchmark_root.iterdir()) == [GALLERY, TRAIN, QUERY, MANIFEST]
    for folder in (TRAIN, QUERY, GALLERY):
        assert all(re.match(r"^(-1|\d+)_c(\d+)", file.name) for file in labels(benchmark_root / folder))


def test_train_and_test_pids_are_disjoint_and_gallery_has_junk(benchmark_root):
    train, query, gallery = ({pid for pid, _ in labels(benchmark_root / f).values()} for f in (TRAIN, QUERY, GALLERY))
    assert len(train) == SMALL["num_train_pids"]
    assert len(query) == SMALL["num_test_pids"]
    assert min(train | query) > 0
    assert not train & query
    assert gallery == query | {0, -1}


def test_images_are_color_jpegs_of_about_128_x_64(benchmark_root):
    sizes = set()
    for file in labels(benchmark_root / GALLERY):
        with Image.open(file) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.add(image.size)
    widths, heights = zip(*sizes, strict=True)
    assert 50 <= min(widths) < max(widths) <= 75
    assert 110 <= min(heights) < max(heights) <= 150


@given(
    st.builds(
        Parameters,
        num_train_pids=st.integers(1, 30),
        num_test_pids=st.integers(1, 30),
        images_per_pid=st.integers(4, 30),
        num_cameras=st.integers(2, 8),
        seed=st.integers(0, 1000),
    )
)
def test_any_plan_keeps_market1501s_rules(params):
    shots = plan_shots(params)
    cameras = {folder: defaultdict(list) for folder in (TRAIN, QUERY, GALLERY)}
    for shot in shots:
        cameras[shot.folder][shot.pid].append(shot.camid)
    assert len({shot.file for shot in shots}) == len(shots)
    assert all(len(set(camids)) >= 2 for camids in cameras[TRAIN].values())
    for pid, camids in cameras[QUERY].items():
        assert len(camids) == len(set(camids)) >= 2  # one query in each camera, and for each of them ...
        assert set(camids) == set(cameras[GALLERY][pid])  # ... matches in all of its cameras, so in another one too


def test_numbers_of_images_vary_around_the_mean():
    params = Parameters(num_train_pids=400, num_test_pids=1, images_per_pid=12, num_cameras=4, seed=0)
    pids = [shot.pid for shot in plan_shots(params) if shot.folder == TRAIN]
    counts = np.unique(pids, return_counts=True)[1]
    assert counts.mean() == pytest.approx(12, rel=0.1)
    assert counts.min() <= 5
    assert counts.max() >= 16


def test_generation_is_deterministic_for_any_number_of_workers(benchmark_root, tmp_path):
    generate(tmp_path / "again", **SMALL, num_workers=2)
    assert contents(tmp_path / "again") == contents(benchmark_root)


def test_another_seed_gives_other_images(tmp_path):
    for seed in (0, 1):
        generate(tmp_path / str(seed), **{**TINY, "seed": seed})
    first, second = (set(contents(tmp_path / str(seed)).values()) for seed in (0, 1))
    assert not first & second


def test_a_complete_folder_is_left_alone(tmp_path, monkeypatch):
    generate(tmp_path / "people", **TINY)
    monkeypatch.setattr(module, "_write_all", pytest.fail)
    generate(tmp_path / "people", **TINY, num_workers=7)


def test_a_folder_with_other_parameters_is_rejected(tmp_path):
    root = tmp_path / "people"
    generate(root, **TINY)
    before = contents(root)
    with refused(DataError, "DATASETS.ROOT_DIR", str(root), "'seed': 5", "'seed': 0"):
        generate(root, **{**TINY, "seed": 5})
    assert contents(root) == before


def test_an_older_format_is_rejected(tmp_path, monkeypatch):
    generate(tmp_path, **TINY)  # an empty folder is as good as none
    monkeypatch.setattr(module, "FORMAT_VERSION", module.FORMAT_VERSION + 1)
    with refused(DataError, "DATASETS.ROOT_DIR", str(tmp_path), "format_version"):
        generate(tmp_path, **TINY)


@pytest.mark.parametrize("name", ["holiday.jpg", MANIFEST])
def test_a_foreign_folder_is_rejected_and_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with refused(DataError, "DATASETS.ROOT_DIR", str(tmp_path), MANIFEST):
        generate(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("changed", [{"num_cameras": 1}, {"images_per_pid": 3}, {"num_test_pids": 0}, {"seed": -1}])
def test_too_small_a_number_is_rejected(tmp_path, changed):
    ((name, value),) = changed.items()
    with refused(SettingsError, f"DATASETS.SYNTHETIC.{name.upper()}", name, f"got {value}"):
        generate(tmp_path / "people", **{**TINY, **changed})


@pytest.mark.parametrize(
    ("interruption", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space"), WorldError)],
)
def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, interruption, raised):
    def fail_at_the_fifth(root, seed, shot):
        if len(list(root.rglob("*.jpg"))) == 4:
            raise interruption
        (root / shot.file).touch()

    monkeypatch.setattr(module, "_write", fail_at_the_fifth)
    with pytest.raises(raised):
        generate(tmp_path / "people", **TINY)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with refused(WorldError, "DATASETS.ROOT_DIR", "file/people", "1 MB", "Not a directory"):
        generate(tmp_path / "file" / "people", **TINY)


def test_a_killed_generation_is_not_taken_for_a_complete_one(tmp_path):
    process = start(tmp_path / "people", "num_train_pids=1000")
    while not list(tmp_path.rglob("*.jpg")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "people").exists()
    generate(tmp_path / "people", **TINY)
    assert (tmp_path / "people" / MANIFEST).exists()


@pytest.mark.parametrize("theirs", [TINY, {**TINY, "seed": 5}])
def test_the_faster_process_wins(tmp_path, monkeypatch, theirs):
    root, write_all = tmp_path / "people", module._write_all

    def be_overtaken(*arguments):
        monkeypatch.undo()
        generate(root, **theirs)
        write_all(*arguments)

    monkeypatch.setattr(module, "_write_all", be_overtaken)
    with nullcontext() if theirs == TINY else refused(DataError, "DATASETS.ROOT_DIR", str(root), "'seed': 5"):
        generate(root, **TINY)
    assert json.loads((root / MANIFEST).read_text())["seed"] == theirs["seed"]
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


def test_two_processes_may_generate_at_once(benchmark_root, tmp_path):
    arguments = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    processes = [start(tmp_path / "people", arguments) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert contents(tmp_path / "people") == contents(benchmark_root)
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


def pixels(image):
    values = np.asarray(image.resize((16, 32)), dtype=np.float64).ravel()
    return (values - values.mean()) / values.std()


def color_histogram(image):
    levels = np.asarray(image, dtype=int) // 64
    counts = np.bincount((levels @ [16, 4, 1]).ravel(), minlength=64)
    return np.sqrt(counts)


def mean_average_precision(root, describe):
    """Market-1501's protocol by its definition, for a hand-made feature under cosine similarity."""

    def described(file):
        with Image.open(file) as image:
            return describe(image)

    def load(folder):
        kept = {file: label for file, label in labels(root / folder).items() if label[0] != -1}
        features = np.stack([described(file) for file in kept])
        return features / np.linalg.norm(features, axis=1, keepdims=True), np.array(list(kept.values()))

    (q_features, q_labels), (g_features, g_labels) = load(QUERY), load(GALLERY)
    precisions = []
    for feature, (pid, camid) in zip(q_features, q_labels, strict=True):
        order = np.argsort(-(g_features @ feature), kind="stable")
        same_pid, same_camera = (g_labels[order] == (pid, camid)).T
        hits = np.flatnonzero(same_pid[~(same_pid & same_camera)]) + 1
        precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
    return np.mean(precisions)


@pytest.mark.parametrize(("describe", "easiest"), [(pixels, 0.3), (color_histogram, 0.25)])
def test_hand_made_features_do_not_solve_it(benchmark_root, describe, easiest):
    assert mean_average_precision(benchmark_root, describe) < easiest


def test_identity_is_visible_across_cameras(benchmark_root):
    draws = np.random.default_rng(0)
    chance = mean_average_precision(benchmark_root, lambda image: draws.normal(size=8))
    assert mean_average_precision(benchmark_root, pixels) > 1.2 * chance


def test_the_manifest_names_the_parameters(benchmark_root):
    assert json.loads((benchmark_root / MANIFEST).read_text()) == {"format_version": module.FORMAT_VERSION, **SMALL}
