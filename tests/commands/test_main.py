"""What a user reads when something is wrong: one sentence on stderr, once for all ranks, and an exit code."""

import os
import re
import shutil
import signal
import sys
from functools import partial
from importlib.metadata import version

import pytest
from program import EVALUATE, TRAIN, Ended, Place, first_rank_is_slow, free_port, torchvision_is_of_another_torch

from reid.commands.main import PREEMPTED, explain_import_error
from reid.errors import WorldError


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


# ---- wrong settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["SOLVER.BASELR", "1"], ["SOLVER.BASELR ", "command line", "SOLVER.BASE_LR?"]),
        (["SOLVER.MAX_EPOCHS"], ["SOLVER.MAX_EPOCHS=VALUE"]),
        (["SOLVER.MAX_EPOCHS", "many"], ["SOLVER.MAX_EPOCHS", "'many'"]),
        (["--epochs", "3"], ["arguments: --epochs"]),
        (["--config_file"], ["argument --config_file", "expected one"]),
        (["--config_file", "gone.yml"], ["gone.yml", "--config_file"]),
        (["--config_file", "."], ["Is a directory", "--config_file"]),
        (["--config_file", "bad.yml"], ["bad.yml", "line 3, column 1"]),
        (["SOLVER.IMS_PER_BATCH", "12", "DATALOADER.NUM_INSTANCE", "4"], ["SOLVER.IMS_PER_BATCH", "2 ranks", "1, 3"]),
    ],
)
def test_invalid_command_gives_one_sentence_and_exit_code_2(place, settings, words):
    (place.folder / "bad.yml").write_text("SOLVER:\n  STEPS: [1, 2\n")
    said = place.refusal("train", *settings, num_ranks=2, bare=True, code=2)
    assert all(part in said for part in words), said


def test_settings_are_answered_without_importing_torch(place):
    code = (
        "import atexit, runpy, sys\n"
        f"sys.argv = [{str(TRAIN)!r}, 'SOLVER.MAX_EPOCHS', '0']\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    ended = place.command(sys.executable, "-c", code)
    assert ended.code == 2, ended
    assert ended.out == "False\n"
    assert ended.err.startswith("error: ")
    assert "SOLVER.MAX_EPOCHS" in ended.err


def test_settings_and_file_may_come_in_any_order(place):
    said = place.refusal("train", "SEED", "1", "--config_file", "gone.yml", "SEED", "2", bare=True, code=2)
    assert "gone.yml" in said


@pytest.mark.parametrize("script", [TRAIN, EVALUATE])
def test_help_names_both_ways_to_give_settings(place, script):
    ended = place.command(sys.executable, script, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert "--config_file FILE" in ended.out
    assert "KEY VALUE | KEY=VALUE" in ended.out


# ---- a wrong world ----


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_unconnected_parallel_processes_are_rejected_with_code_1(place, name):
    said = place.refusal("train", environment={name: "2"}, code=1)
    assert all(fact in said for fact in (name, "2 processes", "RANK")), said


def test_missing_gpu_is_reported_once(place):
    said = place.refusal("train", "MODEL.DEVICE", "cuda", num_ranks=2, environment={"CUDA_VISIBLE_DEVICES": ""}, code=1)
    assert all(fact in said for fact in ("MODEL.DEVICE", "cuda", "auto or cpu")), said


def test_unsupported_precision_is_reported_once(place):
    settings = ("MODEL.DEVICE", "auto", "SOLVER.PRECISION", "fp16")
    said = place.refusal("train", *settings, num_ranks=2, environment={"CUDA_VISIBLE_DEVICES": ""}, code=2)
    assert "SOLVER.PRECISION fp16" in said
    assert "GPU" in said


def test_output_dir_that_is_a_file_is_rejected(place):
    said = place.refusal("train", "OUTPUT_DIR", "tiny.yml", num_ranks=2, code=1)
    assert said.startswith("OUTPUT_DIR must be writable, got tiny.yml: Not a directory")


# ---- wrong data ----


def test_without_any_argument_the_missing_data_set_is_named(place):
    folder = place.folder / "empty"
    folder.mkdir()
    said = place.refusal("train", bare=True, folder=folder, num_ranks=2, code=2)
    assert "DATASETS.ROOT_DIR" in said
    assert "got data. Fix:" in said


def test_too_few_identities_error_suggests_valid_batch_size(place):
    settings = ("SOLVER.IMS_PER_BATCH", 48, "OUTPUT_DIR", "few")
    said = place.refusal("train", *settings, num_ranks=2, code=2)
    facts = ("SOLVER.IMS_PER_BATCH must be at most 32, got 48", "DATALOADER.NUM_INSTANCE=4", "has 8")
    assert all(fact in said for fact in facts), said
    assert f"error: {said}" in (place.folder / "few" / "log.txt").read_text()


@pytest.fixture
def damaged(place):
    """A data set of its own, one of whose images is cut off."""
    place.train("OUTPUT_DIR", "whole", "DATASETS.ROOT_DIR", "damaged", "SOLVER.MAX_EPOCHS", 1)
    image = min((place.folder / "damaged" / "synthetic" / "bounding_box_train").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:100])
    yield image
    shutil.rmtree(place.folder / "damaged")


def test_a_damaged_image_is_named(place, damaged):
    said = place.refusal("train", "OUTPUT_DIR", "torn", "DATASETS.ROOT_DIR", "damaged", num_ranks=2, code=2)
    assert str(damaged.relative_to(place.folder)) in said
    assert "1 of" in said


# ---- a loss that stops being finite ----


@pytest.fixture(scope="module")
def exploded(place):
    settings = ("OUTPUT_DIR", "exploded", "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", 0, "WANDB.ENABLE", "yes")
    said = place.refusal("train", *settings, "SOLVER.MAX_EPOCHS", 4, num_ranks=2, code=1)
    return place.folder / "exploded", said


def test_non_finite_loss_is_reported_with_iteration_and_terms(exploded):
    _, said = exploded
    facts = ("iteration 2", "epoch 1", "id nan, triplet nan, loss nan", "SOLVER.BASE_LR")
    assert all(fact in said for fact in facts), said


def test_no_checkpoint_holds_what_is_not_finite(exploded):
    folder, _ = exploded
    assert list((folder / "checkpoints").iterdir()) == []


def test_wandb_records_exit_code_of_failed_run(place, exploded):
    folder, _ = exploded
    exits = [record["exit"]["exit_code"] for record in place.wandb_records(folder) if record["type"] == "exit"]
    assert exits == [1]


def test_error_of_slow_rank_0_is_not_cut_off_by_a_faster_rank(place):
    said = place.refusal("train", "SEED", "x", num_ranks=2, before=first_rank_is_slow, code=2)
    assert "SEED" in said
    assert "'x'" in said


def test_error_is_reported_once_under_torchrun(place):
    words = ("torchrun", "--standalone", "--nproc_per_node=2", TRAIN, "--config_file", "tiny.yml")
    ended = place.command(*words, "SOLVER.IMS_PER_BATCH", 24, "DATALOADER.NUM_INSTANCE", 8)
    assert ended.code == 1
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert "SOLVER.IMS_PER_BATCH=24" in ended.err
    assert "DATALOADER.NUM_INSTANCE=8" in ended.err
    assert ended.err.count("error: ") == 1


# ---- the end of a process ----

# Rank 1 answers rank 0's last collective while that one does what Python does at its end, and holds the interpreter
# until it is taken apart. The collective's thread waits for it, and something lets go of it only then.
ANSWERED_LATE = """
import atexit, mmap, os, sys, time

if "RANK" not in os.environ:
    ranks = [os.spawnlpe(os.P_NOWAIT, sys.executable, *sys.orig_argv, {**os.environ, "RANK": rank}) for rank in "01"]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) != 0 for rank in ranks))

with open("answered", "r+b") as file:
    answered = mmap.mmap(file.fileno(), 1)

def hold():
    while answered[0] == 0:  # a wait of any kind would let go
        pass
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass

class LetGo:
    def __del__(self, sleep=time.sleep):
        sleep(1)

is_first = os.environ["RANK"] == "0"
if is_first:
    sys.setswitchinterval(100)
    atexit.register(hold)  # before all others, so that it comes last
    let_go = LetGo()

import torch
import torch.distributed as dist
from reid.commands.main import exit_process

dist.init_process_group("gloo")
time.sleep(0 if is_first else 1)
work = dist.all_reduce(torch.ones(3), async_op=True)
if not is_first:
    work.wait()
    answered[0] = 1
    time.sleep(3)
del work
print("done")
exit_process(0)
"""


@pytest.mark.slow
def test_a_process_with_a_collective_under_way_ends_well(place):
    (place.folder / "answered").write_bytes(b"\0")
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = place.command(sys.executable, "-c", ANSWERED_LATE, environment=group)
    assert ended == Ended(0, "done\n" * 2, "")


# ---- what Python drops ----


class Raising:
    """Its destructor is a place where Python prints what is raised, and drops it."""

    def __init__(self, cause):
        self._cause = cause

    def __del__(self):
        self._cause()
        # A signal's handler runs, and raises, behind that.


def raising_where_python_drops_it(cause):
    from reid.training import train

    original = train.build_stores

    def build_stores(*arguments):
        Raising(cause)
        original(*arguments)

    train.build_stores = build_stores


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def a_fault():
    raise RuntimeError("a fault of our own")


def test_signal_is_handled_where_python_ignores_exceptions(place):
    (ended,) = place.run("train", "OUTPUT_DIR", "heard", before=partial(raising_where_python_drops_it, sigterm))
    assert (ended.code, ended.err) == (PREEMPTED, "")


def test_another_error_that_python_drops_is_printed(place):
    before = partial(raising_where_python_drops_it, a_fault)
    assert "RuntimeError: a fault of our own" in place.train("OUTPUT_DIR", "other", before=before).err


# ---- packages that do not fit ----


def test_a_missing_package_is_named_with_the_remedy():
    told = explain_import_error(ModuleNotFoundError("No module named 'ignite'", name="ignite"))
    assert isinstance(told, WorldError)
    assert told.key is None
    assert re.search(r"\bignite\b.*: uv sync$", str(told))


def test_mismatched_torchvision_is_reported_once_with_versions(place):
    said = place.refusal("train", num_ranks=2, before=torchvision_is_of_another_torch, code=1)
    torch, torchvision = version("torch"), version("torchvision")
    assert all(fact in said for fact in (f"torch {torch} ", f"torchvision {torchvision} ", "torchvision::nms")), said
    assert said.endswith("uv sync --reinstall-package torch --reinstall-package torchvision")


def test_unrelated_error_is_left_unchanged():
    error = RuntimeError("something else")
    assert explain_import_error(error) is error
