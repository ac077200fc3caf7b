"""Jobs that run the scripts of this repository, submitted as a user submits them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from program import REPOSITORY, Place, largest_difference, newest, records

PATIENCE = 1500  # seconds to wait for something that takes a minute on an idle machine

# A small model, because four ranks share two cores; a checkpoint of resnet18 has 270 MB, and some tests write one a
# step.
EXACT = (
    *("SOLVER.PRECISION", "fp64", "SOLVER.OPTIMIZER_NAME", "Adam", "SOLVER.LOG_PERIOD", 1),
    *("MODEL.NAME", "timm/test_resnet"),
)
TRAINING = "python.* -u launch/train.py"  # a rank, not torchrun
# Two nodes of two ranks each.
TWO_BY_TWO = ("--nodes=2", "--gres=gpu:2", "--cpus-per-task=4")


class Jobs:
    """Jobs submitted by one test."""

    def __init__(self, slurm: Cluster, place: Place) -> None:
        self.slurm, self.place = slurm, place
        self._numbers: list[int] = []

    def submit(self, script: str, *arguments: object, options: tuple[object, ...] = TWO_BY_TWO, **where: Any) -> Job:
        """Run sbatch OPTIONS slurm/SCRIPT ARGUMENTS, from the root of the repository."""
        return self._sbatch(*options, Path("slurm") / script, *arguments, **where)

    def wrap(self, command: str, *, options: tuple[object, ...]) -> Job:
        """Submit a job of a single command, from the root of the repository."""
        return self._sbatch(*options, "--wrap", command)

    def _sbatch(
        self, *arguments: object, environment: dict[str, str] | None = None, repository: Path = REPOSITORY
    ) -> Job:
        folder = self.place.folder / "jobs"
        folder.mkdir(exist_ok=True)
        variables = {"VENV_BIN": str(Path(sys.executable).parent), **(environment or {})}
        number = self.slurm.submit(
            f"--output={folder}/%j.out" if "--array" not in str(arguments) else f"--output={folder}/%A_%a.out",
            *arguments,
            cwd=repository,
            environment={**self.place.environment, **variables},
        )
        self._numbers.append(number)
        return Job(self.slurm, number, folder)

    def train(self, script: str, output_dir: str, *settings: object, **options: object) -> Job:
        """Submit a training with the tiny settings; all its files are in the folder of `place`."""
        return self.submit(script, *self.arguments(output_dir), *settings, **options)  # type: ignore[arg-type]

    def arguments(self, output_dir: str) -> list[str]:
        """Return the arguments of a program with the tiny settings."""
        root = self.place.folder
        folders = ("DATASETS.ROOT_DIR", root / "data", "DATASETS.CACHE_DIR", root / "cache")
        return list(map(str, ("--config_file", root / "tiny.yml", "OUTPUT_DIR", root / output_dir, *folders)))

    def end(self) -> None:
        """End all jobs, and wait until all nodes are ready."""
        for name in self.slurm.machines.names:
            if not self.slurm.machines.is_up(name):
                self.slurm.machines.boot(name)
                self.slurm.start_slurmd(name)
        if self._numbers:
            self.slurm.run("scancel", "--signal=KILL", "--full", *self._numbers, check=False)
            self.slurm.run("scancel", *self._numbers, check=False)
        self.slurm.resume_drained_nodes()
        self.slurm.wait_for_nodes()


class Job:
    """A submitted job."""

    def __init__(self, slurm: Cluster, number: int | str, folder: Path) -> None:
        self.slurm, self.number, self._folder = slurm, number, folder

    def task(self, index: int) -> Job:
        """Return one task of an array."""
        return Job(self.slurm, f"{self.number}_{index}", self._folder)

    def output(self) -> str:
        """Return what the job has printed so far, in all its starts."""
        file = self._folder / f"{self.number}.out"
        return file.read_text() if file.exists() else ""

    def wait_for(self, text: str, *, times: int = 1, timeout: float = PATIENCE) -> None:
        """Wait until the job has printed the text this many times."""
        deadline = time.monotonic() + timeout
        while self.output().count(text) < times:
            state = self.state()
            is_over = state["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            assert not is_over, f"job {self.number} is {state['JobState']}:\n{self.output()}"
            assert time.monotonic() < deadline, f"job {self.number} did not print {text!r}:\n{self.output()}"
            time.sleep(0.1)

    def state(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def ended(self, timeout: float = PATIENCE) -> tuple[str, int, int]:
        """Wait for the end; return the final state, the exit code and the number of requeues."""
        job = self.slurm.wait_for_job(self.number, timeout=timeout)
        return job["JobState"], int(job["ExitCode"].split(":")[0]), int(job["Restarts"])

    def signal(self, name: str, *options: str) -> None:
        self.slurm.run("scancel", f"--signal={name}", *options, self.number)


def assert_same_but_for_rounding(folder: Path, expected: Path) -> None:
    """Compare weights, optimizer and records."""
    assert newest(folder)["iteration"] == newest(expected)["iteration"]
    assert largest_difference(folder, expected) < 1e-9
    for kind in ("train", "val"):
        ours, theirs = (records(of, kind, speeds=False) for of in (folder, expected))
        assert [record["iteration"] for record in ours] == [record["iteration"] for record in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our.keys() == their.keys()
            numbers = [name for name, value in their.items() if isinstance(value, float)]
            assert [our[name] for name in numbers] == pytest.approx([their[name] for name in numbers], rel=1e-9)
