"""A real Slurm, and machines with separate networks; tests are skipped where these cannot run.

REQUIRE_SLURM=1 and REQUIRE_NETNS=1 turn the skip into a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cluster
import machines
import pytest
from cluster import Cluster
from jobs import Jobs
from machines import Machines
from program import REPOSITORY, Place


def _refuse(reason: str, variable: str) -> None:
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, n1 and n2, with 8 processors and 8 fake GPUs each."""
    reason = cluster.missing()
    if reason:
        _refuse(reason, "REQUIRE_SLURM")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def jobs(slurm: Cluster, place: Place) -> Iterator[Jobs]:
    """Jobs of the scripts of this repository; the teardown ends running jobs and boots dead nodes."""
    submitted = Jobs(slurm, place)
    yield submitted
    submitted.end()


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[Machines]:
    """Machines n1 and n2, without Slurm."""
    reason = machines.missing()
    if reason:
        _refuse(reason, "REQUIRE_NETNS")
    with Machines(tmp_path / "machines") as running:
        yield running


# The program with longer steps, so that a signal arrives in the middle of a training on fast machines too.
SLOW_TRAIN = """
import time
from reid.training.criterion import Criterion
from reid.commands.main import exit_process, main

original = Criterion.__call__
def slow(*arguments):
    time.sleep(1)
    return original(*arguments)
Criterion.__call__ = slow
exit_process(main("train"))
"""


@pytest.fixture(scope="session")
def slow_repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    (folder / "slurm").symlink_to(REPOSITORY / "slurm")
    (folder / "launch").mkdir()
    for file in (REPOSITORY / "launch").glob("*.py"):
        if file.name != "train.py":
            (folder / "launch" / file.name).symlink_to(file)
    (folder / "launch" / "train.py").write_text(SLOW_TRAIN)
    return folder


@pytest.fixture(scope="session")
def alone(place):
    """Return a function that maps settings to the folder of the undisturbed run of one process."""
    done = {}

    def run(*settings):
        if settings not in done:
            done[settings] = place.folder / f"alone_{len(done)}"
            (process,) = place.start("train", "OUTPUT_DIR", done[settings].name, *settings).processes
            process.join(900)  # on a busy machine
            assert process.exitcode == 0
        return done[settings]

    return run
