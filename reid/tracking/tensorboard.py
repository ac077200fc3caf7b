"""TensorBoard files with the same names as in Weights & Biases; every rank calls, rank 0 writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reid.distributed import collectives
from reid.errors import SettingsError
from reid.process.side_effects import optional

if TYPE_CHECKING:
    from ignite.engine import Engine
    from torch.utils.tensorboard import SummaryWriter
    from yacs.config import CfgNode


class TensorBoard:
    """Event files with `train/*` and `val/*` over the iteration, if LOG.TENSORBOARD is set.

    The iteration is the axis of both: after an interruption, TensorBoard discards all values from one step on.

    Args:
        cfg: Complete configuration; LOG.TENSORBOARD is read.
        folder: Run directory.

    Raises:
        SettingsError: The package is not installed.
    """

    def __init__(self, cfg: CfgNode, folder: Path) -> None:
        self._is_on = bool(cfg.LOG.TENSORBOARD) and collectives.is_main()
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None
        with collectives.errors_shared():
            if self._is_on and not find_spec("tensorboard"):
                raise SettingsError(
                    "LOG.TENSORBOARD must be no without the package tensorboard, got yes. Fix: install it with "
                    "uv sync --extra tensorboard, or use LOG.TENSORBOARD no.",
                    key="LOG.TENSORBOARD",
                )

    @contextmanager
    def running(self, trainer: Engine) -> Iterator[None]:
        """Open a new event file around training; W&B, which copies such files, must already run."""
        if self._is_on:
            with optional("TensorBoard: nothing is written"):
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder.absolute()), purge_step=trainer.state.iteration + 1)
        try:
            yield
        finally:
            if self._writer is not None:
                with optional("TensorBoard: the last values are missing"):
                    self._writer.close()

    def log_row(self, section: str, numbers: Mapping[str, Any], iteration: int, epoch: int) -> None:
        """Write the numbers of a record; see `progress.attach_rows`."""
        del epoch
        writer, self._writer = self._writer, None  # one failure ends it
        if writer is not None:
            with optional("TensorBoard: nothing more is written"):
                for name, value in numbers.items():
                    writer.add_scalar(f"{section}/{name}", value, iteration)
                writer.flush()  # else a killed process loses the last two minutes
                self._writer = writer
