"""What Weights & Biases is told of a run; every rank calls, rank 0 acts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine

from reid import distributed
from reid.config.load import as_plain_dict
from reid.errors import SettingsError
from reid.handlers import artifacts
from reid.handlers.records import Progress, Records, SavedCheckpoint, score_numbers, validation_numbers
from reid.handlers.wandb_session import Identity, Session
from reid.preemption import Preempted
from reid.process.files import write_text

if TYPE_CHECKING:
    import wandb
    from yacs.config import CfgNode

    from reid.handlers.pictures import FigureSet

_RUN_ID_FILE = "wandb_run_id"


class Tracker:
    """One W&B run for the whole job, continued when the job goes on. Whatever becomes of W&B, training goes on.

    Rows are never logged with `step=`: W&B drops a row whose step is below the last one's, and training and validation
    count differently. `iteration` is the axis of `train/*`, `epoch` that of `val/*`.

    Args:
        cfg: the whole configuration; WANDB is read, all of it recorded.
        folder: of the run; W&B's files and the run's id go there.
        facts: recorded beside the settings; with "dataset", the fingerprint, and "world_size".
        data_sets: the names of the benchmarks that are used.
    """

    def __init__(self, cfg: CfgNode, folder: Path, facts: dict[str, Any], data_sets: Sequence[str]) -> None:
        self._cfg, self._folder, self._facts, self._data_sets = cfg, folder, facts, data_sets
        self._session: Session | None = None
        self._last_saved: SavedCheckpoint | None = None

    # ---- a run, from its begin to its end ----

    @contextmanager
    def training(self, progress: Progress) -> Iterator[None]:
        """A run around training: begun, or the one that the folder or the checkpoint names; ended however that ends."""
        with self._session_of(lambda: self._begin_training(progress)):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A run of its own around an evaluation."""
        with self._session_of(self._begin_evaluation):
            yield

    @contextmanager
    def _session_of(self, begin: Callable[[], None]) -> Iterator[None]:
        distributed.together(lambda: begin() if distributed.is_main() and self._cfg.WANDB.ENABLE else None)
        try:
            yield
        except BaseException as error:
            self._end(exit_code=1, is_preempted=isinstance(error, Preempted))
            raise
        self._end(exit_code=0)
        if self._cfg.WANDB.ON_FAILURE == "raise":
            distributed.together(lambda: self._session.raise_complaints() if self._session else None)

    def _begin_training(self, progress: Progress) -> None:
        file = self._folder / _RUN_ID_FILE
        begun_here = file.read_text().strip() if file.exists() else progress.wandb_run_id
        identity = choose_run(self._cfg.WANDB, begun_here, os.environ)
        progress.wandb_run_id = identity.run_id
        write_text(file, identity.run_id + "\n", key="OUTPUT_DIR")
        self._begin(identity, "-".join(self._data_sets))
        for kept in artifacts.unlogged_checkpoints(self._folder, identity.run_id):
            self._log_kept(kept)

    def _begin_evaluation(self) -> None:
        kind = self._cfg.WANDB.JOB_TYPE
        identity = Identity(_new_id(), is_known=False, resume="allow", job_type="eval" if kind == "train" else kind)
        self._begin(identity, "-".join([*self._data_sets, "test"]))

    def _begin(self, identity: Identity, data_set: str) -> None:
        self._session = Session(self._cfg, self._folder, as_plain_dict(self._cfg) | self._facts, identity)
        fingerprint, seconds = self._facts["dataset"], self._cfg.WANDB.INIT_TIMEOUT
        self._session.later(
            "the data set", lambda run: artifacts.use_data_set(run, data_set, fingerprint, seconds=seconds)
        )

    def _end(self, *, exit_code: int, is_preempted: bool = False) -> None:
        if self._session is None:
            return
        if self._last_saved is not None:
            self._log_checkpoint(self._last_saved)
        self._session.finish(exit_code=exit_code, is_preempted=is_preempted)

    # ---- what is told ----

    def attach(self, trainer: Engine, progress: Progress) -> None:
        """Attach it behind the checkpoints, which know the best validation."""
        trainer.add_event_handler(Records.TRAIN, self._log_train)
        trainer.add_event_handler(Records.VALIDATION, self._log_validation, progress)

    def _log_train(self, trainer: Engine) -> None:
        self._log_row("train", trainer.state.metrics, trainer.state.iteration, trainer.state.epoch)

    def _log_validation(self, trainer: Engine, progress: Progress) -> None:
        self._log_row("val", validation_numbers(progress), trainer.state.iteration, trainer.state.epoch)

    def log_test(self, scores: dict[str, Any], epoch: int | None) -> None:
        """The scores of an evaluation by itself, see `records.summary_of_all`."""
        self._log_row("test", score_numbers(scores), None, epoch)

    def use_checkpoint(self, file: Path, reference: str) -> None:
        """The checkpoint that an evaluation is of.

        Args:
            file: which holds it.
            reference: where W&B has it, see `artifacts.reference_of`; empty: nowhere.
        """
        if self._session is not None and reference:
            what = f"the use of {reference}"
            self._session.later(what, lambda run: artifacts.use_checkpoint(run, reference, artifacts.sha256(file)))

    def keep_checkpoint(self, saved: SavedCheckpoint) -> None:
        """A checkpoint that is whole on the disk: the best at once, the last one of all in the end; for rank 0."""
        wanted = self._cfg.WANDB.LOG_CHECKPOINTS.split("+")
        if saved.kind == "best" and "best" in wanted:
            self._log_checkpoint(saved)
        if saved.kind == "last" and "last" in wanted:
            self._last_saved = saved

    def _log_checkpoint(self, saved: SavedCheckpoint) -> None:
        session = self._session
        if session is None or not session.is_recording:
            return
        name = artifacts.name_of(self._cfg, session.run_id, saved.kind)

        def keep_and_log(run: wandb.Run) -> None:
            facts = {"world_size": self._facts["world_size"], "dataset": self._facts["dataset"]}
            kept = artifacts.keep_checkpoint(saved, name, facts, Path(run.dir).parent)
            self._log_kept(kept)

        session.do(saved.file.name, keep_and_log)

    def _log_kept(self, kept: Path) -> None:
        if self._session is not None:
            self._session.later(kept.name, lambda run: artifacts.log_checkpoint(run, kept))

    def _log_row(self, section: str, numbers: dict[str, Any], iteration: int | None, epoch: int | None) -> None:
        row = {f"{section}/{name}": value for name, value in numbers.items()} | _place(iteration, epoch)
        if self._session is not None:
            self._session.do("a row of numbers", lambda run: run.log(row))

    def show(self, drawn: FigureSet) -> None:
        """The pictures, curves and tables of one point of a run."""
        place = {"iteration": drawn.iteration, "epoch": drawn.epoch}
        for key, file, caption in drawn.images:
            self.log_images(key, [file], [caption], **place)
        for key, xs, ys, title, x_name, y_name in drawn.curves:
            self.log_curve(key, xs, ys, title, x_name, y_name, **place)
        for key, columns, rows in drawn.tables:
            self.log_table(key, columns, rows, **place)

    def log_images(
        self, key: str, files: Sequence[Path], captions: Sequence[str], *, iteration: int | None, epoch: int | None
    ) -> None:
        """Pictures that lie on the disk, under one key such as "val/galleries"; they may go once this has returned."""

        def log(run: wandb.Run) -> None:
            import wandb

            pictures = [wandb.Image(str(file), caption=words) for file, words in zip(files, captions, strict=True)]
            run.log({key: pictures, **_place(iteration, epoch)})

        if self._session is not None:
            self._session.do(key, log)

    def log_table(
        self,
        key: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        iteration: int | None,
        epoch: int | None,
    ) -> None:
        """A table of plain values; W&B keeps one more version of it for each call."""
        names: list[str | int] = list(columns)
        values = [list(row) for row in rows]

        def log(run: wandb.Run) -> None:
            import wandb

            table = wandb.Table(columns=names, data=values)
            artifacts.log_table(run, {key: table, **_place(iteration, epoch)}, table)

        if self._session is not None:
            self._session.later(key, log)

    def log_curve(
        self,
        key: str,
        xs: Sequence[float],
        ys: Sequence[float],
        title: str,
        x_name: str,
        y_name: str,
        *,
        iteration: int | None,
        epoch: int | None,
    ) -> None:
        """One line over an axis of its own, as a CMC curve; kept as a table."""
        values = [[x, y] for x, y in zip(xs, ys, strict=True)]

        def log(run: wandb.Run) -> None:
            import wandb

            points = wandb.Table(columns=[x_name, y_name], data=values)
            chart = wandb.plot.line(points, x_name, y_name, title=title)
            artifacts.log_table(run, {key: chart, **_place(iteration, epoch)}, points)

        if self._session is not None:
            self._session.later(key, log)


def _place(iteration: int | None, epoch: int | None) -> dict[str, int]:
    """What a row stands at, as far as it is known."""
    return {name: value for name, value in (("iteration", iteration), ("epoch", epoch)) if value is not None}


def choose_run(settings: CfgNode, begun_here: str, environment: Mapping[str, str]) -> Identity:
    """Which W&B run training records to.

    Args:
        settings: the WANDB section.
        begun_here: the id that OUTPUT_DIR knows; empty: none.
        environment: of the process; in a sweep its agent says which run it is, and W&B takes no other.

    Raises:
        SettingsError: WANDB.RESUME is must, and there is no run to go on with.
    """
    given = settings.RUN_ID or environment.get("WANDB_RUN_ID", "")
    if "WANDB_SWEEP_ID" in environment and environment.get("WANDB_RUN_ID"):
        run_id = environment["WANDB_RUN_ID"]
        return Identity(run_id, is_known=run_id == begun_here, resume="allow", job_type=settings.JOB_TYPE)
    known = given or ("" if settings.RESUME == "never" else begun_here)
    if settings.RESUME == "must" and not known:
        raise SettingsError(
            "WANDB.RESUME must needs a run to go on with, but OUTPUT_DIR has begun none and WANDB.RUN_ID is ''; set "
            "WANDB.RUN_ID, or use WANDB.RESUME allow",
            key="WANDB.RESUME",
        )
    run_id = known or _new_id()
    is_known = settings.RESUME != "never" and (run_id == begun_here or settings.RESUME == "must")
    return Identity(run_id, is_known=is_known, resume=settings.RESUME, job_type=settings.JOB_TYPE)


def _new_id() -> str:
    return secrets.token_hex(4)
