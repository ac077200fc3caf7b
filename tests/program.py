"""The program as its user starts it, repeatedly in one folder.

A start with torch takes ten seconds, so ranks are forked from a server that has imported it. The contribution of a real
launcher (arguments, variables, signals) is tested with the real one, by `Place.command`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from reid.config.load import dump, load_config
from reid.models.reid_model import build_model

REPOSITORY = Path(__file__).parent.parent
TRAIN, EVALUATE = REPOSITORY / "launch" / "train.py", REPOSITORY / "launch" / "evaluate.py"
TIMEOUT = 900  # seconds; ends a test that hangs, on the slowest machine

SMALL = "timm/test_resnet"

# One batch holds 4 of 8 people; an epoch has 2 batches.
TINY = """
MODEL: {NAME: resnet18, PRETRAIN_CHOICE: none, STEM_RELU: yes, DEVICE: cpu}
INPUT: {SIZE_TRAIN: [32, 16], SIZE_TEST: [32, 16], PADDING: 2}
DATASETS:
  NAMES: synthetic
  SYNTHETIC: {NUM_TRAIN_PIDS: 8, NUM_TEST_PIDS: 6, IMAGES_PER_PID: 6}
DATALOADER: {NUM_WORKERS: 0, NUM_INSTANCE: 4}
SOLVER:
  {OPTIMIZER_NAME: SGD, MAX_EPOCHS: 2, WARMUP_ITERS: 1, STEPS: [40], EVAL_PERIOD: 1, LOG_PERIOD: 1, IMS_PER_BATCH: 16}
TEST: {IMS_PER_BATCH: 8}
WANDB: {ENABLE: no, NUM_QUERIES: 1}
"""

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "reid.training.train",
        *(f"reid.commands.{name}" for name in ("evaluate", "export", "search")),
        *("reid.checkpoints.recorded_settings", "timm", "wandb", "program"),
    ]
)
_NUMBERS = count()


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str


class Place:
    """A folder with settings, data and caches, and an environment in which nothing is written elsewhere."""

    def __init__(self, folder: Path, settings: str = TINY) -> None:
        self.folder = folder
        foreign = re.compile(
            r"WANDB_|SLURM_|OMPI_|PMI_|RANK$|LOCAL_|WORLD_SIZE|MASTER_|TORCHELASTIC|ACCELERATE|PYTHONWARN"
        )
        self.environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        self.environment |= {
            "HOME": str(folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "MPLCONFIGDIR": str(folder / "matplotlib"),
            **{f"WANDB_{name}_DIR": str(folder / "wandb" / name.lower()) for name in ("DATA", "CACHE", "CONFIG")},
            "https_proxy": "http://127.0.0.1:9",  # no network
        }
        (folder / "home").mkdir()
        (folder / "tiny.yml").write_text(settings)

    def start(
        self,
        story: str,
        *settings: object,
        num_ranks: int = 1,
        environment: Mapping[str, str | None] | None = None,
        before: Callable[[], object] | None = None,
        bare: bool = False,
        folder: Path | None = None,
    ) -> Ranks:
        """Fork ranks with the tiny settings or, if `bare`, with the arguments only; None unsets a variable."""
        arguments = [*([] if bare else ["--config_file", "tiny.yml"]), *map(str, settings)]
        return self.fork(
            partial(_command, story, arguments, before), num_ranks=num_ranks, environment=environment, folder=folder
        )

    def fork(
        self,
        work: Callable[[], int],
        *,
        num_ranks: int = 1,
        environment: Mapping[str, str | None] | None = None,
        folder: Path | None = None,
    ) -> Ranks:
        """Start forked ranks that do any work (a picklable function) and exit with the code that it returns."""
        changed = {**self.environment, **(environment or {})}
        wanted = {name: value for name, value in changed.items() if value is not None}
        return Ranks(num_ranks, work, folder or self.folder, wanted)

    def run(self, story: str, *settings: object, **options: Any) -> list[Ended]:
        """Run all ranks to their end."""
        return self.start(story, *settings, **options).ended()

    def train(self, *settings: object, **options: Any) -> Ended:
        """Run a training that must succeed, and return its rank 0."""
        ended = self.run("train", *settings, **options)
        assert [rank.code for rank in ended] == [0] * len(ended), ended
        return ended[0]

    def refusal(self, story: str, *settings: object, code: int, **options: Any) -> str:
        """Return the one error line on stderr of a program that must end with this code."""
        first, *others = self.run(story, *settings, **options)
        assert first.code == code, first
        assert all(other.err == "" for other in others), others
        assert re.fullmatch(r"error: [^\n]+\n", first.err), first.err
        return first.err.removeprefix("error: ").removesuffix("\n")

    def command(self, *words: object, environment: Mapping[str, str] | None = None) -> Ended:
        """Run a real command to its end; programs of this virtual environment take precedence."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def wandb_records(self, output_dir: Path) -> list[dict[str, Any]]:
        """Return the records of the only offline run of this folder."""
        (file,) = output_dir.glob("wandb/offline-run-*/run-*.wandb")
        done = self.command("wandb", "leet", "inspect", file.parent, "--json")
        assert done.code == 0, done
        return [json.loads(line) for line in done.out.splitlines()]


class Ranks:
    """Forked processes with the environment of torchrun; a single one has that of a user's shell."""

    def __init__(
        self,
        num_ranks: int,
        work: Callable[[], int],
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._folder = folder / "output" / str(next(_NUMBERS))
        self._folder.mkdir(parents=True)
        for rank in range(num_ranks):
            for file in self._files(rank):
                file.touch()
        self.processes = [
            _FORKS.Process(
                target=_rank_main,
                args=(work, folder, {**environment, **group}, self._files(rank)),
            )
            for rank, group in enumerate(_group_variables(num_ranks))
        ]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read once, by the server
            for process in self.processes:
                process.start()

    def _files(self, rank: int) -> tuple[Path, Path]:
        return self._folder / f"{rank}.out", self._folder / f"{rank}.err"

    def pid(self, rank: int = 0) -> int:
        number = self.processes[rank].pid
        assert number is not None
        return number

    def wait_for(self, text: str, *, rank: int = 0, or_end: bool = False) -> None:
        """Wait until a rank has written this text to stdout."""
        deadline = time.monotonic() + TIMEOUT
        file = self._files(rank)[0]
        while text not in file.read_text():
            assert time.monotonic() < deadline, f"rank {rank} did not write {text!r}"
            if or_end and not self.processes[rank].is_alive():
                return
            assert self.processes[rank].is_alive(), f"rank {rank} ended before it wrote {text!r}"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to all ranks that are alive."""
        for rank, process in enumerate(self.processes):
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(self.pid(rank), number)

    def kill(self) -> None:
        """Kill all ranks, as a power failure does."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join(TIMEOUT)
            assert process.exitcode == -signal.SIGKILL

    def ended(self) -> list[Ended]:
        """Return every rank after all have ended; as under torchrun, the first that fails ends the others."""
        deadline, patience = time.monotonic() + TIMEOUT, 300
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                time.sleep(0.1)  # torchrun looks ten times a second, and its patience lasts 30 seconds
                patience -= 1
                self.signal(signal.SIGTERM if patience > 0 else signal.SIGKILL)
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"not ended after {TIMEOUT} s, see {self._folder}")
            time.sleep(0.01)
        codes = [process.exitcode or 0 for process in self.processes]
        return [Ended(code, *(file.read_text() for file in self._files(i))) for i, code in enumerate(codes)]


def _group_variables(num_ranks: int) -> list[dict[str, str]]:
    if num_ranks == 1:
        return [{}]
    group = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank_main(
    work: Callable[[], int],
    folder: Path,
    environment: dict[str, str],
    files: tuple[Path, Path],
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        code = work()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.exit(code)


def _command(story: str, words: Sequence[str], before: Callable[[], object] | None) -> int:
    sys.argv = [f"{story}.py", *words]
    from reid.commands.main import main

    if before is not None:
        before()
    return main(story)


def wait_for_file(pattern: str | Path) -> Path:
    """Return the first file of this pattern as soon as one exists."""
    pattern, deadline = Path(pattern), time.monotonic() + TIMEOUT
    while not (files := sorted(pattern.parent.glob(pattern.name))):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.005)
    return files[0]


def first_rank_is_slow() -> None:
    """Delay rank 0 by one second; called before the program starts."""
    if os.environ.get("RANK") == "0":
        time.sleep(1)


class _NoTorchvision:
    def find_spec(self, name: str, *_: object) -> None:
        if name == "reid.training.train":
            raise RuntimeError("operator torchvision::nms does not exist")


def torchvision_is_of_another_torch() -> None:
    """Make the import fail as a torchvision of another torch does; called before the program starts."""
    import reid.training

    del sys.modules["reid.training.train"], reid.training.train
    sys.meta_path.insert(0, _NoTorchvision())  # type: ignore[arg-type]


# ---- files of a run ----


def records(folder: Path, kind: str, *, speeds: bool = True) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    of_kind = [record for record in map(json.loads, lines) if record["kind"] == kind]
    left_out = () if speeds else ("images_per_second", "data_wait", "gpu_mem_max_mb")
    return [{name: value for name, value in record.items() if name not in left_out} for record in of_kind]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def newest(folder: Path) -> dict:
    return torch.load(sorted(folder.glob("checkpoints/last_*.pt"))[-1], weights_only=True)


def untrained(file: Path, *settings: str, seed: int = 0, **more: object) -> Path:
    """Write a checkpoint of the tiny model with random weights and statistics."""
    (file.parent / "tiny.yml").write_text(TINY)
    cfg = load_config(str(file.parent / "tiny.yml"), list(settings))
    torch.manual_seed(seed)
    model = build_model(cfg, num_pids=8)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bn.weight")):
            value.normal_(std=0.1)
    torch.save({"model": model.state_dict(), "config": dump(cfg), "epoch": 3, **more}, file)
    return file


def same(left: object, right: object) -> bool:
    """Return whether two nested structures are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def largest_difference(folder: Path, expected: Path) -> float:
    """Return the largest difference of weights and optimizer states, relative to each entry's largest value."""
    pairs = []
    for part in ("model", "optimizer"):
        pairs += _pairs(newest(folder)[part], newest(expected)[part])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


def _pairs(left: object, right: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(left, torch.Tensor):
        return [(left.double(), right.double())] if left.numel() else []
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        return [pair for key in left for pair in _pairs(left[key], right[key])]
    return [pair for a, b in zip(left, right, strict=True) for pair in _pairs(a, b)] if isinstance(left, list) else []
