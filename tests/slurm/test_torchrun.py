"""One torchrun on each of two machines, without Slurm: processes, machines and links fail, and the training resumes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import EXACT, PATIENCE, TRAINING, assert_same_but_for_rounding
from program import records

pytestmark = pytest.mark.slow

# The options of docs/slurm.md. torchrun misses a lost machine after 15 s and waits 5 s more for others to join.
TORCHRUN = (
    *("--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=training", "--rdzv-endpoint=n1:29400"),
    *("--rdzv-conf=join_timeout=300,last_call_timeout=5", "--max-restarts=3", "--shutdown-timeout=60"),
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
)
SETTINGS = (*EXACT, "SOLVER.MAX_EPOCHS", 60, "SOLVER.EVAL_PERIOD", 30, "SOLVER.CHECKPOINT_EVERY_MINUTES", 1e-9)


class Training:
    """A training on both machines, in one folder."""

    def __init__(self, machines, place, repository, name, *settings):
        self.machines, self.place, self.repository, self.folder = machines, place, repository, place.folder / name
        folders = ("DATASETS.ROOT_DIR", place.folder / "data", "DATASETS.CACHE_DIR", place.folder / "cache")
        self._arguments = ("--config_file", place.folder / "tiny.yml", "OUTPUT_DIR", self.folder, *folders, *settings)
        self.agents = {}

    def start(self, machine):
        program = Path(sys.executable).parent / "torchrun"
        with (self.place.folder / f"{self.folder.name}.{machine}.out").open("ab") as out:
            self.agents[machine] = self.machines.start(
                machine,
                [program, *TORCHRUN, "launch/train.py", *self._arguments],
                cwd=self.repository,
                env={**self.place.environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def log(self):
        file = self.folder / "log.txt"
        return file.read_text() if file.exists() else ""

    def output(self):
        return "\n".join(file.read_text() for file in sorted(self.place.folder.glob(f"{self.folder.name}.*.out")))

    def wait_for_first_step(self, number, num_ranks):
        """Wait until the start with this number, counted from 1, has trained for one step."""
        deadline = time.monotonic() + PATIENCE
        while True:
            parts = re.split(r"training \S+ \(\S+ million parameters\) on ", self.log())
            if len(parts) > number and "epoch " in parts[number].partition("\n")[2]:
                assert parts[number].startswith(f"{num_ranks} x cpu"), self.log()
                return
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)


def test_training_resumes_on_the_remaining_nodes(two_machines, place, slow_repository, alone):
    expected = alone(*SETTINGS)
    training = Training(two_machines, place, slow_repository, "with_whoever", *SETTINGS, "SOLVER.TIMEOUT_MINUTES", 0.4)
    training.start("n1")
    training.start("n2")
    training.wait_for_first_step(1, num_ranks=2)

    two_machines.run("n2", ["kill", "-9", *two_machines.pids("n2", TRAINING)])
    training.wait_for_first_step(2, num_ranks=2)

    two_machines.unplug("n2")  # in silence: the ranks wait for each other until SOLVER.TIMEOUT_MINUTES
    training.wait_for_first_step(3, num_ranks=1)
    assert "error: rank 1 did not answer within SOLVER.TIMEOUT_MINUTES=0.4 minutes" in training.output()

    # A disconnected torchrun gives up after a minute. If it does so after reconnecting, it ends all others.
    two_machines.run("n2", ["kill", "-9", *two_machines.pids("n2", "launch/train.py")])
    assert two_machines.ended(training.agents["n2"], within=PATIENCE), training.output()
    two_machines.plug("n2")
    training.start("n2")
    training.wait_for_first_step(4, num_ranks=2)  # without losing a step, as torchrun asks the other rank to stop
    assert "stopped by a signal: saved after iteration" in training.log()

    two_machines.crash("n2")
    training.wait_for_first_step(5, num_ranks=1)
    assert training.agents["n1"].wait(PATIENCE) == 0, training.output()
    iterations = [record["iteration"] for record in records(training.folder, "train")]
    assert iterations == list(range(1, 121))
    assert_same_but_for_rounding(training.folder, expected)
