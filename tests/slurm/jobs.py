"""Jobs as a user submits them, of the scripts of this repository, and what becomes of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from program import REPOSITORY, Place, largest_difference, newest, records

PATIENCE = 1500  # seconds to wait for what takes a minute on a machine that has nothing else to do

# A small model, as four ranks share two cores; of resnet18 a checkpoint alone is 270 MB, and some tests write one a
# step.
EXACT = (
    *("SOLVER.PRECISION", "fp64", "SOLVER.OPTIMIZER_NAME", "Adam", "SOLVER.LOG_PERIOD", 1),
    *("MODEL.NAME", "timm/test_resnet"),
)
TRAINING = "python.* -u launch/train.py"  # a rank, not torchrun
# Two nodes of two ranks each.
TWO_BY_TWO = ("--nodes=2", "--gres=gpu:2", "--cpus-per-task=4")


class Jobs:
    """Submitted in one place."""

    def __init__(self, slurm: Cluster, place: Place) -> None:
        self.slurm, self.place = slurm, place
        self._numbers: list[int] = []

    def submit(self, script: str, *arguments: object, options: tuple[object, ...] = TWO_BY_TWO, **where: Any) -> Job:
        """sbatch OPTIONS slurm/SCRIPT ARGUMENTS, from the root of the repository."""
        return self._sbatch(*options, Path("slurm") / script, *arguments, **where)

    def wrap(self, command: str, *, options: tuple[object, ...]) -> Job:
        """A job of a single command, from the root of the repository."""
        return self._sbatch(*options, "--wrap", command)

    def _sbatch(self, *words: object, environment: dict[str, str] | None = None, repository: Path = REPOSITORY) -> Job:
        folder = self.place.folder / "jobs"
        folder.mkdir(exist_ok=True)
        own = {"VENV_BIN": str(Path(sys.executable).parent), **(environment or {})}
        number = self.slurm.submit(
            f"--output={folder}/%j.out" if "--array" not in str(words) else f"--output={folder}/%A_%a.out",
            *words,
            cwd=repository,
            environment={**self.place.environment, **own},
        )
        self._numbers.append(number)
        return Job(self.slurm, number, folder)

    def train(self, script: str, output_dir: str, *settings: object, **options: object) -> Job:
        """A training with the tiny settings; all its files are in the place."""
        return self.submit(script, *self.arguments(output_dir), *settings, **options)  # type: ignore[arg-type]

    def arguments(self, output_dir: str) -> list[str]:
        """Of the program, for one with the tiny settings."""
        place = self.place.folder
        folders = ("DATASETS.ROOT_DIR", place / "data", "DATASETS.CACHE_DIR", place / "cache")
        return list(map(str, ("--config_file", place / "tiny.yml", "OUTPUT_DIR", place / output_dir, *folders)))

    def end(self) -> None:
        """Nothing of it runs any more, and all nodes are ready."""
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
    """One that was submitted."""

    def __init__(self, slurm: Cluster, number: int | str, folder: Path) -> None:
        self.slurm, self.number, self._folder = slurm, number, folder

    def task(self, index: int) -> Job:
        """One of an array."""
        return Job(self.slurm, f"{self.number}_{index}", self._folder)

    def said(self) -> str:
        """What it has printed so far, in all its starts."""
        file = self._folder / f"{self.number}.out"
        return file.read_text() if file.exists() else ""

    def wait_for(self, words: str, *, times: int = 1, timeout: float = PATIENCE) -> None:
        """Until it has printed this so many times."""
        deadline = time.monotonic() + timeout
        while self.said().count(words) < times:
            state = self.state()
            is_over = state["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            assert not is_over, f"job {self.number} is {state['JobState']}:\n{self.said()}"
            assert time.monotonic() < deadline, f"job {self.number} did not say {words!r}:\n{self.said()}"
            time.sleep(0.1)

    def state(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def ended(self, timeout: float = PATIENCE) -> tuple[str, int, int]:
        """Slurm's word for how it has ended, its exit code, and the number of requeues."""
        job = self.slurm.wait_for_job(self.number, timeout=timeout)
        return job["JobState"], int(job["ExitCode"].split(":")[0]), int(job["Restarts"])

    def signal(self, name: str, *options: str) -> None:
        self.slurm.run("scancel", f"--signal={name}", *options, self.number)


def assert_same_but_for_rounding(folder: Path, expected: Path) -> None:
    """Weights, optimiser and records."""
    assert newest(folder)["iteration"] == newest(expected)["iteration"]
    assert largest_difference(folder, expected) < 1e-9
    for kind in ("train", "val"):
        ours, theirs = (records(of, kind, speeds=False) for of in (folder, expected))
        assert [record["iteration"] for record in ours] == [record["iteration"] for record in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our.keys() == their.keys()
            numbers = [name for name, value in their.items() if isinstance(value, float)]
            assert [our[name] for name in numbers] == pytest.approx([their[name] for name in numbers], rel=1e-9)
