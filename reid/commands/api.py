"""The commands `train` and `evaluate` as functions of the public Python API."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from reid.commands.evaluate import evaluate as evaluate_on_all_ranks
from reid.config.rules import validate_training
from reid.distributed.launch_environment import read_world
from reid.distributed.session import session
from reid.process.signals import SIGNALS, Signals
from reid.training.train import train as train_on_all_ranks

if TYPE_CHECKING:
    from yacs.config import CfgNode


def train(cfg: CfgNode) -> dict[str, Any]:
    """Train, or resume, in this process alone or on every rank of a launcher, which must all call it.

    Lines go to the logger "reid"; files go to OUTPUT_DIR, as with `reid train`.

    Returns:
        The scores of the last evaluation as in result.json ("mAP", "mINP", "rank-1", ..., as fractions, "epoch"), and
        under "best" those of the best one.

    Raises:
        ReidError: The settings, the data or the machines do not allow the run; the message names the setting.
        Preempted: A signal came, and everything is saved: call it again to resume. It is no Exception, so that no
            library catches it.

    Example:
        >>> cfg = reid.load_config("configs/demo.yml", ["SOLVER.MAX_EPOCHS=2"])
        >>> reid.train(cfg)["mAP"]
        0.31
    """
    validate_training(cfg, read_world(os.environ).num_ranks)
    return _run(train_on_all_ranks, cfg)


def evaluate(cfg: CfgNode) -> dict[str, Any]:
    """Evaluate TEST.WEIGHT, in this process alone or on every rank of a launcher, which must all call it.

    Returns:
        The content of result.json: "mAP", "mINP", "rank-1", ... as fractions, "num_valid_queries", "epoch", "weight".

    Raises:
        ReidError: As in `train`.

    Example:
        >>> cfg = reid.load_config("configs/demo.yml", ["TEST.WEIGHT=runs/demo/checkpoints/best_0010.pt"])
        >>> reid.evaluate(cfg)["rank-1"]
        0.62
    """
    return _run(evaluate_on_all_ranks, cfg)


def _run(work: Callable[..., dict[str, Any]], cfg: CfgNode) -> dict[str, Any]:
    world = read_world(os.environ)
    signals = Signals(under_launcher="TORCHELASTIC_RUN_ID" in os.environ)
    with _logged(world.rank), session(world, cfg, keep_group=True) as accelerator, _installed(signals):
        return work(cfg, accelerator, signals)


@contextmanager
def _logged(rank: int) -> Iterator[None]:
    """Log what log.txt needs, on rank 0; afterwards close log.txt, and with it the lock of the run directory."""
    logger = logging.getLogger("reid")
    level, handlers = logger.level, list(logger.handlers)
    logger.setLevel(logging.ERROR if rank else min(logger.getEffectiveLevel(), logging.INFO))
    ignite, silent = logging.getLogger("ignite"), logging.NullHandler()  # Ignite repeats every error
    ignite.addHandler(silent)
    try:
        yield
    finally:
        ignite.removeHandler(silent)
        logger.setLevel(level)
        for handler in set(logger.handlers).difference(handlers):
            logger.removeHandler(handler)
            handler.close()


@contextmanager
def _installed(signals: Signals) -> Iterator[None]:
    """Handle signals meanwhile; Python lets only the main thread do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    signals.install()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
