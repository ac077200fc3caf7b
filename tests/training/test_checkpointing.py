"""Checkpoints: retention, rejection and damage; none is ever half written.

Also covers reid.checkpoints.save, reid.runs.progress.
"""

import io
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from program import same
from refusals import refused
from torch import nn

from reid.checkpoints.save import checkpoints_in, host_copy, save_atomically
from reid.checkpoints.weights import read_file
from reid.config.load import load_config
from reid.errors import NonFiniteError, UnsavedError, WorldError
from reid.runs.progress import Progress, Records
from reid.training.checkpointing import Checkpoints, _differences
from reid.training.meters import TrainMeter

DATASET = "a fingerprint"


class Training:
    """An engine of two steps an epoch whose model counts them, validated with the scores given, one an epoch."""

    def __init__(self, folder, *overrides, dataset=DATASET, scores=()):
        self.cfg = load_config(None, ["SOLVER.MAX_EPOCHS=3", f"OUTPUT_DIR={folder}", *overrides])
        self.model = nn.Linear(2, 2)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scaler, self.meter = None, TrainMeter(log_period=9, batch_size=1, optimizer=self.optimizer)
        self.progress = Progress()
        self.engine = Engine(self._step)
        self.engine.register_events(*Records)
        self.checkpoints = Checkpoints(self.cfg, folder, dataset, self, self.progress)
        scores = iter(scores)

        @self.engine.on(Events.EPOCH_COMPLETED)
        def validate(engine):
            for score in scores:
                self.progress.add_validation(engine.state.epoch, engine.state.iteration, {"mAP": score})
                engine.fire_event(Records.VALIDATION)
                return

        self.checkpoints.attach(self.engine)

    def _step(self, engine, batch):
        self.model.weight.data += 1

    def run(self):
        try:
            self.engine.run([0, 1], max_epochs=self.cfg.SOLVER.MAX_EPOCHS)
        finally:
            self.checkpoints.finish()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# ---- which are kept ----


def test_the_last_two_and_the_best_are_kept(tmp_path):
    Training(tmp_path, scores=[0.2, 0.5, 0.4]).run()
    assert names(tmp_path) == ["best_0002_mAP_0.5000.pt", "last_0002_00000004.pt", "last_0003_00000006.pt"]


def test_of_equally_good_ones_the_first_is_the_best(tmp_path):
    Training(tmp_path, scores=[0.5, 0.5, 0.5]).run()
    assert [file.name for file in checkpoints_in(tmp_path, "best")] == ["best_0001_mAP_0.5000.pt"]


def test_they_are_written_every_few_epochs_and_after_the_last(tmp_path):
    Training(tmp_path, "SOLVER.CHECKPOINT_PERIOD=2").run()
    assert names(tmp_path) == ["last_0002_00000004.pt", "last_0003_00000006.pt"]


def test_age_is_counted_in_epochs_and_not_in_letters(tmp_path):
    for name in ("last_9999_1.pt", "last_10000_2.pt", "last_0100_3.pt", "best_0001_mAP_0.1.pt", "last_x.pt.tmp"):
        (tmp_path / name).touch()
    assert [file.name for file in checkpoints_in(tmp_path, "last")] == [
        *("last_0100_3.pt", "last_9999_1.pt", "last_10000_2.pt")
    ]


def test_the_best_holds_weights_and_scores_but_no_optimizer(tmp_path):
    Training(tmp_path, scores=[0.5]).run()
    content = torch.load(tmp_path / "best_0001_mAP_0.5000.pt", weights_only=True)
    assert content["validation"] == {"epoch": 1, "iteration": 2, "mAP": 0.5}
    assert torch.equal(content["model"]["weight"], torch.full((2, 2), 2.0))
    assert "optimizer" not in content


# ---- resuming ----


def test_resume_restores_weights_position_and_best_score(tmp_path):
    Training(tmp_path, scores=[0.5, 0.1, 0.1]).run()
    resumed = Training(tmp_path, "SOLVER.MAX_EPOCHS=5", scores=[0.3, 0.7])
    assert resumed.checkpoints.resume(resumed.engine)
    assert torch.equal(resumed.model.weight, torch.full((2, 2), 6.0))
    assert resumed.engine.state.iteration == 6
    assert resumed.progress.best == {"epoch": 1, "iteration": 2, "mAP": 0.5}
    resumed.run()
    assert torch.equal(resumed.model.weight, torch.full((2, 2), 10.0))
    assert [file.name for file in checkpoints_in(tmp_path, "best")] == ["best_0005_mAP_0.7000.pt"]


def test_training_starts_from_scratch_without_checkpoint(tmp_path):
    fresh = Training(tmp_path)
    assert not fresh.checkpoints.resume(fresh.engine)
    assert fresh.engine.state.iteration == 0


def assert_no_resume(training, *keywords):
    with refused(WorldError, "OUTPUT_DIR", *keywords):
        training.checkpoints.resume(training.engine)


def test_another_configuration_is_rejected_with_both_values(tmp_path):
    Training(tmp_path).run()
    other = Training(tmp_path, "SOLVER.BASE_LR=0.5", "MODEL.NAME=resnet18")
    values = ("MODEL.NAME", "'resnet50'", "'resnet18'", "SOLVER.BASE_LR", "0.00035", "0.5")
    assert_no_resume(other, f"{tmp_path}/last_0003_00000006.pt", *values)


def test_another_data_set_is_rejected(tmp_path):
    Training(tmp_path).run()
    assert_no_resume(Training(tmp_path, dataset="another"), "last_0003_00000006.pt", "images of the benchmark")


def test_settings_that_do_not_change_what_is_learnt_may_differ(tmp_path):
    Training(tmp_path).run()
    free = ["MODEL.DEVICE=cpu", "DATASETS.ROOT_DIR=x", "SOLVER.EVAL_PERIOD=1", "TEST.FEAT_NORM=no", "WANDB.NAME=x"]
    resumed = Training(tmp_path, "SOLVER.MAX_EPOCHS=9", *free)
    assert resumed.checkpoints.resume(resumed.engine)


def test_a_setting_that_one_of_the_two_lacks_is_a_difference():
    first, second = _differences({"A": {"B": 1}, "C": 2}, {"A": {"B": 1, "D": 3}})
    assert re.fullmatch(r"A\.D\b.*None.*3", first)
    assert re.fullmatch(r"C\b.*2.*None", second)


def test_another_format_is_rejected(tmp_path):
    torch.save({"format": 99}, tmp_path / "last_0001_00000002.pt")
    assert_no_resume(Training(tmp_path), "last_0001_00000002.pt", "format")


# ---- the copy in host memory ----


def test_host_copy_reuses_earlier_buffers_but_never_live_tensors():
    content = {"model": {"a": torch.ones(3, 2), "b": torch.ones(2)}, "rates": [0.1, torch.tensor(1)], "name": "x"}
    first = host_copy(content)
    content["model"] = {"a": torch.full((3, 2), 2.0), "b": torch.full((5,), 2.0), "c": torch.zeros(1)}
    content["rates"] = [0.2, torch.tensor(2)]
    addresses = first["model"]["a"].data_ptr(), first["rates"][1].data_ptr()
    second = host_copy(content, first)
    assert same(second, content)
    assert (second["model"]["a"].data_ptr(), second["rates"][1].data_ptr()) == addresses
    assert second["model"]["a"].data_ptr() != content["model"]["a"].data_ptr()
    content["model"]["a"].zero_()
    assert torch.equal(second["model"]["a"], torch.full((3, 2), 2.0))


def test_host_buffer_is_reused_and_each_file_holds_its_step(tmp_path):
    training = Training(tmp_path, scores=[0.1, 0.2, 0.3])
    addresses = set()

    @training.engine.on(Events.EPOCH_COMPLETED)
    def note(engine):
        addresses.add(training.checkpoints._copied["model"]["weight"].data_ptr())

    training.run()
    assert len(addresses) == 1
    weights = [
        float(read_file(file, "OUTPUT_DIR")["model"]["weight"][0, 0]) for file in checkpoints_in(tmp_path, "last")
    ]
    assert weights == [4.0, 6.0]


# ---- damaged ones ----


def cut_off(content: bytes) -> bytes:
    return content[:-100]


def emptied(content: bytes) -> bytes:
    return b""


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip_in_a_tensor(content: bytes) -> bytes:
    return flip(content, 8 * content.index(np.full(4, 6.0, np.float32).tobytes()))  # the weights after six steps


@pytest.mark.parametrize("damage", [cut_off, emptied, flip_in_a_tensor])
def test_damaged_checkpoint_falls_back_to_previous_with_warning(tmp_path, caplog, damage):
    Training(tmp_path).run()
    file = tmp_path / "last_0003_00000006.pt"
    file.write_bytes(damage(file.read_bytes()))
    training = Training(tmp_path)
    assert training.checkpoints.resume(training.engine)
    assert training.engine.state.iteration == 4
    assert torch.equal(training.model.weight, torch.full((2, 2), 4.0))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{file} is damaged" in warning
    assert f"{tmp_path}/last_0002_00000004.pt" in warning
    training.run()
    assert names(tmp_path) == [
        *("last_0002_00000004.pt", "last_0003_00000006.pt", "last_0003_00000006.pt.damaged"),
    ]


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_is_ever_taken_for_training(tmp_path, data):
    """Accept a flipped bit only where nothing is stored."""
    for leftover in tmp_path.iterdir():
        leftover.unlink()
    Training(tmp_path, "SOLVER.CHECKPOINT_PERIOD=9").run()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    before = read_file(file, "OUTPUT_DIR")
    file.write_bytes(flip(content, data.draw(st.integers(0, 8 * len(content) - 1))))
    try:
        after = read_file(file, "OUTPUT_DIR")
    except WorldError:
        return
    assert str(after) == str(before)


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(tmp_path):
    Training(tmp_path).run()
    for file in tmp_path.iterdir():
        file.write_bytes(b"nothing")
    assert_no_resume(Training(tmp_path), f"{tmp_path}/last_0003_00000006.pt", "damaged")


# ---- never half written, never broken ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value):
    training = Training(tmp_path)
    training.engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: training.model.weight.fill_(value))
    with torch.no_grad(), refused(NonFiniteError, "SOLVER.BASE_LR", "1 of 2", "(weight"):
        training.run()
    assert names(tmp_path) == ["last_0001_00000002.pt"]


class FullDisk:
    """No file may grow beyond 1 kB: the same calls fail as on a full disk, with "File too large".

    Free at the end of its block, before pytest itself writes the test's result into a file.
    """

    def __init__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.free()

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, self._before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_full_disk_keeps_the_existing_file_and_no_partial_file(tmp_path):
    file = tmp_path / "last_0001_00000002.pt"
    file.write_bytes(b"complete")
    with FullDisk() as disk:
        disk.fill()
        with refused(WorldError, "OUTPUT_DIR", str(file), "File too large"):
            save_atomically(file, {"model": torch.zeros(10_000)})
    assert file.read_bytes() == b"complete"
    assert names(tmp_path) == [file.name]


def test_full_disk_gives_a_warning_and_training_continues(tmp_path, caplog):
    training, disk = Training(tmp_path, scores=[0.1, 0.2, 0.3]), FullDisk()
    training.engine.add_event_handler(Events.EPOCH_STARTED(once=2), training.checkpoints._wait)
    training.engine.add_event_handler(Events.EPOCH_STARTED(once=2), disk.fill)
    training.engine.add_event_handler(Events.EPOCH_STARTED(once=3), training.checkpoints._wait)
    training.engine.add_event_handler(Events.EPOCH_STARTED(once=3), disk.free)
    with disk:
        training.run()
    assert names(tmp_path) == ["best_0003_mAP_0.3000.pt", "last_0001_00000002.pt", "last_0003_00000006.pt"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [re.search("(best|last)_0002", warning)[1] for warning in warnings] == ["best", "last"]
    assert all(f"{tmp_path}/last_0001_00000002.pt" in warning for warning in warnings)


def test_disk_still_full_at_the_end_raises_unsaved_error(tmp_path):
    training, disk = Training(tmp_path, scores=[0.1, 0.2, 0.3]), FullDisk()
    training.engine.add_event_handler(Events.EPOCH_STARTED(once=3), training.checkpoints._wait)
    training.engine.add_event_handler(Events.EPOCH_STARTED(once=3), disk.fill)
    unsaved, newest = ("best_0003_mAP_0.3000.pt", "last_0003_00000006.pt"), f"{tmp_path}/last_0002_00000004.pt"
    with disk, refused(UnsavedError, "OUTPUT_DIR", *unsaved, newest):
        training.run()
    assert names(tmp_path) == ["best_0002_mAP_0.2000.pt", "last_0001_00000002.pt", "last_0002_00000004.pt"]


def test_ctrl_c_while_it_is_written_stays_what_it_is(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, content):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", lambda file, mode: Interrupted(file, "w"))
    with pytest.raises(KeyboardInterrupt):
        save_atomically(tmp_path / "last_0001_00000002.pt", {"model": torch.zeros(3)})
    assert names(tmp_path) == []


def test_process_killed_while_writing_leaves_no_checkpoint(tmp_path):
    file = tmp_path / "last_0001_00000002.pt"
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: os._exit(1)
        save_atomically(file, {"model": 1})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert checkpoints_in(tmp_path, "last") == []
