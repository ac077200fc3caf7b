"""Seconds that W&B costs a run when it cannot be reached, and what the run logs; with a server on this machine.

    uv run python benchmarks/wandb_outages.py [TEXT IN THE NAME OF A CASE ...]

Every case is a separate run with the default settings: 100 rows, a table and a checkpoint before the outage and as many
after it. It prints the seconds until training can start, the seconds of waiting during it, and those from its end to
the end of the process; then what has arrived once the server is back and the command of the last log line was run.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tables import print_line

from reid.config.load import load_config
from reid.evaluation.ranked_galleries import FigureSet, Table
from reid.runs.progress import Progress, SavedCheckpoint
from reid.tracking.tracker import Tracker

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

NUM_ROWS = 100

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["reid.tracking.tracker", "wandb", "wandb_outages"])


def main() -> None:
    print_line("| case | start (s) | waits during training (s) | end (s) | rows, tables, checkpoints at W&B |")
    print_line("|---|---|---|---|---|")
    logs = []
    for case in CASES:
        if all(text in case.name for text in sys.argv[1:]):
            measured, arrived = measure(case)
            seconds = " | ".join(f"{measured[name]:.1f}" for name in ("begin", "between", "end"))
            print_line(f"| {case.name} | {seconds} | {arrived} |")
            logs.append(f"{case.name}:\n" + "\n".join(f"    {line}" for line in measured["log"]))
    print_line("\n" + "\n".join(logs))


class Case(NamedTuple):
    """An outage of W&B.

    Attributes:
        name: Name in the table.
        moment: Moment before which the outage starts: begin, first, middle, end, or never.
        act: Function that changes the server then.
        environment: Changes to the variables of the server.
    """

    name: str
    moment: str
    act: Callable[[Any], object]
    environment: dict[str, str]


def _silent(server: Any) -> None:
    server.mute.set()


def _answers(status: int) -> Callable[[Any], object]:
    return lambda server: setattr(server, "status", status)


def _gone(server: Any) -> None:
    server.stop()


CASES = (
    Case("a server", "never", _gone, {}),
    Case("no key", "begin", _gone, {"WANDB_API_KEY": ""}),
    Case("a key that is too short", "begin", _gone, {"WANDB_API_KEY": "short"}),
    Case("a key that the server rejects (401)", "begin", _answers(401), {}),
    Case("connections refused at the start", "begin", _gone, {}),
    Case("a black hole at the start", "begin", _silent, {}),
    Case("HTTP 500 at the start", "begin", _answers(500), {}),
    Case("connections refused before the first artifact", "first", _gone, {}),
    Case("a black hole before the first artifact", "first", _silent, {}),
    Case("connections refused in the middle", "middle", _gone, {}),
    Case("a black hole in the middle", "middle", _silent, {}),
    Case("HTTP 500 in the middle", "middle", _answers(500), {}),
    Case("HTTP 401 in the middle", "middle", _answers(401), {}),
    Case("connections refused at the end", "end", _gone, {}),
    Case("a black hole at the end", "end", _silent, {}),
)


def measure(case: Case) -> tuple[dict[str, Any], str]:
    """Return what the run reports, and what W&B has of it once it can be reached again."""
    from wandb_server import WandbServer

    server = WandbServer()
    with tempfile.TemporaryDirectory() as folder:
        of_server = {name: value for name, value in server.environment.items() if value is not None}
        foreign = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment = {**foreign, **of_server, "HOME": folder}
        here, there = _FORKS.Pipe()
        process = _FORKS.Process(target=run, args=(folder, environment | case.environment, there))
        process.start()
        for moment in ("begin", "first", "middle", "end"):
            assert here.recv() == moment
            if moment == case.moment:
                case.act(server)
            here.send("continue")
        measured = here.recv()
        left = time.monotonic()
        process.join()
        measured["end"] += time.monotonic() - left
        server.mute.clear()
        server.status = 0
        server.stop()
        server.again()
        command = measured["log"][-1].partition("send it with: ")[2]
        if command:
            arguments = [sys.executable, "-m", *shlex.split(command)]
            subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, check=True)
        arrived = _arrived(server)
    server.stop()
    return measured, arrived


def _arrived(server: Any) -> str:
    rows = {row["test/step"] for run in server.runs.values() for row in run.history if "test/step" in row}
    kinds = [artifact.type for artifact in server.artifacts if artifact.state == "COMMITTED"]
    return f"{len(rows)}, {kinds.count('run_table')}, {kinds.count('model')}"


class Run:
    """A run that reports each moment and waits for an answer before it continues."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._folder = connection, Path("run")
        self._folder.mkdir()
        cfg = load_config(None, ["OUTPUT_DIR=run"])
        self._tracker = Tracker(cfg, self._folder, {"dataset": "1234", "world_size": 1}, ["market1501"])
        self._num_steps, self._waited = 0, 0.0

    def run(self) -> dict[str, float]:
        """Run, and return the seconds by moment."""
        self._pause("begin")
        start = time.monotonic()
        with self._tracker.training(Progress()):
            startup = time.monotonic() - start
            self._pause("first")
            self._train(1)
            self._pause("middle")
            self._train(2)
            self._pause("end")
            start = time.monotonic()
        return {"begin": startup, "between": self._waited, "end": time.monotonic() - start}

    def _train(self, epoch: int) -> None:
        file = self._folder / f"best_{epoch}.pt"
        file.write_bytes(os.urandom(1_000_000))
        start = time.monotonic()
        for _ in range(NUM_ROWS):
            self._num_steps += 1
            self._tracker.log_row("test", {"step": self._num_steps}, None, epoch)
        table = Table("val/AP_per_query", ["query", "AP"], [[str(epoch), 0.5]])
        self._tracker.show(FigureSet(self._num_steps, epoch, tables=[table]))
        facts = {"epoch": epoch, "iteration": self._num_steps, "mAP": 0.5}
        self._tracker.keep_checkpoint(SavedCheckpoint("best", file, facts))
        self._waited += time.monotonic() - start
        time.sleep(4)

    def _pause(self, moment: str) -> None:
        self._connection.send(moment)
        self._connection.recv()


def run(folder: str, environment: dict[str, str], connection: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    log = io.StringIO()
    logging.getLogger("reid").addHandler(logging.StreamHandler(log))
    logging.getLogger("reid").setLevel(logging.INFO)
    seconds = Run(connection).run()
    connection.send(seconds | {"log": log.getvalue().splitlines()})


if __name__ == "__main__":
    main()
