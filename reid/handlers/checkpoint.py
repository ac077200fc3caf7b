"""last_*.pt to go on from and best_*.pt to use: when they are written, how they are found, when one is refused."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from ignite.engine import Engine, Events
from torch import Tensor

from reid import distributed
from reid.config import dump
from reid.errors import WorldError
from reid.handlers.records import Progress, Records
from reid.model import ReIDModel
from reid.weights import load_state, read_file

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.checkpoint")

_FORMAT = 1
_NUM_LAST = 2  # a file is deleted only when this many newer ones are whole
# Settings that a resumed run may change (beginnings of keys): they decide neither what is learnt nor how.
_FREE = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.PRETRAIN_",
    "DATASETS.ROOT_DIR",
    "DATASETS.CACHE_DIR",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.LOG_PERIOD",
    "SOLVER.EVAL_PERIOD",
    "SOLVER.TIMEOUT_MINUTES",
    "TEST.",
    "WANDB.",
)


class Checkpoints:
    """Everything that training needs to go on, saved by rank 0.

    The state is the same on every rank and for every number of ranks, so that any number may go on from it. What is not
    in it is a function of (seed, epoch, step): the plan, the augmentation, the learning rate.

    Args:
        folder: of the files.
        model: not wrapped.
        optimizer: wrapped or not.
        progress: kept up to date and saved along.
        cfg: the whole configuration.
        dataset: fingerprint of the benchmark.
        scaler: of the loss under fp16; None otherwise.
    """

    def __init__(
        self,
        folder: Path,
        model: ReIDModel,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        cfg: CfgNode,
        dataset: str,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._folder, self._model, self._optimizer = folder, model, optimizer
        self._progress, self._cfg, self._dataset, self._scaler = progress, cfg, dataset, scaler

    def attach(self, trainer: Engine) -> None:
        """Saves after every SOLVER.CHECKPOINT_PERIOD epochs and after the last; attach it behind the evaluation."""
        trainer.add_event_handler(Records.VALIDATION, self._save_best)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save_periodically)

    def _save_best(self, trainer: Engine) -> None:
        best = self._progress.best
        if best is not None and self._progress.last_is_best:
            name = f"best_{trainer.state.epoch:04d}_mAP_{best['mAP']:.4f}.pt"
            self._write(name, {"epoch": trainer.state.epoch, "validation": best}, num_kept=1)

    def _save_periodically(self, trainer: Engine) -> None:
        epoch = trainer.state.epoch
        if epoch % self._cfg.SOLVER.CHECKPOINT_PERIOD == 0 or epoch == trainer.state.max_epochs:
            self._write(
                f"last_{epoch:04d}_{trainer.state.iteration:08d}.pt",
                {
                    "iteration": trainer.state.iteration,
                    "epoch": epoch,
                    "epoch_length": trainer.state.epoch_length,
                    "optimizer": self._optimizer.state_dict(),
                    "scaler": None if self._scaler is None else self._scaler.state_dict(),
                    "progress": asdict(self._progress),
                },
                num_kept=_NUM_LAST,
            )

    def _write(self, name: str, content: dict[str, Any], *, num_kept: int) -> None:
        weights = self._model.state_dict()
        content |= {"format": _FORMAT, "model": weights, "config": dump(self._cfg), "dataset": self._dataset}

        def write() -> None:
            _check_finite(weights)  # after its last step, of which no loss tells
            if not distributed.is_main():
                return
            save_atomically(self._folder / name, content)
            for old in checkpoints_in(self._folder, name.split("_")[0])[:-num_kept]:
                old.unlink(missing_ok=True)

        distributed.together(write)

    def resume(self, trainer: Engine) -> bool:
        """Goes on from the newest last_*.pt, if there is one; called by all ranks behind accelerate's `prepare`.

        Raises:
            WorldError: the checkpoint is damaged, or of another configuration, benchmark or model.
        """
        content = distributed.on_main(self._read_newest)
        if content is None:
            return False
        distributed.together(lambda: load_state(self._model, content["model"], f"the checkpoint in {self._folder}"))
        self._optimizer.load_state_dict(content["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(content["scaler"])
        vars(self._progress).update(content["progress"])
        trainer.load_state_dict(
            {
                "iteration": content["iteration"],
                "epoch_length": content["epoch_length"],
                "max_epochs": self._cfg.SOLVER.MAX_EPOCHS,
            }
        )
        return True

    def _read_newest(self) -> dict[str, Any] | None:
        files = checkpoints_in(self._folder, "last")
        if not files:
            return None
        try:
            content = read_file(files[-1], "OUTPUT_DIR")
        except WorldError as error:
            raise WorldError(f"{error}; or remove it, to go on from the one before or from the start") from error
        if content.get("format") != _FORMAT:
            raise WorldError(f"{files[-1]} was written in another format; choose another OUTPUT_DIR")
        differences = _differences(yaml.safe_load(content["config"]), yaml.safe_load(dump(self._cfg)))
        if content["dataset"] != self._dataset:
            differences.append("the images of the benchmark are not the same")
        if differences:
            raise WorldError(
                f"{files[-1]} is of another run: {'; '.join(differences)}; give the same settings and data to go on, "
                "or another OUTPUT_DIR to start anew"
            )
        logger.info("going on from %s, after epoch %d", files[-1], content["epoch"])
        return content


def checkpoints_in(folder: Path, kind: str) -> list[Path]:
    """The checkpoints that are called last or best, the oldest first."""
    return sorted(folder.glob(f"{kind}_*.pt"), key=_age)


def _age(file: Path) -> tuple[int, str]:
    """Orders checkpoints by epoch, whatever number of digits it has, then by name."""
    number = file.stem.split("_")[1]
    return (int(number) if number.isdecimal() else -1, file.name)


def _differences(saved: dict[str, Any], own: dict[str, Any], prefix: str = "") -> list[str]:
    """One sentence part for each setting that matters and is not the same."""
    found = []
    for key in sorted(saved.keys() | own.keys()):
        name, before, now = prefix + key, saved.get(key), own.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{name}.")
        elif before != now and not name.startswith(_FREE):
            found.append(f"{name} was {before!r} and is now {now!r}")
    return found


def _check_finite(weights: dict[str, Tensor]) -> None:
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(weights)} entries of the model stopped being finite ({broken[0]} first); no "
            "checkpoint holds them; lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or use SOLVER.PRECISION fp32"
        )


def save_atomically(file: Path, content: dict[str, Any]) -> None:
    """The whole file under that name, or what stood there before.

    Raises:
        WorldError: the disk is full or not writable.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError) as error:
        # Whatever stops torch.save while it writes, Ctrl-C too, comes out as a RuntimeError about positions.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        if not isinstance(reason, OSError):
            raise reason from None
        raise WorldError(
            f"the checkpoint {file} cannot be written: {reason.strerror}; free some space and start again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
