"""slurm/sweep.sbatch: agents of a W&B sweep on a real Slurm, with a W&B server that the nodes can reach."""

import sys
from pathlib import Path

import pytest
import yaml
from jobs import EXACT, assert_same_but_for_rounding
from machines import HUB
from wandb_server import WandbServer

pytestmark = pytest.mark.slow

SMALL = ("--array=1", "--gres=none", "--cpus-per-task=2", "--mem=1G")


@pytest.fixture
def server(slurm):
    with slurm.machines.on_network_of(HUB):
        running = WandbServer(slurm.machines.address[HUB])
    yield running
    running.stop()


def test_missing_wandb_key_is_reported_in_one_line(jobs):
    job = jobs.submit("sweep.sbatch", "me/reid/sweep1", options=SMALL, environment={"WANDB_MODE": "online"})
    assert job.task(1).ended() == ("FAILED", 1, 0)
    (error,) = (line for line in job.task(1).output().splitlines() if line.startswith("error"))
    assert error.startswith("error: WANDB_API_KEY must be set for a sweep, got no key.")


def test_trial_saved_on_warning_signal_resumes_when_reassigned(jobs, place, slow_repository, alone, server):
    settings = (*EXACT, "SOLVER.MAX_EPOCHS", 8, "SOLVER.EVAL_PERIOD", 4)
    program = str(Path(sys.executable).parent / "torchrun")
    command = [program, "--standalone", "--nproc_per_node=2", "${program}", *jobs.arguments("sweep")]
    command += [*map(str, settings), "WANDB.ENABLE", "yes", "${args_no_hyphens}"]
    server.sweep = {"config": yaml.safe_dump({"command": command})}
    trial = {"type": "run", "run_id": "trial1", "program": "launch/train.py", "args": {"SOLVER.MARGIN": {"value": 0.4}}}
    server.trials = [trial, trial]
    environment = {name: value for name, value in server.environment.items() if value is not None}
    environment |= {"WANDB_MODE": "online", "PATH": place.environment["PATH"]}

    submitted = jobs.submit(
        "sweep.sbatch", "me/reid/sweep1", options=SMALL, repository=slow_repository, environment=environment
    )
    job = submitted.task(1)
    job.wait_for("epoch 3/8 step 1/2")
    job.signal("USR1", "--batch")
    job.wait_for("requeueing")
    job.wait_for("resuming from")
    assert job.ended() == ("COMPLETED", 0, 1), job.output()
    assert_same_but_for_rounding(place.folder / "sweep" / "trial1", alone(*settings, "SOLVER.MARGIN", 0.4))
    (run,) = server.runs.values()
    assert [row["iteration"] for row in run.history if "train/loss" in row] == list(range(1, 17))
    assert any("preempting" in end for end in run.ends)
