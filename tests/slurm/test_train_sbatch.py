"""slurm/train*.sbatch: trainings on two nodes of two ranks equal one process, undisturbed or not, on a real Slurm."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy
import pytest
from jobs import EXACT, TRAINING, TWO_BY_TWO, assert_same_but_for_rounding
from program import REPOSITORY, newest, records

pytestmark = pytest.mark.slow

ENOUGH = (*EXACT, "SOLVER.MAX_EPOCHS", 8, "SOLVER.EVAL_PERIOD", 4)  # long enough to be disturbed, at a second a step
SRUN = ("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=2")


def test_two_nodes_of_two_ranks_equal_one_process(jobs, place, alone):
    """The images are copied to a disk of each node, and the data set is read-only."""
    settings = (*EXACT, "SOLVER.MAX_EPOCHS", 3)
    expected = alone(*settings)
    machines = jobs.slurm.machines
    for name in machines.names:
        data = place.folder / "data"
        machines.run(name, ["mount", "--bind", "-o", "ro", data, data])
    local = ("DATASETS.NODE_LOCAL_DIR", "$NODE_LOCAL/images")
    environment = {"NODE_LOCAL": str(machines.local)}
    job = jobs.train("train.sbatch", "on_two_nodes", *settings, *local, environment=environment)
    assert job.ended() == ("COMPLETED", 0, 0), job.output()
    for name in machines.names:
        machines.run(name, ["umount", place.folder / "data"])
        left = machines.run(name, ["find", machines.local]).stdout.split()
        assert left == [f"{machines.local}", f"{machines.local}/images"]
    assert job.output().count(f"copied to {machines.local}/images in ") == 3
    assert_same_but_for_rounding(place.folder / "on_two_nodes", expected)
    environment = json.loads((place.folder / "on_two_nodes" / "environment.json").read_text())
    assert [rank["host"] for rank in environment["ranks"]] == ["n1", "n1", "n2", "n2"]


def preempt(jobs, job):
    """Submit a more important job; Slurm warns the batch script of this one, as before the time limit."""
    urgent = jobs.wrap("sleep 1", options=("--partition=high", "--nodes=2", "--exclusive"))
    assert urgent.ended()[0] == "COMPLETED"


def end_step(jobs, job):
    """Send SIGTERM to the step alone, as Slurm does where the site does not warn the batch script."""
    jobs.slurm.run("scancel", "--signal=TERM", f"{job.number}.0")


def warn(jobs, job):
    """Send SIGUSR1 to the batch script, as before the time limit."""
    job.signal("USR1", "--batch")


@pytest.mark.parametrize(
    ("script", "options", "disturbances"),
    [
        ("train.sbatch", TWO_BY_TWO, (preempt, end_step)),
        ("train_srun.sbatch", SRUN, (warn, end_step)),
    ],
)
def test_time_limit_and_preemption_cost_nothing(jobs, place, slow_repository, alone, script, options, disturbances):
    folder = place.folder / f"requeued_{script.partition('.')[0]}"
    wandb = ("WANDB.ENABLE", "yes")
    job = jobs.train(script, folder.name, *ENOUGH, *wandb, repository=slow_repository, options=options)
    for number, disturb in enumerate(disturbances, start=1):
        job.wait_for(f"epoch {3 * number - 1}/8 step 1/2")
        disturb(jobs, job)
        job.wait_for("requeueing", times=number)
        assert f"saved after iteration {newest(folder)['iteration']}; start the same command" in job.output()
    assert job.ended() == ("COMPLETED", 0, 2), job.output()
    assert job.output().count("asking the ranks to save") == 1  # the script does not get the SIGTERM
    assert_same_but_for_rounding(folder, alone(*ENOUGH))
    parts = sorted(folder.glob("wandb/offline-run-*"))
    run_id = (folder / "wandb_run_id").read_text().strip()
    assert all(part.name.endswith(run_id) for part in parts)
    assert f"on a machine with a network: slurm/sync_wandb.sh {folder}\n" in job.output()
    assert [types_of(place, part) for part in parts] == [["preempting", "exit"], ["preempting", "exit"], ["exit"]]


def types_of(place, run):
    done = place.command("wandb", "leet", "inspect", run, "--json")
    types = [json.loads(line)["type"] for line in done.out.splitlines()]
    return [name for name in types if name in ("preempting", "exit")]


# ---- lost ranks and nodes ----


def test_a_killed_rank_is_started_again_and_a_dead_node_left_out(jobs, place, slow_repository, alone):
    """The job takes one node or two; in the end one node of two ranks is left."""
    folder = place.folder / "lost"
    options = (*TWO_BY_TWO[1:], "--nodes=1-2")
    often = ("SOLVER.CHECKPOINT_EVERY_MINUTES", 1e-9)
    job = jobs.train("train.sbatch", folder.name, *ENOUGH, *often, repository=slow_repository, options=options)
    job.wait_for("epoch 2/8 step 1/2")
    machines = jobs.slurm.machines
    machines.run("n2", ["kill", "-9", machines.pids("n2", TRAINING)[-1]])
    job.wait_for("resuming from")
    job.wait_for("epoch 5/8 step 1/2")
    machines.crash("n2")
    assert job.ended() == ("COMPLETED", 0, 1), job.output()
    assert "1 node(s) n1" in job.output()
    assert job.output().count("resuming from") == 2
    environment = json.loads((folder / "environment.json").read_text())
    assert [rank["host"] for rank in environment["ranks"]] == ["n1", "n1"]
    assert_same_but_for_rounding(folder, alone(*ENOUGH))


def test_a_node_that_was_cut_off_and_comes_back_writes_nothing(jobs, place, slow_repository, alone):
    """It continues to train, and sees the shared file system, until it notices that another start owns the folder."""
    settings = (*EXACT, "SOLVER.MAX_EPOCHS", 1000, "SOLVER.EVAL_PERIOD", 1000)
    folder = place.folder / "cut_off"
    often = ("SOLVER.CHECKPOINT_EVERY_MINUTES", 1e-9)
    options = ("--nodes=1", "--gres=gpu:1")
    job = jobs.train("train.sbatch", folder.name, *settings, *often, repository=slow_repository, options=options)
    job.wait_for("epoch 3/1000 step 1/2")
    node = job.state()["NodeList"]
    machines = jobs.slurm.machines
    machines.unplug(node)
    job.wait_for("start 2: 1 node(s)")
    assert machines.pids(node, TRAINING)  # still running
    job.wait_for("writes no more and ends")
    output = job.output()
    assert f"is taken over from the previous start, which is still alive on {node}" in output
    owner = json.loads((folder / "owner.json").read_text())
    assert owner["start"]["restart"] == 1
    assert owner["host"] != node
    assert (
        f"by restart 1 of job {job.number}, on {owner['host']}; this one, on {node}, writes no more and ends" in output
    )
    machines.plug(node)
    job.wait_for(" million parameters) on ", times=2)
    job.wait_for("images/s", times=job.output().count("images/s") + 2)
    job.signal("USR1", "--batch")
    job.wait_for("stopped by a signal: saved")
    ours, theirs = (records(of, "train", speeds=False) for of in (folder, alone(*ENOUGH)))
    assert [record["iteration"] for record in ours] == list(range(1, len(ours) + 1))
    losses = [[record["loss"] for record in of[:16]] for of in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_srun_job_survives_killed_rank_and_resumes_after_scancel(jobs, place, slow_repository, alone):
    """First two nodes of two tasks, then one process under one torchrun, without GPUs."""
    folder = place.folder / "cancelled"
    settings = (*ENOUGH, "SOLVER.CHECKPOINT_EVERY_MINUTES", 1e-9)
    job = jobs.train("train_srun.sbatch", folder.name, *settings, repository=slow_repository, options=SRUN)
    job.wait_for("epoch 2/8 step 1/2")
    machines = jobs.slurm.machines
    machines.run("n2", ["kill", "-9", machines.pids("n2", "python.* launch/train.py")[-1]])
    job.wait_for("the next start resumes from last_")
    job.wait_for("resuming from")
    job.wait_for("epoch 5/8 step 1/2")
    jobs.slurm.run("scancel", job.number)
    state, _, restarts = job.ended()
    assert (state, restarts) == ("CANCELLED", 1), job.output()
    assert "stopped by a signal: saved after iteration" in (folder / "log.txt").read_text()

    alone_again = ("--nodes=1", "--gres=none", "--cpus-per-task=2")
    job = jobs.train("train.sbatch", folder.name, *settings, repository=slow_repository, options=alone_again)
    assert job.ended() == ("COMPLETED", 0, 0), job.output()
    assert_same_but_for_rounding(folder, alone(*ENOUGH))


# ---- arrays, evaluations, the preflight check ----


def test_an_array_of_seeds_then_evaluation_and_their_mean(jobs, place):
    """Two jobs generate the data set and the same stores at the same time."""
    fresh = ("DATASETS.ROOT_DIR", place.folder / "fresh_data", "DATASETS.CACHE_DIR", place.folder / "fresh_cache")
    settings = ("SOLVER.MAX_EPOCHS", 1, *fresh)
    small = ("--gres=none", "--cpus-per-task=2")
    array = jobs.train("array.sbatch", "seeds/{}", "SEED", "{}", *settings, options=("--array=3-4", *small))
    for seed in (3, 4):
        assert array.task(seed).ended() == ("COMPLETED", 0, 0), array.task(seed).output()
    for seed in (3, 4):
        place.train("OUTPUT_DIR", f"seed_{seed}_alone", "SEED", seed, "SOLVER.MAX_EPOCHS", 1)
        ours, theirs = (place.folder / name / "result.json" for name in (f"seeds/{seed}", f"seed_{seed}_alone"))
        assert ours.read_text() == theirs.read_text()
    assert not list((place.folder / "fresh_cache").glob("*.partial"))

    (best,) = (place.folder / "seeds" / "3" / "checkpoints").glob("best_*.pt")
    job = jobs.train("evaluate.sbatch", "evaluated", "TEST.WEIGHT", best, *fresh, options=("--nodes=2", *small))
    assert job.ended() == ("COMPLETED", 0, 0), job.output()
    result = json.loads((place.folder / "evaluated" / "result.json").read_text())
    trained = json.loads((place.folder / "seeds" / "3" / "result.json").read_text())
    assert result["mAP"] == pytest.approx(trained["mAP"], rel=1e-9)

    done = place.command("python", REPOSITORY / "launch" / "summarize.py", "seeds/3", "seeds/4")
    assert (done.code, done.err) == (0, "")
    assert "mean of 2" in done.out


def test_the_check_on_two_nodes_of_two_ranks(jobs, place):
    environment = {"PROGRAM": "launch/check.py"}
    job = jobs.train("evaluate.sbatch", "not_there_yet", environment=environment)
    state, code, _ = job.ended()
    output = job.output()
    assert (state, code) in (("COMPLETED", 0), ("FAILED", 1)), output  # the link may be slow when the test runs
    assert (code == 0) == ("no problems were found" in output)
    for line in (
        "ranks        4 on n1 (2), n2 (2)",
        "all-reduce   all ranks: ",
        "             within n1: ",
        "             within n2: ",
        "             n1 - n2: ",
        "step         ",
        "OUTPUT_DIR   ",
    ):
        assert f"\n{line}" in output
    assert not (place.folder / "not_there_yet").exists()


def problems_of(output):
    """Return the problems that the check reports, except speeds, which vary."""
    lines = [line for line in output.splitlines() if line.startswith("problem ")]
    assert output.index("problem 1: ") < output.index("\nranks  ")
    return [line for line in lines if "in time" not in line and "equally fast" not in line]


def test_check_reports_node_differences_and_unshared_output_dir(jobs, place, tmp_path):
    """n2 has another numpy, and OUTPUT_DIR is a small disk local to each node."""
    machines = jobs.slurm.machines
    (about,) = Path(numpy.__file__).parent.parent.glob("numpy-*.dist-info/METADATA")
    (tmp_path / "other").write_text(re.sub("^Version: .*$", "Version: 1.0", about.read_text(), flags=re.MULTILINE))
    machines.run("n2", ["mount", "--bind", tmp_path / "other", about])
    (place.folder / "local").mkdir()
    for name in machines.names:
        machines.run(name, ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", place.folder / "local"])
    try:
        job = jobs.train("evaluate.sbatch", "local/run", environment={"PROGRAM": "launch/check.py"})
        assert job.ended()[:2] == ("FAILED", 1), job.output()
    finally:
        machines.run("n2", ["umount", about])
        for name in machines.names:
            machines.run(name, ["umount", place.folder / "local"])
    start, versions, room, blind = problems_of(job.output())
    assert "does not agree with rank 0 on n1: numpy is '1.0', not" in start
    assert "all ranks must have the same versions, got" in versions
    assert "must have room for checkpoints of" in room
    assert "must be visible to all nodes" in blind
    assert "missing on n2" in blind
    assert "problems. Fix: see the list above" in job.output()


def test_check_reports_data_batch_size_and_read_only_output_dir(jobs, place, tmp_path):
    machines = jobs.slurm.machines
    place.train("OUTPUT_DIR", "generates_the_data", "SOLVER.MAX_EPOCHS", 1)
    shutil.copytree(place.folder / "data", tmp_path / "data")
    next((tmp_path / "data").rglob("query/*.jpg")).unlink()
    machines.run("n2", ["mount", "--bind", tmp_path / "data", place.folder / "data"])
    (place.folder / "closed").mkdir()
    machines.run("n1", ["mount", "--bind", "-o", "ro", place.folder / "closed", place.folder / "closed"])
    try:
        settings = ("SOLVER.IMS_PER_BATCH", 24)
        job = jobs.train("evaluate.sbatch", "closed/run", *settings, environment={"PROGRAM": "launch/check.py"})
        assert job.ended()[:2] == ("FAILED", 1), job.output()
    finally:
        machines.run("n2", ["umount", place.folder / "data"])
        machines.run("n1", ["umount", place.folder / "closed"])
    batch, data, folder = problems_of(job.output())
    assert "must be a multiple of the number of ranks, got 6 on 4 ranks; use SOLVER.IMS_PER_BATCH 16 or 32" in batch
    assert "rank 2 on n2 does not agree with rank 0 on n1: the fingerprint of the test images is" in data
    assert "cannot be written" in folder


def test_ranks_are_right_without_the_scripts(jobs, place):
    """A job of four tasks runs one process in the batch script, then a step of two tasks, then torchrun in one task."""
    settings = (*EXACT, "SOLVER.MAX_EPOCHS", "1")
    program = ("launch/train.py", *settings)
    commands = [
        ("python", *program, *jobs.arguments("in_the_script")),
        ("srun", "--nodes=1", "--ntasks=2", "python", *program, *jobs.arguments("in_a_step")),
        ("srun", "--nodes=1", "--ntasks=1", "torchrun", "--standalone", "--nproc_per_node=2", *program),
    ]
    lines = [shlex.join(map(str, command)) for command in commands]
    lines[-1] += " " + shlex.join(jobs.arguments("in_torchrun"))
    job = jobs.wrap(" && ".join(lines), options=("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2"))
    assert job.ended() == ("COMPLETED", 0, 0), job.output()
    for name, num_ranks in (("in_the_script", 1), ("in_a_step", 2), ("in_torchrun", 2)):
        environment = json.loads((place.folder / name / "environment.json").read_text())
        assert environment["world_size"] == num_ranks
        assert [rank["rank"] for rank in environment["ranks"]] == list(range(num_ranks))
        assert_same_but_for_rounding(place.folder / name, place.folder / "in_the_script")


def test_invalid_setting_is_reported_once_before_ranks_start(jobs, place):
    job = jobs.train("train.sbatch", "wrong", "SOLVER.BASE_LR", "fast")
    assert job.ended() == ("FAILED", 2, 0)
    assert job.output().startswith("error: SOLVER.BASE_LR must be ")
    assert job.output().count("\n") == 1
