"""Rows, figures, checkpoints and data sets of a run in Weights & Biases; every rank calls, rank 0 acts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reid.config.load import as_plain_dict
from reid.distributed import collectives
from reid.errors import SettingsError
from reid.process.files import write_text
from reid.process.signals import Preempted
from reid.runs.progress import Progress, SavedCheckpoint
from reid.tracking import artifacts
from reid.tracking.upload_queue import Action
from reid.tracking.wandb_run import Identity, WandbRun

if TYPE_CHECKING:
    import wandb
    from yacs.config import CfgNode

    from reid.evaluation.ranked_galleries import FigureSet

_RUN_ID_FILE = "wandb_run_id"


class Tracker:
    """The W&B run of a complete job, continued when the job resumes. No failure of W&B stops the training.

    Rows are never logged with `step=`: W&B drops a row whose step is below the last one's, and training and validation
    count differently. `iteration` is the axis of `train/*`, `epoch` that of `val/*`.

    Args:
        cfg: Complete configuration; WANDB is read, everything is recorded.
        folder: Run directory; it receives W&B's files and the run's id.
        facts: Facts to record with the settings: "world_size", the fingerprint "dataset", and any others.
        data_sets: Names of the benchmarks in use.
    """

    def __init__(self, cfg: CfgNode, folder: Path, facts: dict[str, Any], data_sets: Sequence[str]) -> None:
        self._cfg, self._folder, self._facts, self._data_sets = cfg, folder, facts, data_sets
        self._run: WandbRun | None = None
        self._last_saved: SavedCheckpoint | None = None

    # ---- start and end ----

    @contextmanager
    def training(self, progress: Progress) -> Iterator[None]:
        """Record a training: in a new run, or in the one that the run directory or the checkpoint names."""
        with self._running(lambda: self._start_training(progress)):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Record an evaluation in a new run."""
        kind = self._cfg.WANDB.JOB_TYPE
        identity = Identity(_new_id(), is_known=False, resume="allow", job_type="eval" if kind == "train" else kind)
        with self._running(lambda: self._start(identity, "-".join([*self._data_sets, "test"]))):
            yield

    @contextmanager
    def _running(self, start: Callable[[], None]) -> Iterator[None]:
        with collectives.errors_shared():
            if collectives.is_main() and self._cfg.WANDB.ENABLE:
                start()
        try:
            yield
        except BaseException as error:
            self._end(exit_code=1, is_preempted=isinstance(error, Preempted))
            raise
        self._end(exit_code=0)
        if self._cfg.WANDB.ON_FAILURE == "raise":
            with collectives.errors_shared():
                if self._run:
                    self._run.raise_failures()

    def _start_training(self, progress: Progress) -> None:
        file = self._folder / _RUN_ID_FILE
        recorded_id = file.read_text().strip() if file.exists() else progress.wandb_run_id
        identity = choose_run(self._cfg.WANDB, recorded_id, os.environ)
        progress.wandb_run_id = identity.run_id
        write_text(file, identity.run_id + "\n", key="OUTPUT_DIR")
        self._start(identity, "-".join(self._data_sets))
        for kept in artifacts.unlogged_checkpoints(self._folder, identity.run_id):
            self._enqueue(kept.name, partial(artifacts.log_checkpoint, kept=kept))

    def _start(self, identity: Identity, data_set: str) -> None:
        self._run = WandbRun(self._cfg, self._folder, as_plain_dict(self._cfg) | self._facts, identity)
        fingerprint, seconds = self._facts["dataset"], self._cfg.WANDB.INIT_TIMEOUT
        use = partial(artifacts.use_data_set, name=data_set, fingerprint=fingerprint, seconds=seconds)
        self._enqueue("the data set", use)

    def _end(self, *, exit_code: int, is_preempted: bool = False) -> None:
        if self._run is not None:
            if self._last_saved is not None:
                self._log_checkpoint(self._last_saved)
            self._run.finish(exit_code=exit_code, is_preempted=is_preempted)

    # ---- records ----

    def log_row(self, section: str, numbers: Mapping[str, Any], iteration: int | None, epoch: int | None) -> None:
        """Log the numbers of a record, see `progress.attach_rows`; a separate evaluation has no iteration."""
        row = {f"{section}/{name}": value for name, value in numbers.items()} | _position(iteration, epoch)
        self._log("a row of numbers", lambda run: run.log(row))

    def use_checkpoint(self, file: Path, reference: str) -> None:
        """Record that an evaluation uses a checkpoint, if it has a reference (see `artifacts.reference_of`)."""
        if reference:
            use = partial(artifacts.use_checkpoint, reference=reference, file=file)
            self._enqueue(f"the use of {reference}", use)

    def keep_checkpoint(self, saved: SavedCheckpoint) -> None:
        """Log a checkpoint that was written: each best one at once, the last one at the end; for rank 0."""
        logged_kinds = self._cfg.WANDB.LOG_CHECKPOINTS.split("+")
        if saved.kind == "best" and "best" in logged_kinds:
            self._log_checkpoint(saved)
        if saved.kind == "last" and "last" in logged_kinds:
            self._last_saved = saved

    def _log_checkpoint(self, saved: SavedCheckpoint) -> None:
        def keep(run: wandb.Run) -> None:
            name = artifacts.name_of(self._cfg, run.id, saved.kind)
            facts = {"world_size": self._facts["world_size"], "dataset": self._facts["dataset"]}
            kept = artifacts.keep_checkpoint(saved, name, facts, Path(run.dir).parent)
            self._enqueue(kept.name, partial(artifacts.log_checkpoint, kept=kept))

        self._log(saved.file.name, keep)

    def show(self, figures: FigureSet) -> None:
        """Log the images, curves and tables of one step of a run; the image files may change afterwards."""
        position = _position(figures.iteration, figures.epoch)
        for image in figures.images:
            self._log(image.key, partial(artifacts.log_image, image=image, position=position))
        for table in figures.tables:
            self._enqueue(table.key, partial(artifacts.log_table, table=table, position=position))

    def _log(self, what: str, action: Action) -> None:
        if self._run is not None:
            self._run.log(what, action)

    def _enqueue(self, what: str, action: Action) -> None:
        if self._run is not None:
            self._run.enqueue(what, action)


def _position(iteration: int | None, epoch: int | None) -> dict[str, int]:
    """Return the known axes of a row."""
    return {name: value for name, value in (("iteration", iteration), ("epoch", epoch)) if value is not None}


def choose_run(settings: CfgNode, recorded_id: str, environment: Mapping[str, str]) -> Identity:
    """Return the identity of the W&B run of a training.

    Args:
        settings: Section WANDB.
        recorded_id: Run id in OUTPUT_DIR; empty without one.
        environment: Environment variables; in a sweep, the agent sets the run there, and W&B accepts no other.

    Raises:
        SettingsError: WANDB.RESUME is must, and there is no run to resume.
    """
    requested_id = settings.RUN_ID or environment.get("WANDB_RUN_ID", "")
    if "WANDB_SWEEP_ID" in environment and environment.get("WANDB_RUN_ID"):
        run_id = environment["WANDB_RUN_ID"]
        return Identity(run_id, is_known=run_id == recorded_id, resume="allow", job_type=settings.JOB_TYPE)
    known_id = requested_id or ("" if settings.RESUME == "never" else recorded_id)
    if settings.RESUME == "must" and not known_id:
        raise SettingsError(
            "WANDB.RUN_ID must be set, because WANDB.RESUME is must and OUTPUT_DIR has no run yet; got ''. Fix: set "
            "WANDB.RUN_ID, or use WANDB.RESUME allow.",
            key="WANDB.RESUME",
        )
    run_id = known_id or _new_id()
    is_known = settings.RESUME != "never" and (run_id == recorded_id or settings.RESUME == "must")
    return Identity(run_id, is_known=is_known, resume=settings.RESUME, job_type=settings.JOB_TYPE)


def _new_id() -> str:
    return secrets.token_hex(4)
