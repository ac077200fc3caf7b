"""TensorBoard files: the same numbers as elsewhere, once each, whatever interrupts the run; and with W&B."""

import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
from disturbances import at_step, kill_self_when, signal_self
from program import Ended, Place, names, records

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ON = ("LOG.TENSORBOARD", "yes")


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> steps and values, as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_has_every_record_once(folder: Path) -> None:
    shown = scalars(folder)
    for kind, name in (("train", "loss"), ("train", "lr"), ("val", "mAP"), ("val", "rank-1")):
        expected = [(record["iteration"], record[name]) for record in records(folder, kind)]
        written = shown[f"{kind}/{name.replace('rank-', 'cmc_rank_')}"]
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected], rel=1e-6)


# ---- with W&B, which copies it ----


@pytest.fixture(scope="module")
def both(place) -> tuple[Ended, Path]:
    settings = ("OUTPUT_DIR", "both", *ON, "WANDB.ENABLE", "yes", "WANDB.SYNC_TENSORBOARD", "yes")
    return place.train(*settings, num_ranks=2), place.folder / "both"


def test_tensorboard_has_every_record_in_one_file(both):
    ended, folder = both
    assert ended.err == ""
    assert "warning" not in ended.out
    assert len(names(folder / "tensorboard")) == 1
    assert_has_every_record_once(folder)


def test_tensorboard_uses_wandb_names_and_is_synced_to_wandb(place, both):
    folder = both[1]
    history = [record["history"]["item"] for record in place.wandb_records(folder) if record["type"] == "history"]
    numbers = ("train/loss", "val/mAP")  # pictures and tables have other rows
    ours = [row for row in history if "global_step" not in row and any(name in row for name in numbers)]
    copied = [row for row in history if "global_step" in row]
    for kind, axis in (("train", "iteration"), ("val", "epoch")):
        rows = [row for row in ours if any(name.startswith(f"{kind}/") for name in row)]
        assert [row[axis] for row in rows] == [record[axis] for record in records(folder, kind)]
    shown = scalars(folder)
    assert set(shown) == {name for row in ours for name in row if name.startswith(("train/", "val/"))}
    for name, values in shown.items():
        rows = [row for row in copied if f"tensorboard/{name}" in row]
        assert [row["global_step"] for row in rows] == [step for step, _ in values]
        assert [row[f"tensorboard/{name}"] for row in rows] == pytest.approx([value for _, value in values])


# ---- interrupted ----


@pytest.mark.slow
def test_every_step_is_recorded_once_after_kills_and_resumes(place):
    folder = place.folder / "tb_killed"
    settings = ("OUTPUT_DIR", folder.name, *ON, "SOLVER.MAX_EPOCHS", 3, "SOLVER.CHECKPOINT_PERIOD", 2)
    kill = partial(signal_self, signal.SIGKILL)
    kill_after_checkpoint = partial(kill_self_when, f"{folder.name}/checkpoints/last_0002_*.pt")
    for before in (partial(at_step, 3, kill), partial(at_step, 6, kill_after_checkpoint)):
        (ended,) = place.run("train", *settings, before=before)
        assert ended.code == -signal.SIGKILL
    place.train(*settings)
    assert len(names(folder / "tensorboard")) == 3
    assert_has_every_record_once(folder)


# ---- not to be had ----


def no_tensorboard() -> None:
    """Hide the package, as if the extra was not installed; called before the program starts."""
    sys.modules["tensorboard"] = None  # type: ignore[assignment]


def test_without_the_package_the_extra_is_named(place):
    message = place.refusal("train", "OUTPUT_DIR", "tb_none", *ON, num_ranks=2, code=2, before=no_tensorboard)
    assert "LOG.TENSORBOARD" in message
    assert "uv sync --extra tensorboard" in message
