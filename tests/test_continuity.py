"""An interrupted training equals an uninterrupted one, whatever interrupts it, on any number of ranks.

Also covers reid.distributed.watchdog, reid.runs.start_checks.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from disturbances import (
    at_step,
    before_model,
    fill_disk,
    hang,
    in_evaluation,
    signal_self,
    signal_self_twice,
    small_files_only,
    write_at_once,
)
from program import SMALL, TIMEOUT, TRAIN, Place, largest_difference, names, newest, records, same

ADAM = ("SOLVER.OPTIMIZER_NAME", "Adam")  # whose state matters from the second step on
OFTEN = ("SOLVER.CHECKPOINT_EVERY_MINUTES", 1e-9, "SOLVER.LOG_PERIOD", 2)  # whenever the one before is written
PREEMPTED = 85
# Where a new program must import everything first, and timm would take longer than the larger model.
WITHOUT_TIMM = ("MODEL.NAME", "resnet18")


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


@pytest.fixture(scope="module")
def straight(place):
    """Return a function: settings -> folder of the undisturbed run."""
    done: dict[tuple, Path] = {}

    def run(*settings: object, num_ranks: int = 1) -> Path:
        key = (num_ranks, *settings)
        if key not in done:
            done[key] = place.folder / f"straight_{len(done)}"
            place.train("OUTPUT_DIR", done[key].name, *settings, num_ranks=num_ranks)
        return done[key]

    return run


def assert_same_outcome(folder: Path, expected: Path) -> None:
    """Compare weights, optimizer, records and files, bit for bit; all except the speeds."""
    ours, theirs = newest(folder), newest(expected)
    assert ours["iteration"] == theirs["iteration"]
    assert same(ours["model"], theirs["model"])
    assert same(ours["optimizer"], theirs["optimizer"])
    for kind in ("train", "val"):
        assert records(folder, kind, speeds=False) == records(expected, kind, speeds=False)
    assert (folder / "result.json").read_text() == (expected / "result.json").read_text()
    assert [name for name in names(folder) if name != "wandb"] == names(expected)
    assert [name for name in names(folder / "checkpoints") if name.startswith("best")] == [
        name for name in names(expected / "checkpoints") if name.startswith("best")
    ]
    assert not [name for name in names(folder / "checkpoints") if "tmp" in name]


# ---- stopped between two epochs ----


def test_resume_after_one_epoch_equals_uninterrupted_run(place, straight):
    place.train("OUTPUT_DIR", "in_two", "SOLVER.MAX_EPOCHS", 1, *ADAM)
    place.train("OUTPUT_DIR", "in_two", "SOLVER.MAX_EPOCHS", 3, *ADAM)
    assert_same_outcome(place.folder / "in_two", straight("SOLVER.MAX_EPOCHS", 3, *ADAM))


# ---- killed ----


@pytest.mark.parametrize("step", [2, 6])
def test_kill_within_epoch_equals_uninterrupted_run(place, straight, step):
    output_dir = f"killed_in_step_{step}"
    settings = ("SOLVER.MAX_EPOCHS", 3, *ADAM)
    (ended,) = place.run(
        "train",
        "OUTPUT_DIR",
        output_dir,
        *settings,
        before=partial(at_step, step, partial(signal_self, signal.SIGKILL)),
    )
    assert ended.code == -signal.SIGKILL
    place.train("OUTPUT_DIR", output_dir, *settings)
    assert_same_outcome(place.folder / output_dir, straight(*settings))


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resume_from_timed_checkpoint_equals_uninterrupted_run(place, straight, num_workers):
    """Cut an epoch of 5 steps, and the window of a record, in two."""
    settings = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_EPOCHS", 2, *ADAM, "SOLVER.LOG_PERIOD", 3)
    expected = straight(*settings)
    folder = place.folder / f"by_the_clock_{num_workers}"
    interrupted = ("OUTPUT_DIR", folder.name, *settings, "SOLVER.CHECKPOINT_EVERY_MINUTES", 1e-9)
    (ended,) = place.run("train", *interrupted, "DATALOADER.NUM_WORKERS", num_workers, before=killed_at_the_last_step)
    assert ended.code == -signal.SIGKILL
    assert list(folder.glob("checkpoints/last_0002_*[6789].pt"))
    ended = place.train("OUTPUT_DIR", folder.name, *settings, "DATALOADER.NUM_WORKERS", num_workers)
    assert "resuming from" in ended.out
    assert "epoch 2, step" in ended.out
    assert_same_outcome(folder, expected)


def killed_at_the_last_step() -> None:
    """Disturb the program; called before it starts."""
    write_at_once()
    at_step(10, partial(signal_self, signal.SIGKILL))


def disturb(place: Place, output_dir: str, settings: tuple, num_ranks: int, num_kills: int, seed: int) -> None:
    """Start a training repeatedly, and kill rank 0, the last one, or both of them at random moments."""
    dice = random.Random(seed)
    for _ in range(num_kills):
        ranks = place.start("train", "OUTPUT_DIR", output_dir, *settings, num_ranks=num_ranks)
        if dice.random() < 0.2:
            time.sleep(dice.uniform(0, 2))
        else:
            ranks.wait_for(f"training {SMALL}", or_end=True)
            time.sleep(dice.uniform(0, 1.5))
        victims = dice.choice([(0,), (num_ranks - 1,), (0, num_ranks - 1)])
        for victim in victims:
            if ranks.processes[victim].is_alive():
                os.kill(ranks.pid(victim), signal.SIGKILL)
        for rank, ended in enumerate(ranks.ended()):
            assert "Traceback" not in ended.err, (rank, ended)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "num_ranks", "num_kills"),
    [(0, 2, 6), (1, 2, 24), (2, 4, 12)],
)
def test_many_random_kills_equal_uninterrupted_run(place, straight, seed, num_ranks, num_kills):
    settings = ("SOLVER.MAX_EPOCHS", 8, *ADAM, "SOLVER.IMS_PER_BATCH", 4 * num_ranks, *OFTEN)
    output_dir = f"killed_often_{seed}"
    disturb(place, output_dir, settings, num_ranks=num_ranks, num_kills=num_kills, seed=seed)
    place.train("OUTPUT_DIR", output_dir, *settings, num_ranks=num_ranks)
    assert_same_outcome(place.folder / output_dir, straight(*settings, num_ranks=num_ranks))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_killed_rank_again_by_itself(place, straight, victim):
    """Start it as the README does; the first attempt's rank kills itself at its fifth step."""
    settings = ("SOLVER.MAX_EPOCHS", 4, *ADAM, *OFTEN, *WITHOUT_TIMM)
    output_dir = f"restarted_{victim}"
    script = place.folder / "suicidal.py"
    script.write_text(SUICIDAL)
    launcher = ("torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    ended = place.command(
        *(*launcher, script, "--config_file", "tiny.yml", "OUTPUT_DIR", output_dir, *settings),
        environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "VICTIM": str(victim)},
    )
    assert ended.code == 0, ended
    assert ended.out.count("training resnet18") == 2
    assert processes_that_name(output_dir) == []
    assert_same_outcome(place.folder / output_dir, straight(*settings, num_ranks=2))


SUICIDAL = """
import os, signal
from reid.training.criterion import Criterion
from reid.commands.main import exit_process, main

original, calls = Criterion.__call__, []
def fatal(*arguments):
    calls.append(1)
    is_victim = os.environ["RANK"] == os.environ["VICTIM"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_victim and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
Criterion.__call__ = fatal
exit_process(main("train"))
"""


def processes_that_name(text: str) -> list[str]:
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            commands += [command] if text in command else []
    return commands


def test_surviving_rank_ends_without_traceback(place):
    ranks = place.start("train", "OUTPUT_DIR", "lost_rank", "SOLVER.MAX_EPOCHS", 1000, num_ranks=2)
    ranks.wait_for("epoch 2/")
    os.kill(ranks.pid(1), signal.SIGKILL)
    survivor, victim = ranks.ended()
    assert victim.code == -signal.SIGKILL
    assert survivor.code in (1, -signal.SIGTERM)
    assert "Traceback" not in survivor.err


# ---- a damaged checkpoint ----


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a bit flipped", "cut off"])
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(place, straight, damage):
    settings = ("SOLVER.MAX_EPOCHS", 3, *ADAM)
    folder = place.folder / f"damaged_{damage[:3]}"
    place.train("OUTPUT_DIR", folder.name, "SOLVER.MAX_EPOCHS", 2, *ADAM, num_ranks=2)
    before, newest_file = sorted((folder / "checkpoints").glob("last_*.pt"))
    content = bytearray(newest_file.read_bytes())
    content[len(content) // 2] ^= 4
    newest_file.write_bytes(content[:1000] if damage == "cut off" else content)
    ended = place.train("OUTPUT_DIR", folder.name, *settings, num_ranks=2)
    (warning,) = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    assert newest_file.name in warning
    assert before.name in warning
    (folder / "checkpoints" / f"{newest_file.name}.damaged").unlink()
    assert_same_outcome(folder, straight(*settings, num_ranks=2))


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("evaluate", ("TEST.WEIGHT", "evil.pt")),
        ("train", ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_PATH", "evil.pt")),
        ("train", ("MODEL.PRETRAIN_CHOICE", "imagenet", "MODEL.PRETRAIN_PATH", "evil.pt")),
    ],
)
def test_a_file_that_would_run_code_is_rejected(place, command, settings):
    torch.save({"model": Evil()}, place.folder / "evil.pt")
    message = place.refusal(command, "OUTPUT_DIR", "evil", *settings, num_ranks=2, code=1)
    assert f"{settings[-2]}=evil.pt must hold a state dict only, got a damaged file or Python objects" in message
    assert not (place.folder / "executed").exists()


class Evil:
    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


# ---- on another number of ranks ----


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)],
)
def test_resume_on_another_number_of_ranks_gives_the_same_result(place, straight, before, after):
    settings = ("SOLVER.MAX_EPOCHS", 3, *ADAM, "SOLVER.PRECISION", "fp64", "SOLVER.IMS_PER_BATCH", 32)
    settings += ("DATALOADER.NUM_INSTANCE", 4, "SOLVER.LOG_PERIOD", 100)
    folder = place.folder / f"from_{before}_to_{after}"
    stop = partial(at_step, 1, partial(signal_self, signal.SIGTERM))
    ended = place.run("train", "OUTPUT_DIR", folder.name, *settings, num_ranks=before, before=stop)
    assert [rank.code for rank in ended] == [PREEMPTED] * before, ended
    place.train("OUTPUT_DIR", folder.name, *settings, num_ranks=after)
    expected = straight(*settings)
    assert largest_difference(folder, expected) < 1e-9
    for ours, theirs in zip(records(folder, "train"), records(expected, "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)


# ---- asked to stop ----


@pytest.mark.parametrize(
    ("number", "num_ranks", "targets"),
    [
        (signal.SIGTERM, 2, [0, 1]),
        pytest.param(signal.SIGINT, 1, [0], marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 2, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, [0], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 2, [0], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 4, [2], marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_at_one_step_on_all_ranks(place, straight, number, num_ranks, targets):
    settings = ("SOLVER.MAX_EPOCHS", 4, *ADAM, "SOLVER.IMS_PER_BATCH", max(8, 4 * num_ranks))
    folder = place.folder / f"signal_{number}_{num_ranks}_{targets[0]}"
    arguments = ("OUTPUT_DIR", folder.name, *settings, "WANDB.ENABLE", "yes")
    stop = partial(at_step, 7, partial(signal_self, number), targets)
    ended = place.run("train", *arguments, "DATALOADER.NUM_WORKERS", 1, num_ranks=num_ranks, before=stop)
    assert [rank.code for rank in ended] == [PREEMPTED] * num_ranks, ended
    assert [rank.err for rank in ended] == [""] * num_ranks
    iteration = newest(folder)["iteration"]
    assert f"stopped by a signal: saved after iteration {iteration}; start the same command again" in ended[0].out
    marker = (folder / "PREEMPTED").read_text()
    assert marker == f"preempted: resume me\nsaved after iteration {iteration}\n"
    assert iteration in (7, 8)
    assert records(folder, "train")[-1]["iteration"] in (iteration - 1, iteration)
    wandb = place.wandb_records(folder)
    assert [record["type"] for record in wandb if record["type"] in ("preempting", "exit")] == ["preempting", "exit"]
    place.train("OUTPUT_DIR", folder.name, *settings, num_ranks=num_ranks)
    (folder / "wandb_run_id").unlink()
    assert_same_outcome(folder, straight(*settings, num_ranks=num_ranks))


def test_evaluation_stopped_by_signal_is_repeated_on_resume(place, straight):
    settings = ("SOLVER.MAX_EPOCHS", 3, *ADAM)
    folder = place.folder / "signal_in_evaluation"
    for _ in range(2):  # the second one before the last evaluation
        ended = place.run("train", "OUTPUT_DIR", folder.name, *settings, num_ranks=2, before=STOP_IN_EVALUATION)
        assert [rank.code for rank in ended] == [PREEMPTED] * 2, ended
    assert len(records(folder, "val")) < 3
    place.train("OUTPUT_DIR", folder.name, *settings, num_ranks=2)
    assert_same_outcome(folder, straight(*settings, num_ranks=2))


STOP_IN_EVALUATION = partial(in_evaluation, partial(signal_self, signal.SIGTERM), [1])


@pytest.mark.slow
def test_missing_last_evaluation_is_run_on_resume(place, straight):
    settings = ("SOLVER.MAX_EPOCHS", 1, *ADAM)
    folder = place.folder / "only_evaluation"
    ended = place.run("train", "OUTPUT_DIR", folder.name, *settings, num_ranks=2, before=STOP_IN_EVALUATION)
    assert [rank.code for rank in ended] == [PREEMPTED] * 2, ended
    assert records(folder, "val") == []
    place.train("OUTPUT_DIR", folder.name, *settings, num_ranks=2)
    assert_same_outcome(folder, straight(*settings, num_ranks=2))
    assert "all 1 epochs are done" in place.train("OUTPUT_DIR", folder.name, *settings, num_ranks=2).out


def test_a_second_signal_stops_at_once(place):
    twice = partial(signal_self_twice, signal.SIGINT, "twice/checkpoints/last_0001_00000002.pt")
    settings = ("OUTPUT_DIR", "twice", "SOLVER.MAX_EPOCHS", 2)
    (ended,) = place.run("train", *settings, before=partial(at_step, 3, twice))
    assert (ended.code, ended.err) == (-signal.SIGINT, "")
    assert ended.out.endswith("signalled once\n")
    assert newest(place.folder / "twice")["iteration"] == 2  # of the epoch's end
    assert "PREEMPTED" not in names(place.folder / "twice")


def test_signal_before_first_checkpoint_leaves_preempted_marker(place):
    stop = partial(before_model, partial(signal_self, signal.SIGTERM))
    (ended,) = place.run("train", "OUTPUT_DIR", "early", before=stop)
    assert (ended.code, ended.err) == (PREEMPTED, "")
    assert (place.folder / "early" / "PREEMPTED").read_text().startswith("preempted: resume me\n")
    place.train("OUTPUT_DIR", "early", "SOLVER.MAX_EPOCHS", 1)
    assert "PREEMPTED" not in names(place.folder / "early")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun_saves_and_stops_all_ranks(place, number):
    """Use the options of the README."""
    options = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=60")
    folder = place.folder / f"torchrun_{number}"
    settings = ("OUTPUT_DIR", folder.name, *WITHOUT_TIMM, "SOLVER.MAX_EPOCHS", 1000, "DATALOADER.NUM_WORKERS", 1)
    launcher = ("torchrun", "--standalone", "--nproc_per_node=2", *options, TRAIN, "--config_file", "tiny.yml")
    with subprocess.Popen(
        [*map(str, launcher), *map(str, settings)],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while "epoch 2/1000" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(number)
        rest, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1  # whatever its ranks return
    assert "stopped by a signal: saved after iteration" in rest
    assert (folder / "PREEMPTED").exists()
    goes_on = place.train("OUTPUT_DIR", folder.name, *WITHOUT_TIMM, "SOLVER.MAX_EPOCHS", 3, num_ranks=2)
    assert "resuming from" in goes_on.out


# ---- the disk is full ----


def test_full_disk_throughout_ends_training_with_exit_code_74(place):
    ended = place.run("train", "OUTPUT_DIR", "full", num_ranks=2, before=small_files_only)
    assert ended[0].code == 74, ended
    assert ended[1].err == ""
    assert ended[0].out.count("warning: full/checkpoints/") >= 3
    assert ended[0].err.startswith("error: full/checkpoints/")
    assert len(records(place.folder / "full", "train")) == 4
    assert names(place.folder / "full" / "checkpoints") == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_training_survives_a_temporarily_full_disk(place, straight):
    """Fill the disk after the first checkpoint, and free it before the end."""
    settings = ("SOLVER.MAX_EPOCHS", 6)
    folder = place.folder / "no_byte"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)], check=True)
    try:
        ended = place.run("train", "OUTPUT_DIR", "no_byte", *settings, num_ranks=2, before=full_for_some_steps)
        assert [rank.code for rank in ended] == [0, 0], ended
        assert "cannot be written: No space left on device" in ended[0].out
        assert [rank.err for rank in ended] == ["", ""]
        expected = straight(*settings, num_ranks=2)
        assert same(newest(folder)["model"], newest(expected)["model"])
        assert records(folder, "train", speeds=False) == records(expected, "train", speeds=False)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_for_some_steps() -> None:
    """Fill the disk from the third step to the fifth; called before the program starts."""
    at_step(3, partial(fill_disk, "no_byte/filler", "no_byte/checkpoints/last_0001*.pt"), [0])
    at_step(5, Path("no_byte/filler").unlink, [0])


# ---- a rank hangs ----


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack_and_all_end(place):
    settings = ("OUTPUT_DIR", "hang", "SOLVER.TIMEOUT_MINUTES", 0.2)
    first, second = place.run("train", *settings, num_ranks=2, before=partial(at_step, 3, hang, [1]))
    assert first.code == 1
    assert second.code in (1, -signal.SIGTERM)
    message = first.err + second.err
    assert message.count("error: rank 1 on ") == 1
    assert "made no step within SOLVER.TIMEOUT_MINUTES=0.2 minutes" in message
    assert "in hang\n" in message  # the function of the stack
    assert "rank 0 on" not in message


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_too(place, stopped):
    settings = ("OUTPUT_DIR", f"stopped_{stopped}", "SOLVER.TIMEOUT_MINUTES", 0.2, "SOLVER.MAX_EPOCHS", 1000)
    ranks = place.start("train", *settings, num_ranks=2)
    ranks.wait_for("epoch 2/")
    os.kill(ranks.pid(stopped), signal.SIGSTOP)
    try:
        other = ranks.processes[1 - stopped]
        other.join(TIMEOUT)
        assert other.exitcode == 1
    finally:
        os.kill(ranks.pid(stopped), signal.SIGKILL)
    message = ranks.ended()[1 - stopped].err
    assert f"error: rank {stopped} did not answer within SOLVER.TIMEOUT_MINUTES=0.2 minutes" in message


# ---- what may and may not change between two starts ----


def test_resume_needs_no_pretrained_weights(place, straight):
    settings = ("SOLVER.MAX_EPOCHS", 3, *ADAM)
    shutil.copytree(straight(*settings), place.folder / "without_weights")
    longer = ("SOLVER.MAX_EPOCHS", 4, "MODEL.PRETRAIN_CHOICE", "imagenet", "MODEL.PRETRAIN_PATH", "gone.pth")
    place.train("OUTPUT_DIR", "without_weights", *longer, *ADAM)


def test_other_settings_are_rejected_naming_old_and_new_value(place, straight):
    settings = ("SOLVER.MAX_EPOCHS", 3, *ADAM)
    folder = straight(*settings).name
    message = place.refusal("train", "OUTPUT_DIR", folder, *settings, "SOLVER.MARGIN", 0.5, num_ranks=2, code=1)
    assert message.startswith(f"{folder}/checkpoints/last_0003_00000006.pt must be from this run, but SOLVER.MARGIN")
    assert "SOLVER.MARGIN was 0.3 and is now 0.5. Fix: use the same settings" in message


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_wandb_too(place):
    settings = (
        "OUTPUT_DIR",
        "ctrl_c",
        "WANDB.ENABLE",
        "yes",
        "SOLVER.MAX_EPOCHS",
        "1000",
        "DATALOADER.NUM_WORKERS",
        "2",
        *WITHOUT_TIMM,
    )
    with subprocess.Popen(
        [sys.executable, str(TRAIN), "--config_file", "tiny.yml", *settings],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a new process group, all of which a terminal's Ctrl-C reaches
    ) as process:
        while "epoch 2/1000 step 1/2" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)
        rest, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (PREEMPTED, "")
    assert "stopped by a signal: saved after iteration" in rest
    types = [record["type"] for record in place.wandb_records(place.folder / "ctrl_c")]
    assert "preempting" in types
    assert types[-1] == "exit"
    assert "resuming from" in place.train("OUTPUT_DIR", "ctrl_c", *WITHOUT_TIMM, "SOLVER.MAX_EPOCHS", 2).out


# ---- ranks that do not agree ----


def another_seed_on_rank_1() -> None:
    """Disturb the program; called before it starts."""
    if os.environ.get("RANK") == "1":
        sys.argv += ["SEED", "7"]


def other_code_on_rank_1() -> None:
    """Disturb the program; called before it starts."""
    import reid.runs.start_checks

    if os.environ.get("RANK") == "1":
        reid.runs.start_checks.source_fingerprint = lambda: "another"


def other_images_on_rank_1() -> None:
    """Disturb the program; called before it starts."""
    from reid.data.datasets import DataSets

    if os.environ.get("RANK") == "1":
        DataSets.fingerprint_of_tests = lambda data: "another"  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("command", "before", "difference"),
    [
        ("train", another_seed_on_rank_1, "SEED is 7, not 0"),
        ("train", other_code_on_rank_1, "the source code of reid is 'another', not "),
        ("evaluate", other_images_on_rank_1, "the fingerprint of the test images is 'another', not "),
    ],
)
def test_ranks_that_do_not_agree_do_not_start(place, straight, command, before, difference):
    (best,) = (straight("SOLVER.MAX_EPOCHS", 3, *ADAM) / "checkpoints").glob("best_*")
    settings = ("OUTPUT_DIR", "disagreement", "TEST.WEIGHT", best)
    message = place.refusal(command, *settings, num_ranks=2, before=before, code=1)
    assert message.startswith("rank 1 on ")
    assert " does not agree with rank 0 on " in message
    assert difference in message
    assert message.endswith("Fix: start all ranks with the same command, code, packages and data.")
