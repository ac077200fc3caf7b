"""Batches have the images, labels and draws of their plan, with and without prefetching.

Also covers reid.data.prefetch.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from program import TIMEOUT
from refusals import refused

from reid.config.load import load_config
from reid.data import augment
from reid.data.benchmarks.splits import Benchmark, Split
from reid.data.datasets import open_data_sets
from reid.data.loaders import BatchLoader, StoredImages, build_test_data, build_train_data
from reid.data.preprocessing import BatchPreprocessor
from reid.data.samplers import EvaluationBatches, PlannedBatch, TrainBatches
from reid.data.store import decode
from reid.errors import DataError

SIZE = (8, 8)


def numbered(first: int, number: int) -> np.ndarray:
    """Return images [number, 2, 1, 3] that are filled with their numbers."""
    return np.arange(first, first + number, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 1, 3), np.uint8)


def planned(ids, epoch=1, positions=None):
    ids = np.array(ids, dtype=np.int64)
    return PlannedBatch(epoch, ids, ids if positions is None else np.array(positions, dtype=np.int64))


# ---- one batch ----


def test_images_are_gathered_across_stores_in_requested_order():
    dataset = StoredImages([numbered(0, 3), numbered(3, 1), numbered(4, 5)], np.arange(9) * 10, None)
    batch = dataset.batch(planned([8, 0, 3, 2, 4, 0]))
    assert torch.equal(batch.images[:, 0, 0, 0], torch.tensor([8, 0, 3, 2, 4, 0], dtype=torch.uint8))
    assert torch.equal(batch.images, batch.images[:, :1, :1, :1].expand(6, 2, 1, 3))
    assert batch.pids.tolist() == [80, 0, 30, 20, 40, 0]
    assert batch.sample_ids.tolist() == [8, 0, 3, 2, 4, 0]
    assert batch.drawn.shape == (6, 0)


def test_random_draws_depend_on_plan_position_not_on_image():
    recipe = augment.Recipe(size=SIZE, flip_probability=0.5, padding=2, erasing_probability=0.5, seed=1)
    dataset = StoredImages([numbered(0, 9)], np.arange(9), recipe)
    one, other = (dataset.batch(planned(ids, 3, [20, 21])) for ids in ([0, 1], [7, 7]))
    assert torch.equal(one.drawn, other.drawn)
    assert torch.equal(one.drawn, augment.draw(recipe, 3, np.array([20, 21])))
    assert not torch.equal(one.drawn, dataset.batch(planned([0, 1], 4, [20, 21])).drawn)


def test_gathering_releases_the_interpreter_lock(monkeypatch):
    """No thread has to give the lock up here; an operation that keeps it shows no other thread its middle."""
    dataset, take = StoredImages([np.zeros((64, 512, 512, 3), np.uint8)], np.arange(64), None), np.take
    inside, is_outside, seen = threading.Event(), threading.Event(), []

    def observed(*args, **options):
        inside.set()
        take(*args, **options)
        is_outside.set()

    monkeypatch.setattr(np, "take", observed)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        for _ in range(50):  # the scheduler may wake this thread too late
            inside.clear()
            is_outside.clear()
            thread = threading.Thread(target=dataset.images, args=(np.arange(64),))
            thread.start()
            inside.wait()
            seen.append(is_outside.is_set())
            thread.join()
            if not seen[-1]:
                break
    finally:
        sys.setswitchinterval(before)
    assert not seen[-1]


# ---- loading ahead ----


class Numbers:
    """A data set whose batches are the numbers that are planned; for number 3 it does something else."""

    def __init__(self, fourth=lambda: None):
        self._fourth, self.loaded = fourth, []

    def batch(self, number, *, pin_memory):
        assert not pin_memory
        if number == 3:
            self._fourth()
        self.loaded.append(number)
        return number


def numbers(dataset, *, prefetch=True):
    return BatchLoader(dataset, range(6), prefetch=prefetch, pin_memory=False)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_for(lambda: not loader_threads())


@pytest.mark.parametrize("prefetch", [False, True])
def test_batches_come_in_order_again_and_again(prefetch):
    loader = numbers(Numbers(), prefetch=prefetch)
    assert len(loader) == 6
    assert [list(loader) for _ in range(3)] == 3 * [list(range(6))]


def test_the_thread_is_two_batches_ahead():
    dataset = Numbers()
    received = iter(numbers(dataset))
    assert dataset.loaded == []
    for number in range(3):
        assert next(received) == number
        wait_for(lambda: len(dataset.loaded) >= number + 3)  # noqa: B023  # called at once
        time.sleep(0.01)
        assert dataset.loaded == list(range(number + 3))
    received.close()


def test_without_prefetching_a_batch_is_loaded_when_asked_for():
    dataset = Numbers()
    assert next(iter(numbers(dataset, prefetch=False))) == 0
    assert dataset.loaded == [0]


class OwnError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [OwnError("of the data set"), ZeroDivisionError("too"), MemoryError()])
@pytest.mark.parametrize("prefetch", [False, True])
def test_an_error_of_the_data_set_comes_in_its_turn(prefetch, error):
    def fail():
        raise error

    received = iter(numbers(Numbers(fail), prefetch=prefetch))
    assert [next(received) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as raised:
        next(received)
    assert raised.value is error


def test_an_abandoned_pass_ends_its_thread_and_harms_no_other():
    loader = numbers(Numbers())
    for number in loader:
        if number == 1:
            break
    wait_for(lambda: not loader_threads())
    iter(loader)
    assert list(loader) == list(range(6))


def test_a_signal_handler_that_raises_ends_a_wait():
    is_over = threading.Event()
    received = iter(numbers(Numbers(is_over.wait)))

    def stop(number, frame):
        raise OwnError

    before = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(OwnError):
            list(received)
    finally:
        signal.signal(signal.SIGUSR1, before)
        is_over.set()


def test_a_pass_keeps_the_position_that_it_started_at(folder, benchmark):
    data = build_train_data(settings(folder, "DATALOADER.NUM_WORKERS=1"), [benchmark])
    data.batches.set_position(epoch=3, step=1)
    started = iter(data.loader)
    data.batches.set_position(epoch=4, step=0)
    third, fourth = batches(started), batches(data.loader)
    data.batches.set_position(epoch=3, step=1)
    assert equal(third, batches(data.loader))
    assert equal(third, batches(data.loader))  # a pass moves no position
    assert len(fourth) == len(third) + 1


KEEPS_AN_ITERATOR = """
import sys
from reid.data.loaders import BatchLoader
from reid.commands.main import exit_process

class Numbers:
    def batch(self, number, *, pin_memory):
        return number

kept = iter(BatchLoader(Numbers(), range(1000), prefetch=True, pin_memory=False))
print(next(kept))
if sys.argv[1] == "exit_process":
    exit_process(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit_process", "return"])
def test_program_exits_in_the_middle_of_a_pass(how):
    command = [sys.executable, "-c", KEEPS_AN_ITERATOR, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


# ---- the loaders of a benchmark ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loaders")


def settings(folder: Path, *overrides: str):
    sizes = ["NUM_TRAIN_PIDS=8", "NUM_TEST_PIDS=4", "IMAGES_PER_PID=6"]
    return load_config(
        None,
        [
            *("DATASETS.NAMES=synthetic", f"DATASETS.ROOT_DIR={folder}/data", f"DATASETS.CACHE_DIR={folder}/cache"),
            *(f"DATASETS.SYNTHETIC.{size}" for size in sizes),
            *("INPUT.SIZE_TRAIN=(32,16)", "INPUT.SIZE_TEST=(16,8)", "INPUT.PADDING=2", "MODEL.DEVICE=cpu"),
            *("SOLVER.IMS_PER_BATCH=16", "TEST.IMS_PER_BATCH=7", "DATALOADER.NUM_WORKERS=0"),
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def benchmark(folder) -> Benchmark:
    return open_data_sets(settings(folder), train=True).train[0]


def batches(loader) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(batch) for batch in loader]


def equal(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("num_workers", [1, 8])
def test_prefetching_changes_no_batch_of_several_epochs(folder, benchmark, num_workers):
    def loaded(number: int):
        cfg = settings(folder, f"DATALOADER.NUM_WORKERS={number}")
        train, test = build_train_data(cfg, [benchmark]), build_test_data(cfg, benchmark)
        epochs = []
        for epoch in (2, 3, 4):
            train.batches.set_position(epoch, step=0)
            epochs.append(batches(train.loader))
        return [*epochs, batches(test.loader)]

    expected = loaded(0)
    assert all(equal(*pair) for pair in zip(loaded(num_workers), expected, strict=True))
    assert not equal(*expected[:2])
    assert all(len(part) >= 2 for part in expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_epoch_resumed_after_a_step_yields_the_remaining_batches(folder, benchmark, num_workers):
    data = build_train_data(settings(folder, f"DATALOADER.NUM_WORKERS={num_workers}"), [benchmark])
    data.batches.set_position(epoch=3, step=0)
    complete = batches(data.loader)
    data.batches.set_position(epoch=3, step=1)
    assert equal(batches(data.loader), complete[1:])
    data.batches.set_position(epoch=4, step=0)
    assert not equal(batches(data.loader), complete)


def test_two_ranks_together_load_what_one_loads(folder, benchmark):
    data = build_train_data(settings(folder), [benchmark])
    dataset, plan = data.images, data.batches._plan
    parts = [TrainBatches(plan, rank=rank, num_ranks=2) for rank in (0, 1)]
    for batch, *shares in zip(data.loader, *parts, strict=True):
        loaded = [dataset.batch(share) for share in shares]
        assert equal([batch], [tuple(torch.cat(tensors) for tensors in zip(*loaded, strict=True))])


def test_training_batch_has_pixels_and_pid_of_its_image_file(folder, benchmark):
    batch = next(iter(build_train_data(settings(folder), [benchmark]).loader))
    for image, pid, number in zip(batch.images, batch.pids, batch.sample_ids, strict=True):
        pixels = np.frombuffer(decode(benchmark.train.paths[number], (32, 16)), np.uint8).reshape(32, 16, 3)
        assert np.array_equal(image.numpy(), pixels)
        assert pid == benchmark.train.pids[number]


def test_every_test_image_comes_once_queries_first(folder, benchmark):
    data = build_test_data(settings(folder), benchmark)
    ids = torch.cat([batch.sample_ids for batch in data.loader])
    pids = torch.cat([batch.pids for batch in data.loader])
    assert ids.tolist() == list(range(len(benchmark.query) + len(benchmark.gallery)))
    assert pids.tolist() == [*benchmark.query.pids, *benchmark.gallery.pids]
    assert data.query.pids.tolist() == benchmark.query.pids.tolist()
    assert data.gallery.camids.tolist() == benchmark.gallery.camids.tolist()
    assert {batch.images.shape[1:] for batch in data.loader} == {(16, 8, 3)}


def test_ranks_share_test_images_in_complete_batches():
    parts = [EvaluationBatches(20, batch_size=7, rank=rank, num_ranks=2) for rank in (0, 1)]
    ids = [batch.sample_ids.tolist() for part in parts for batch in part]
    assert ids == [list(range(7)), list(range(7, 14)), list(range(14, 20))]


# ---- refused ----


def test_too_few_identities_error_suggests_valid_batch_size(folder, benchmark):
    cfg = settings(folder, "SOLVER.IMS_PER_BATCH=40")
    with refused(DataError, "SOLVER.IMS_PER_BATCH", "got 40", "8 training identities", "IMS_PER_BATCH to 32"):
        build_train_data(cfg, [benchmark])


def test_too_few_images_for_a_batch_error_names_the_setting(folder, benchmark):
    cfg = settings(folder, "SOLVER.IMS_PER_BATCH=4000", "DATALOADER.SAMPLER=softmax")
    num_images = len(benchmark.train)
    with refused(DataError, "SOLVER.IMS_PER_BATCH", "got 4000", f"{num_images} training images", "Fix: lower"):
        build_train_data(cfg, [benchmark])


def test_an_image_that_changes_makes_a_new_store(folder, benchmark, tmp_path):
    paths = tuple(tmp_path / path.name for path in benchmark.train.paths)
    for old, new in zip(benchmark.train.paths, paths, strict=True):
        new.write_bytes(old.read_bytes())
    train = Split(paths, benchmark.train.pids, benchmark.train.camids)
    moved = Benchmark("moved", tmp_path, train, benchmark.query, benchmark.gallery)
    before = batches(build_train_data(settings(folder), [moved]).loader)
    number = int(before[0][2][0])
    paths[number].write_bytes(paths[number - 1].read_bytes())
    after = batches(build_train_data(settings(folder), [moved]).loader)
    assert not torch.equal(before[0][0][0], after[0][0][0])


# ---- all images on the device ----


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_the_same_with_all_images_on_the_device(folder, benchmark, num_workers):
    cfg = settings(folder, f"DATALOADER.NUM_WORKERS={num_workers}")
    cached_cfg = settings(folder, f"DATALOADER.NUM_WORKERS={num_workers}", "DATASETS.DEVICE_CACHE=on")
    usual, cached = build_train_data(cfg, [benchmark, benchmark]), build_train_data(cached_cfg, [benchmark, benchmark])
    assert usual.on_device is None
    assert cached.on_device.shape == (2 * len(benchmark.train), 32, 16, 3)
    device = torch.device("cpu")
    preprocessors = BatchPreprocessor(cfg, device), BatchPreprocessor(cfg, device, cached.on_device)
    assert len(usual.loader) == len(cached.loader) > 1
    for one, other in zip(usual.loader, cached.loader, strict=True):
        assert other.images.shape == (0, 32, 16, 3)
        assert torch.equal(one.pids, other.pids)
        expected, got = (way.for_training(batch) for way, batch in zip(preprocessors, (one, other), strict=True))
        assert torch.equal(got, expected)


# ---- DATASETS.NODE_LOCAL_DIR ----


def loaded_through(folder, benchmark, local_dir):
    """Return the batches of both loaders, and the memory map of the process with their files."""
    cfg = settings(folder, f"DATASETS.NODE_LOCAL_DIR={local_dir}")
    train, test = build_train_data(cfg, [benchmark]), build_test_data(cfg, benchmark)
    train.batches.set_position(epoch=2, step=0)
    opened = Path("/proc/self/maps").read_text()
    return (batches(train.loader), batches(test.loader)), opened


def test_images_are_read_from_local_copy_removed_at_exit(folder, benchmark, tmp_path, monkeypatch):
    expected, opened = loaded_through(folder, benchmark, "")
    assert f"{folder}/cache" in opened
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    leftover = tmp_path / "x.npy.0.partial"  # of a process that was killed
    leftover.touch()
    loaded, opened = loaded_through(folder, benchmark, "$SCRATCH/below")
    loaded_through(folder, benchmark, "$SCRATCH")
    assert all(equal(a, b) for a, b in zip(loaded, expected, strict=True))
    assert opened.count(f"{tmp_path}/below") == 3  # stores
    assert [file.name for file in tmp_path.iterdir()] == ["below"]
    assert list((tmp_path / "below").iterdir()) == []


@pytest.mark.parametrize("local_dir", ["$NOT_SET_HERE", "$NOT_SET_HERE/reid"])
def test_without_the_variable_nothing_is_copied(folder, benchmark, local_dir):
    _, opened = loaded_through(folder, benchmark, local_dir)
    assert f"{folder}/cache" in opened
    assert not Path(local_dir).exists()


def test_a_copy_that_cannot_be_made_costs_a_warning(folder, benchmark, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reid"), "propagate", True)
    (tmp_path / "file").touch()
    _, opened = loaded_through(folder, benchmark, f"{tmp_path}/file")
    assert f"{folder}/cache" in opened
    warning = f"warning: DATASETS.NODE_LOCAL_DIR={tmp_path}/file on "
    assert caplog.text.count(warning) == 3
    assert "images are read from DATASETS.CACHE_DIR there" in caplog.text
