"""A long training needs no more memory, files or threads at its end than near its beginning."""

import gc
import os
import re
import statistics
import time
from pathlib import Path

import pytest
from program import TIMEOUT, Place, records

EVALUATIONS, STEPS = 20, 1000
# A small model, so that a step takes milliseconds; an epoch has 2 steps.
LONG = [
    *("MODEL.NAME", "timm/test_efficientnet", "SOLVER.MAX_EPOCHS", STEPS // 2, "SOLVER.EVAL_PERIOD", 25),
    *("SOLVER.CHECKPOINT_PERIOD", 25, "SOLVER.LOG_PERIOD", 2, "WANDB.LOG_IMAGES", "no"),
]
MAY_GROW = 8e6  # bytes between a fifth of the way and the end: allocators round; 10 kB lost a step would be as much


def lose_memory() -> None:
    """Make every record leak 64 kB; called before the program starts."""
    from reid.training.meters import TrainMeter

    publish, lost = TrainMeter._publish, []

    def leaking(self, trainer):
        publish(self, trainer)
        lost.append(bytearray(os.urandom(2**16)))

    TrainMeter._publish = leaking


def used(pid: int) -> tuple[int, int, int]:
    """Return the bytes of private memory, the open files and the threads of a process."""
    process = Path("/proc") / str(pid)
    match = re.search(r"^RssAnon:\s+(\d+) kB", (process / "status").read_text(), flags=re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1]), len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def growth(place: Place, folder: str, **options) -> tuple[float, float, float]:
    """Return the medians over the last fifth of the steps less those over the second fifth."""
    gc.collect()  # the forked process starts with what this one has
    ranks = place.start("train", "OUTPUT_DIR", folder, *LONG, **options)
    seen: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
    metrics, deadline = place.folder / folder / "metrics.jsonl", time.monotonic() + 10 * TIMEOUT
    while ranks.processes[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
        num_records = metrics.read_text().count('"train"') if metrics.exists() else 0
        step = 2 * num_records
        if STEPS // 5 <= step < 2 * STEPS // 5 or step >= 4 * STEPS // 5:
            try:
                seen[step >= 4 * STEPS // 5].append(used(ranks.pid()))
            except (OSError, AssertionError):  # it has ended meanwhile
                break
    (ended,) = ranks.ended()
    assert ended.code == 0, ended
    assert len(records(place.folder / folder, "val")) == EVALUATIONS
    early, late = ([statistics.median(column) for column in zip(*seen[part], strict=True)] for part in (False, True))
    return tuple(after - before for before, after in zip(early, late, strict=True))


@pytest.mark.slow
def test_memory_files_and_threads_do_not_grow_over_a_long_run(place):
    memory, files, threads = growth(place, "long")
    assert memory < MAY_GROW
    assert files <= 0
    assert threads <= 0


@pytest.mark.slow
def test_memory_leak_is_detected(place):
    memory, _, _ = growth(place, "leaking", before=lose_memory)
    assert memory > 2 * MAY_GROW
