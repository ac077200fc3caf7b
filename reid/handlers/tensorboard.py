"""TensorBoard: every rank calls, rank 0 writes; the same names as in Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ignite.engine import Engine, Events
from ignite.handlers.tensorboard_logger import OutputHandler, TensorboardLogger

from reid import distributed
from reid.errors import SettingsError
from reid.handlers.records import Progress, Records, validation_numbers

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.tensorboard")


class TensorBoard:
    """Event files with `train/*` and `val/*` over the iteration, where LOG.TENSORBOARD asks for them.

    The iteration is the axis of both, as TensorBoard's own means of going on after an interruption is one step from
    which on all earlier values do not count.

    Args:
        cfg: the whole configuration; LOG.TENSORBOARD is read.
        folder: of the run.

    Raises:
        SettingsError: no package for it is installed.
    """

    def __init__(self, cfg: CfgNode, folder: Path) -> None:
        self._is_wanted = bool(cfg.LOG.TENSORBOARD)
        self._folder = folder / "tensorboard"
        self._logger: TensorboardLogger | None = None
        distributed.together(self._check_package)

    def _check_package(self) -> None:
        if self._is_wanted and distributed.is_main() and not find_spec("tensorboard"):
            raise SettingsError(
                "LOG.TENSORBOARD yes needs the package tensorboard, which is not installed; install it with: "
                "uv sync --extra tensorboard, or use LOG.TENSORBOARD no",
                key="LOG.TENSORBOARD",
            )

    def attach(self, trainer: Engine, progress: Progress) -> None:
        """Attach it behind the checkpoints, which know the best validation."""
        train = OutputHandler("train", metric_names="all", global_step_transform=_iteration)
        val = OutputHandler(
            "val", output_transform=lambda _: validation_numbers(progress), global_step_transform=_iteration
        )
        trainer.add_event_handler(Records.TRAIN, self._write, train)
        trainer.add_event_handler(Records.VALIDATION, self._write, val)

    @contextmanager
    def running(self, trainer: Engine) -> Iterator[None]:
        """A new event file around training; W&B, which copies such files, must know its run before."""
        if self._is_wanted and distributed.is_main():
            self._open(trainer.state.iteration)
        try:
            yield
        finally:
            self._close()

    def _open(self, iteration: int) -> None:
        try:
            self._logger = TensorboardLogger(str(self._folder.absolute()), purge_step=iteration + 1)
        except OSError as error:
            self._give_up(error)

    def _write(self, trainer: Engine, handler: OutputHandler) -> None:
        if self._logger is None:
            return
        try:
            handler(trainer, self._logger, Events.ITERATION_COMPLETED)
            self._logger.writer.flush()  # or a killed process would lose the last two minutes
        except OSError as error:
            self._give_up(error)

    def _close(self) -> None:
        if self._logger is not None:
            try:
                self._logger.close()
            except OSError as error:
                self._give_up(error)
        self._logger = None

    def _give_up(self, error: OSError) -> None:
        self._logger = None
        logger.warning("warning: TensorBoard: gives up, and training goes on (%s)", error)


def _iteration(trainer: Engine, event: object) -> int:
    del event
    return trainer.state.iteration
