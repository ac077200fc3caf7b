"""Restarts of continuity.py: the real program under torchrun, interrupted in four ways."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tables import print_line, seconds_of, table

from reid.checkpoints.save import checkpoints_in
from reid.checkpoints.weights import read_file

HERE = Path(__file__).parent
TRAIN = (HERE.parent / "launch" / "train.py", "--config_file", HERE / "continuity.yml", "OUTPUT_DIR", "run")
EVERY = 3.0  # seconds between checkpoints
NUM_RANKS = 2
BATCH = 16  # continuity.yml's
PATIENCE = 120.0  # seconds; nothing here takes a quarter of it

FIRST_STEP = r"^epoch \d+/\d+ step"
# Stage until training resumes -> the log line that ends it. The first starts with the interruption or the command.
BY_TORCHRUN = ("torchrun notices, ends the others", r"Worker group FAILED")
BY_HAND = ("torchrun itself starts", r"starting workers for entrypoint")
STAGES = (
    ("rendezvous", r"Starting worker group"),
    ("processes start, import, form the group", r"^synthetic +ids"),
    ("data, model; checkpoint read and verified", r"^resuming from"),
    ("checkpoint handed to the ranks, loaded", r"^weights from the checkpoint"),
    ("the first step", FIRST_STEP),
)


class Job(NamedTuple):
    """torchrun with its ranks, and their output with the time of each line."""

    process: subprocess.Popen[str]
    lines: list[tuple[float, str]]


class Outcome(NamedTuple):
    """Measurements of one interruption."""

    cause: str
    seconds: list[float]  # of the stages
    reached: int  # iterations
    resumed_from: int
    seconds_a_step: float


def start(folder: Path) -> Job:
    launcher = ("--standalone", f"--nproc_per_node={NUM_RANKS}", "--max-restarts=3", "--shutdown-timeout=60")
    arguments = (*launcher, *TRAIN, "SOLVER.CHECKPOINT_EVERY_MINUTES", EVERY / 60)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "LOGLEVEL": "INFO"}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[tuple[float, str]] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic(), line.rstrip()))

    threading.Thread(target=read, daemon=True).start()
    return Job(process, lines)


def wait_for(job: Job, pattern: str, after: float) -> tuple[float, str]:
    """Time and text of the first line that matches and came after that time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for moment, line in list(job.lines):
            if moment > after and re.search(pattern, line):
                return moment, line
        time.sleep(0.01)
    output = "\n".join(line for _, line in job.lines[-20:])
    raise TimeoutError(f"torchrun's ranks did not print {pattern!r} within {PATIENCE:.0f} s, but:\n{output}")


def ranks_of(job: Job) -> dict[int, int]:
    """Return the process id of each rank, from torchrun's children."""
    pid = job.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pids = {}
    for child in children:
        match = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
        if match:
            pids[int(match[1])] = int(child)
    return pids


def last_iteration(folder: Path) -> int:
    """Return the last step with a record; the last line may be cut off."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    return int(json.loads([line for line in lines if line.endswith("\n")][-1])["iteration"])


def seconds_a_step(folder: Path) -> float:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()[-20:])
    speeds = sorted(record["images_per_second"] for record in records)
    return BATCH / float(speeds[len(speeds) // 2])


def outcome(cause: str, job: Job, first: tuple[str, str], started: float, before: tuple[int, float]) -> Outcome:
    """Wait until the job trains again; measure from the interruption or the command on."""
    seconds, moment, resumed_from = [], started, 0
    for _, pattern in (first, *STAGES):
        ended, line = wait_for(job, pattern, after=moment)
        seconds.append(ended - moment)
        moment = ended
        resumed_from = max(resumed_from, iteration_of(line))
    return Outcome(cause, seconds, before[0], resumed_from, before[1])


def train_a_while(folder: Path, phase: float) -> None:
    """Wait until a new checkpoint is complete, then for this part of the time to the next one."""
    known, deadline = set(checkpoints(folder)), time.monotonic() + PATIENCE
    while known.issuperset(checkpoints(folder)):
        assert time.monotonic() < deadline, f"no new checkpoint within {PATIENCE:.0f} s"
        time.sleep(0.01)
    time.sleep(EVERY * phase)


def checkpoints(folder: Path) -> list[Path]:
    return checkpoints_in(folder / "run" / "checkpoints", "last")


def iteration_of(text: str) -> int:
    match = re.search(r"last_\d+_(\d+)\.pt", text)
    return int(match[1]) if match else 0


def kill_rank(folder: Path, job: Job, rank: int) -> Outcome:
    started = time.monotonic()
    os.kill(ranks_of(job)[rank], signal.SIGKILL)
    wait_for(job, BY_TORCHRUN[1], after=started)  # all ranks have ended, and no record was removed yet
    before = last_iteration(folder), seconds_a_step(folder)
    return outcome(f"SIGKILL to rank {rank}, restarted by torchrun", job, BY_TORCHRUN, started, before)


def kill_all(folder: Path, job: Job) -> tuple[Outcome, Job]:
    for pid in (job.process.pid, *ranks_of(job).values()):
        os.kill(pid, signal.SIGKILL)
    job.process.wait()
    return by_hand("SIGKILL to all, by hand", folder)


def terminate(folder: Path, job: Job) -> tuple[Outcome, Job]:
    stop(folder, job)
    return by_hand("SIGTERM to torchrun, by hand", folder)


def by_hand(cause: str, folder: Path) -> tuple[Outcome, Job]:
    before = last_iteration(folder), seconds_a_step(folder)
    started = time.monotonic()
    job = start(folder)
    return outcome(cause, job, BY_HAND, started, before), job


def stop(folder: Path, job: Job) -> None:
    """Send SIGTERM, and measure how long the ranks and torchrun take to end."""
    started = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    saved, _ = wait_for(job, "stopped by a signal: saved", after=started)
    job.process.wait(PATIENCE)
    times = saved - started, time.monotonic() - started
    print_line(
        f"SIGTERM: saved after {times[0]:.2f} s, torchrun ended after {times[1]:.2f} s; reached step "
        f"{last_iteration(folder)}, newest checkpoint of step {iteration_of(checkpoints(folder)[-1].name)}"
    )


def restarts(folder: Path, *, quick: bool) -> None:
    print_line()
    job = start(folder)
    outcomes: list[Outcome] = []
    try:
        for rank, phase in ((1, 0.5),) if quick else ((1, 0.1), (0, 0.5), (1, 0.9)):
            train_a_while(folder, phase)
            outcomes.append(kill_rank(folder, job, rank))
        for interrupt in () if quick else (kill_all, terminate):
            train_a_while(folder, phase=0.5)
            done, job = interrupt(folder, job)
            outcomes.append(done)
        stop(folder, job)
    finally:
        end(job)
    report(outcomes)
    if not quick:
        checkpoint = checkpoints(folder)[-1]
        print_line(
            f"\nlimits, alone: python -c 'import reid.training.train', {NUM_RANKS} at a time: {import_seconds():.2f} "
            f"s; read_file of the checkpoint ({checkpoint.stat().st_size / 1e6:.0f} MB): "
            f"{seconds_of(lambda: read_file(checkpoint, 'OUTPUT_DIR')):.2f} s"
        )


def end(job: Job) -> None:
    """Kill torchrun and its ranks if they still run."""
    if job.process.poll() is None:
        for pid in (job.process.pid, *ranks_of(job).values()):
            os.kill(pid, signal.SIGKILL)
        job.process.wait()


def report(outcomes: list[Outcome]) -> None:
    names = [f"{BY_TORCHRUN[0]}; or {BY_HAND[0]}", *(name for name, _ in STAGES)]
    causes = [done.cause for done in outcomes]
    rows: list[list[object]] = [[name, *(done.seconds[i] for done in outcomes)] for i, name in enumerate(names)]
    rows.append(["all, until the first new step has ended", *(sum(done.seconds) for done in outcomes)])
    table("Seconds until training resumes", ["what", *causes], rows)
    rows = []
    for done in outcomes:
        lost = done.reached - done.resumed_from
        limit = 0.0 if "SIGTERM" in done.cause else EVERY
        rows.append([done.cause, done.reached, done.resumed_from, lost, lost * done.seconds_a_step, limit])
    header = [
        "cause",
        "step reached",
        "resumed from",
        "steps lost",
        "seconds of work",
        "limit s (an interval and a write)",
    ]
    table(f"Work lost, with a checkpoint every {EVERY:g} s", header, rows)


def import_seconds() -> float:
    started = time.monotonic()
    for process in [subprocess.Popen([sys.executable, "-c", "import reid.training.train"]) for _ in range(NUM_RANKS)]:
        process.wait()
    return time.monotonic() - started
