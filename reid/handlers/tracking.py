"""Weights & Biases: every rank calls, rank 0 acts; the only importer of wandb."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine

from reid import distributed
from reid.config import as_plain_dict
from reid.errors import SettingsError
from reid.handlers.records import Progress, Records, validation_numbers
from reid.preemption import Preempted
from reid.run_directory import write_atomically

if TYPE_CHECKING:
    import wandb
    from yacs.config import CfgNode

logger = logging.getLogger("reid.tracking")

_RUN_ID_FILE = "wandb_run_id"


class Tracker:
    """One W&B run for the whole job, continued when the job goes on. Whatever becomes of W&B, training goes on.

    Rows are never logged with `step=`: W&B drops a row whose step is below the last one's, and training and validation
    count differently. `iteration` is the axis of `train/*`, `epoch` that of `val/*`.

    Args:
        cfg: the whole configuration; WANDB is read, all of it recorded.
        folder: of the run; W&B's files and the run's id go there.
        facts: recorded beside the settings.
    """

    def __init__(self, cfg: CfgNode, folder: Path, facts: dict[str, Any]) -> None:
        self._cfg, self._folder, self._facts = cfg, folder, facts
        self._run: wandb.Run | None = None

    @contextmanager
    def running(self, progress: Progress) -> Iterator[None]:
        """A run around training: begun, or the one that the folder or the checkpoint names; ended however that ends."""
        distributed.together(lambda: self._start(progress))
        try:
            yield
        except Preempted:
            self._attempt(lambda run: run.mark_preempting())
            self._finish(exit_code=1)
            raise
        except BaseException:
            self._finish(exit_code=1)
            raise
        self._finish(exit_code=0)

    def _start(self, progress: Progress) -> None:
        if not distributed.is_main() or not self._cfg.WANDB.ENABLE:
            return
        file = self._folder / _RUN_ID_FILE
        known = file.read_text().strip() if file.exists() else ""
        known = known or progress.wandb_run_id
        progress.wandb_run_id = known or secrets.token_hex(4)
        write_atomically(file, progress.wandb_run_id + "\n")
        self._run = self._begin(progress.wandb_run_id, is_known=bool(known))

    def attach(self, trainer: Engine, progress: Progress) -> None:
        """Attach it behind the checkpoints, which know the best validation."""
        trainer.add_event_handler(Records.TRAIN, self._log_train)
        trainer.add_event_handler(Records.VALIDATION, self._log_validation, progress)

    def log_images(
        self, key: str, files: Sequence[Path], captions: Sequence[str], *, iteration: int, epoch: int
    ) -> None:
        """Pictures that lie on the disk, under one key such as "val/galleries"; they may go once this has returned."""
        place = {"iteration": iteration, "epoch": epoch}

        def log(run: wandb.Run) -> None:
            import wandb

            pictures = [wandb.Image(str(file), caption=words) for file, words in zip(files, captions, strict=True)]
            run.log({key: pictures, **place})

        self._attempt(log)

    def log_table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, iteration: int, epoch: int
    ) -> None:
        """A table of plain values; W&B keeps one more version of it for each call."""
        place = {"iteration": iteration, "epoch": epoch}

        def log(run: wandb.Run) -> None:
            import wandb

            run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows]), **place})

        self._attempt(log)

    def log_curve(
        self,
        key: str,
        xs: Sequence[float],
        ys: Sequence[float],
        title: str,
        x_name: str,
        y_name: str,
        *,
        iteration: int,
        epoch: int,
    ) -> None:
        """One line over an axis of its own, as a CMC curve; kept as a table."""
        place = {"iteration": iteration, "epoch": epoch}

        def log(run: wandb.Run) -> None:
            import wandb

            points = wandb.Table(columns=[x_name, y_name], data=[[x, y] for x, y in zip(xs, ys, strict=True)])
            run.log({key: wandb.plot.line(points, x_name, y_name, title=title), **place})

        self._attempt(log)

    def _finish(self, *, exit_code: int) -> None:
        if self._run is None:
            return
        offline_folder = Path(self._run.dir).parent if self._run.settings._offline else None
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        if offline_folder is not None:
            logger.info("W&B: recorded offline; send it with: wandb sync %s", shlex.quote(str(offline_folder)))
        self._run = None

    def _attempt(self, action: Callable[[wandb.Run], object]) -> None:
        """Does it with the run, if there is one; gives the run up where W&B's own process has died."""
        import wandb

        if self._run is None:
            return
        try:
            action(self._run)
        except (wandb.errors.Error, OSError) as error:
            self._run = None
            logger.warning("W&B: gives up, and training goes on (%s: %s)", type(error).__name__, _first_line(error))

    def _begin(self, run_id: str, *, is_known: bool) -> wandb.Run:
        import wandb
        from wandb.integration import tensorboard

        if "HOME" not in os.environ:  # as in some job scripts; W&B's own process would fill the console with complaints
            os.environ.setdefault("WANDB_CACHE_DIR", str((self._folder / "wandb" / "cache").absolute()))
        try:
            wandb.setup(wandb.Settings(silent=True))
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise SettingsError(
                f"W&B refuses its settings in the environment or in its settings files: {reason}; correct them, or use "
                "WANDB.ENABLE no"
            ) from error
        if self._cfg.WANDB.SYNC_TENSORBOARD:
            # Not by init(sync_tensorboard=True): without a root those rows would have the names of ours, and with them
            # the iteration at which they happen to be read.
            tensorboard.patch(root_logdir=str(self._folder.absolute()))
        mode, reason = self._mode()
        if mode == "online":
            try:
                run = self._init(run_id, "online")
            except wandb.errors.Error as error:
                # Without it the id counts as in use by this process.
                wandb.teardown()
                mode, reason = "offline", f"W&B did not answer ({type(error).__name__}: {_first_line(error)})"
        if mode != "online":
            run = self._init(run_id, mode)
        if mode == "disabled":
            logger.info("W&B: disabled, as %s", reason)
        else:
            place = run.url if mode == "online" else f"offline, as {reason}"
            logger.info("W&B: %s %s (%s)", "continuing run" if is_known else "run", run.name or run.id, place)
        return run

    def _mode(self) -> tuple[str, str]:
        """online, offline or disabled, and why not online."""
        import wandb

        wanted, whose = self._cfg.WANDB.MODE, "WANDB.MODE"
        if not wanted:
            wanted, whose = os.environ.get("WANDB_MODE", ""), "the environment's WANDB_MODE"
        if wanted in ("offline", "disabled", "dryrun"):
            return "disabled" if wanted == "disabled" else "offline", f"{whose} is {wanted}"
        try:
            # Only asks whether there is a key: no prompt, no network, nothing written.
            has_key = wandb.login(prompt=False, verify=False)
        except wandb.errors.Error as error:
            return "offline", f"W&B refuses the key ({_first_line(error)})"
        return ("online", "") if has_key else ("offline", "no W&B key was found; set WANDB_API_KEY or run: wandb login")

    def _init(self, run_id: str, mode: str) -> wandb.Run:
        import wandb

        settings = self._cfg.WANDB
        run = wandb.init(
            project=settings.PROJECT,
            entity=settings.ENTITY or None,
            name=settings.NAME or None,
            tags=list(settings.TAGS) or None,
            group=settings.GROUP or None,
            job_type=settings.JOB_TYPE or None,
            notes=settings.NOTES or None,
            config=as_plain_dict(self._cfg) | self._facts,
            dir=str(self._folder),
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            save_code=settings.SAVE_CODE,
            settings=wandb.Settings(
                silent=True,
                console="off",  # log.txt has it
                init_timeout=settings.INIT_TIMEOUT,
                finish_timeout=settings.FINISH_TIMEOUT,
                x_transaction_log_flush_interval=1.0,  # seconds of rows that a killed process may lose
            ),
        )
        run.define_metric("iteration")
        run.define_metric("epoch")
        run.define_metric("train/*", step_metric="iteration")
        run.define_metric("val/*", step_metric="epoch")
        if settings.SYNC_TENSORBOARD:
            run.define_metric("tensorboard/*", step_metric="global_step")
        return run

    def _log_train(self, trainer: Engine) -> None:
        row = {f"train/{name}": value for name, value in trainer.state.metrics.items()}
        row |= {"iteration": trainer.state.iteration, "epoch": trainer.state.epoch}
        self._attempt(lambda run: run.log(row))

    def _log_validation(self, trainer: Engine, progress: Progress) -> None:
        row = {f"val/{name}": value for name, value in validation_numbers(progress).items()}
        row |= {"iteration": trainer.state.iteration, "epoch": trainer.state.epoch}
        self._attempt(lambda run: run.log(row))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
