"""Checkpoints of a training: last_*.pt to resume from and best_*.pt to use; saving by epoch, clock and signal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from ignite.engine import Engine, Events
from torch import Tensor

from reid.checkpoints.save import BackgroundWriter, checkpoints_in, host_copy, save_atomically
from reid.checkpoints.weights import load_state, read_file
from reid.config.load import dump
from reid.distributed import collectives
from reid.distributed.accelerator import full_tensors, load_optimizer
from reid.errors import NonFiniteError, TakenOverError, UnsavedError, WorldError, shared
from reid.process.signals import Preempted, Signals
from reid.runs.progress import Progress, Records, SavedCheckpoint
from reid.training.build import Training

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_FORMAT = 3
_NUM_LAST = 2  # a file is deleted only when this many newer ones are complete
# Settings that a resumed run may change, as prefixes of keys: they affect neither what is learned nor how.
_FREE = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.PRETRAIN_",
    "DATASETS.ROOT_DIR",
    "DATASETS.CACHE_DIR",
    "DATASETS.DEVICE_CACHE",
    "DATASETS.NODE_LOCAL_DIR",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_EPOCHS",
    "MODEL.COMPILE",
    "MODEL.CHANNELS_LAST",
    "SOLVER.FUSED",
    "SOLVER.SHARDING",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_EVERY_MINUTES",
    "SOLVER.LOG_PERIOD",
    "SOLVER.EVAL_PERIOD",
    "SOLVER.TIMEOUT_MINUTES",
    "TEST.",
    "LOG.",
    "WANDB.",
)


class Checkpoints:
    """Everything that training needs to resume, saved by rank 0.

    The state is the same on every rank and for every number of ranks, so any number of ranks can resume from it.
    Everything else is a function of (seed, epoch, step): the plan, the augmentation, the learning rate.

    Training pauses only while the state is copied into host memory; a thread writes the file. A failed write is a
    warning, because the file before it remains; it is an error only at the end.

    Args:
        cfg: Complete configuration.
        folder: Folder of the files.
        dataset: Fingerprint of the training data.
        training: Training whose state is saved and restored.
        progress: Progress, which is saved, and updated on resume.
        on_saved: Function called on rank 0 with each complete file, before the next one is written.
        verify: Function called before each file is renamed, which raises if this process must not write any more.
    """

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        dataset: str,
        training: Training,
        progress: Progress,
        *,
        on_saved: Callable[[SavedCheckpoint], None] = lambda saved: None,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        self._cfg, self._folder, self._dataset = cfg, folder, dataset
        self._training, self._progress = training, progress
        self._on_saved, self._verify = on_saved, verify
        self._writer = BackgroundWriter()
        self._started_at = time.monotonic()
        self._being_written: SavedCheckpoint | None = None
        self._copied: dict[str, Any] = {}  # the previous copy, whose memory is reused
        self._lost: dict[str, WorldError] = {}  # last or best -> why its newest file was not written

    def attach(self, trainer: Engine) -> None:
        """Save each new best model, every SOLVER.CHECKPOINT_PERIOD epochs, and after the last epoch."""
        trainer.add_event_handler(Records.VALIDATION, self._save_best)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save_periodically)

    def save_and_stop_on_request(self, trainer: Engine, signals: Signals) -> None:
        """Save when the clock or a signal asks a rank for it: all ranks do so at the same step, one step later.

        Raises:
            Preempted: A signal came; raised from the engine on all ranks, and the caller must save.
        """
        consensus = collectives.Consensus()
        save, stop = 1, 2

        @trainer.on(Events.ITERATION_COMPLETED)
        def exchange(engine: Engine) -> None:
            request = consensus.exchange(stop if signals.were_received() else save if self._is_due() else 0)
            if request == stop:
                raise shared(Preempted())
            if request == save:
                self.save(engine)

    def _is_due(self) -> bool:
        """Return whether a checkpoint is due by the clock, on rank 0; once, and not while another is being written."""
        minutes = self._cfg.SOLVER.CHECKPOINT_EVERY_MINUTES
        if not minutes or not collectives.is_main() or self._writer.is_busy:
            return False
        if time.monotonic() - self._started_at < 60 * minutes:
            return False
        self._started_at = time.monotonic()
        return True

    def save(self, trainer: Engine) -> None:
        """Start to write last_*.pt of the last step; called by all ranks."""
        state, scaler = trainer.state, self._training.scaler
        epoch = -(-state.iteration // (state.epoch_length or 1))  # both counted from 1
        content = {
            "iteration": state.iteration,
            "epoch": epoch,
            "epoch_length": state.epoch_length,
            "optimizer": full_tensors(self._training.optimizer.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": asdict(self._progress),
            "meter": self._training.meter.state_dict(),
        }
        self._write(f"last_{epoch:04d}_{state.iteration:08d}.pt", content, state.iteration, num_kept=_NUM_LAST)

    def finish(self) -> None:
        """Wait until all files are written; called by all ranks.

        Raises:
            UnsavedError: The newest last_*.pt or best_*.pt could not be written.
        """
        with collectives.errors_shared():
            self._wait()
            if self._lost:
                errors = " ".join(map(str, self._lost.values()))
                raise UnsavedError(f"{errors} Then start again to resume from {self._newest()}.", key="OUTPUT_DIR")

    def _save_best(self, trainer: Engine) -> None:
        best = self._progress.best
        if best is not None and self._progress.last_is_best:
            name = f"best_{best['epoch']:04d}_mAP_{best['mAP']:.4f}.pt"
            self._write(name, {"epoch": best["epoch"], "validation": best}, best["iteration"], num_kept=1)

    def _save_periodically(self, trainer: Engine) -> None:
        epoch = trainer.state.epoch
        if epoch % self._cfg.SOLVER.CHECKPOINT_PERIOD == 0 or epoch == trainer.state.max_epochs:
            self.save(trainer)

    def _write(self, name: str, content: dict[str, Any], iteration: int, *, num_kept: int) -> None:
        weights = full_tensors(self._training.model.state_dict())
        content |= {"format": _FORMAT, "model": weights, "config": dump(self._cfg), "dataset": self._dataset}
        content |= {"wandb_run_id": self._progress.wandb_run_id}
        with collectives.errors_shared():
            _check_finite(weights)  # the loss does not cover the last step
        if collectives.is_main():
            self._wait()
            self._started_at = time.monotonic()
            copied, kind, file = host_copy(content, self._copied), name.split("_")[0], self._folder / name
            self._copied |= copied
            metadata = {**(self._progress.last or {}), "epoch": content["epoch"], "iteration": iteration}
            self._being_written = SavedCheckpoint(kind, file, metadata)
            self._writer.start(kind, lambda: _write_and_rotate(file, copied, num_kept, self._verify))

    def _wait(self) -> None:
        """Wait for the previous write; a failure is reported now, and forgotten with the next success."""
        kind, error = self._writer.wait()
        if isinstance(error, TakenOverError):
            raise error
        self._lost.pop(kind, None)
        saved, self._being_written = self._being_written, None
        if error is None and saved is not None:
            self._on_saved(saved)
        if error is not None:
            self._lost[kind] = error
            logger.warning("warning: %s Training continues; the newest checkpoint is %s.", error, self._newest())

    def _newest(self) -> str:
        files = checkpoints_in(self._folder, "last")
        return str(files[-1]) if files else "none"

    def resume(self, trainer: Engine) -> bool:
        """Load the newest good last_*.pt, if there is one; called by all ranks after accelerate's `prepare`.

        Raises:
            WorldError: Every checkpoint is damaged, or the newest good one has another configuration, benchmark or
                model.
        """
        content = collectives.from_rank_zero(self._read_newest)
        if content is None:
            return False
        training = self._training
        with collectives.errors_shared():
            load_state(training.model, content["model"], f"the checkpoint in {self._folder}", key="OUTPUT_DIR")
        load_optimizer(training.optimizer, content["optimizer"])
        if training.scaler is not None:
            training.scaler.load_state_dict(content["scaler"])
        training.meter.load_state_dict(content["meter"])
        self._progress.load_state_dict(content["progress"])
        position = {name: content[name] for name in ("iteration", "epoch_length")}
        max_epochs = max(self._cfg.SOLVER.MAX_EPOCHS, content["epoch"])  # Ignite accepts no less
        trainer.load_state_dict(position | {"max_epochs": max_epochs})
        return True

    def _read_newest(self) -> dict[str, Any] | None:
        damaged: list[tuple[Path, str]] = []
        for file in reversed(checkpoints_in(self._folder, "last")):
            try:
                content = read_file(file, "OUTPUT_DIR")
            except WorldError as error:
                damaged.append((file, str(error.__cause__ or error).partition(". ")[0]))
                continue
            self._check_fits(file, content)
            for broken, reason in damaged:
                renamed = broken.rename(f"{broken}.damaged")  # so that it does not count as a checkpoint
                logger.warning(
                    f"warning: {broken} is damaged ({reason}) and was renamed to {renamed.name}; resuming from the one "
                    f"before it, {file}"
                )
            epoch_length = content["epoch_length"]
            step = (content["iteration"] - 1) % epoch_length + 1
            logger.info(f"resuming from {file}: epoch {content['epoch']}, step {step} of {epoch_length} is done")
            return content
        if damaged:
            raise WorldError(
                f"one of {self._folder}/last_*.pt must be complete, but none is: {damaged[0][0]} is damaged "
                f"({damaged[0][1]}). Fix: remove them to start from scratch, or choose another OUTPUT_DIR.",
                key="OUTPUT_DIR",
            )
        return None

    def _check_fits(self, file: Path, content: dict[str, Any]) -> None:
        if content.get("format") != _FORMAT:
            raise WorldError(
                f"{file} must have format {_FORMAT}, got {content.get('format')}. Fix: choose another OUTPUT_DIR.",
                key="OUTPUT_DIR",
            )
        differences = _differences(yaml.safe_load(content["config"]), yaml.safe_load(dump(self._cfg)))
        if content["dataset"] != self._dataset:
            differences.append("the images of the benchmark differ")
        if differences:
            raise WorldError(
                f"{file} must be from this run, but {'; '.join(differences)}. Fix: use the same settings and data to "
                "resume, or another OUTPUT_DIR to start from scratch.",
                key="OUTPUT_DIR",
            )


def _write_and_rotate(file: Path, content: dict[str, Any], num_kept: int, verify: Callable[[], None]) -> None:
    save_atomically(file, content, verify)
    others = [other for other in checkpoints_in(file.parent, file.name.split("_")[0]) if other != file]
    for old in others[: len(others) - (num_kept - 1)]:
        old.unlink(missing_ok=True)


def _differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe each setting that a resumed run must not change and that differs."""
    differences = []
    for key in sorted(saved.keys() | current.keys()):
        name, before, now = prefix + key, saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            differences += _differences(before, now, f"{name}.")
        elif before != now and not name.startswith(_FREE):
            differences.append(f"{name} was {before!r} and is now {now!r}")
    return differences


def _check_finite(weights: dict[str, Tensor]) -> None:
    are_finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()  # waits for the device
    broken = [name for name, is_finite in zip(weights, are_finite, strict=True) if not is_finite]
    if broken:
        raise NonFiniteError(
            f"{len(broken)} of {len(weights)} entries of the model are no longer finite ({broken[0]} first) and are "
            "not saved. Fix: lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS, or use SOLVER.PRECISION fp32.",
            key="SOLVER.BASE_LR",
        )
