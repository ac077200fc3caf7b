"""The W&B run of rank 0: online or offline recording, and the policy for failures of W&B."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reid.errors import SettingsError, WorldError
from reid.process.side_effects import error_summary, first_line, optional, warn
from reid.tracking import offline as segments
from reid.tracking.service import Service
from reid.tracking.upload_queue import Action, UploadQueue, UploadTask

if TYPE_CHECKING:
    import wandb
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Identity of the W&B run that a process records."""

    run_id: str
    is_known: bool  # an earlier process has started the run
    resume: Literal["allow", "must", "never"]  # what the server does if it knows, or does not know, the run
    job_type: str


class WandbRun:
    """The segment of a W&B run that this process records. Failures of W&B raise only with WANDB.ON_FAILURE raise.

    The training waits only at the start (WANDB.INIT_TIMEOUT) and at the end (WANDB.FINISH_TIMEOUT): wandb-core takes
    rows and images and keeps them on disk too. Tables and artifacts, which ask the server first, go through a queue; if
    the server has not taken them at the end, they are recorded in another, offline segment.

    Args:
        cfg: Complete configuration; WANDB is read.
        folder: Run directory.
        config: Configuration that W&B shows.
        identity: Identity of the run.

    Raises:
        SettingsError: W&B rejects its settings, or WANDB.RESUME cannot be satisfied.
        WorldError: W&B cannot be reached, and WANDB.ON_FAILURE is raise.
    """

    def __init__(self, cfg: CfgNode, folder: Path, config: dict[str, Any], identity: Identity) -> None:
        self._settings, self._folder, self._config, self._identity = cfg.WANDB, folder, config, identity
        self._run: wandb.Run | None = None
        self._is_stopped = False
        self._failures: list[str] = []  # for WANDB.ON_FAILURE raise
        self._service = Service()
        self._uploads = UploadQueue(lambda: self._run)
        try:
            self._start()
        finally:
            if self._run is None:
                self._service.end()

    # ---- start ----

    def _start(self) -> None:
        requested = self._settings.MODE or os.environ.get("WANDB_MODE", "")
        source = "WANDB.MODE" if self._settings.MODE else "the environment's WANDB_MODE"
        reason = f"{source} is {requested}"
        mode = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(requested, "online")
        if mode != "disabled":
            self._service.start(self._folder)
            if self._settings.SYNC_TENSORBOARD and self._identity.job_type != "eval":  # which writes no such files
                from wandb.integration import tensorboard

                # Not init(sync_tensorboard=True): without a root, its rows would have the same names as ours, at
                # whatever iteration they are read.
                tensorboard.patch(root_logdir=str(self._folder.absolute()))
        if mode == "online":
            reason = self._start_online()
            if self._run is None:
                mode = self._settings.ON_FAILURE
        if mode == "raise":
            raise WorldError(
                f"W&B cannot be reached: {reason}. Fix: use WANDB.ON_FAILURE offline to record on the disk then, or "
                "WANDB.MODE offline to do so always.",
                key="WANDB.ON_FAILURE",
            )
        if mode == "offline":
            self._run = self._init("offline")
        if self._run is None:
            logger.info("W&B: disabled, as %s", reason)
            return
        where = self._run.url if mode == "online" else f"offline, as {reason}"
        verb = "continuing run" if self._identity.is_known else "run"
        logger.info("W&B: %s %s (%s)", verb, self._run.name or self._run.id, where)

    def _start_online(self) -> str:
        """Start the run on the server; without success, return the reason."""
        import wandb

        unsent = segments.unsent_segments(self._folder, self._identity.run_id)
        try:
            # Without `verify`, login only looks for a key: no prompt, no network, nothing written.
            if not wandb.login(prompt=False, verify=bool(unsent)):
                return "no W&B key was found; set WANDB_API_KEY or run: wandb login"
            if unsent and not segments.send(unsent, self._settings.FINISH_TIMEOUT):
                return "what was recorded before could not be sent"
            self._run = self._init("online")
        except Exception as error:  # of wandb, pydantic and others
            for segment in set(segments.unsent_segments(self._folder, self._identity.run_id)) - set(unsent):
                segments.mark_sent(segment)  # it is empty
            self._service.end()  # else the id counts as in use by this process
            if isinstance(error, wandb.errors.UsageError) and self._identity.resume != "allow":
                raise SettingsError(
                    f"WANDB.RESUME must fit the run at W&B, got {self._identity.resume}: {first_line(error)}. Fix: use "
                    "WANDB.RESUME allow.",
                    key="WANDB.RESUME",
                ) from error
            if re.search(r"\b40[13]\b|API key", str(error)):
                return f"W&B refuses the key ({first_line(error)})"
            return f"W&B did not answer ({error_summary(error)})"
        return ""

    def _init(
        self, mode: Literal["online", "offline"], reinit: Literal["default", "create_new"] = "default"
    ) -> wandb.Run:
        import wandb

        settings = self._settings
        self._service.start(self._folder)
        run = wandb.init(
            project=settings.PROJECT,
            entity=settings.ENTITY or None,
            name=settings.NAME or None,
            tags=list(settings.TAGS) or None,
            group=settings.GROUP or None,
            job_type=self._identity.job_type or None,
            notes=settings.NOTES or None,
            config=self._config,
            dir=str(self._folder),
            id=self._identity.run_id,
            # Offline segments become one run on the server only with "allow".
            resume=self._identity.resume if mode == "online" else "allow",
            mode=mode,
            reinit=reinit,
            save_code=settings.SAVE_CODE,
            settings=wandb.Settings(
                silent=True,
                console="off",  # log.txt has it
                init_timeout=settings.INIT_TIMEOUT,
                finish_timeout=settings.FINISH_TIMEOUT / 2,  # the other half is for upload tasks
                finish_timeout_raises=True,
                stop_fn=self._stop,
                x_transaction_log_flush_interval=0.1,  # seconds of rows that a killed process may lose
            ),
        )
        for axis, names in (("iteration", "train/*"), ("epoch", "val/*"), ("epoch", "test/*")):
            run.define_metric(axis)
            run.define_metric(names, step_metric=axis)
        if settings.SYNC_TENSORBOARD:
            run.define_metric("tensorboard/*", step_metric="global_step")
        return run

    def _stop(self) -> None:
        """Save and end as after Ctrl-C: a user or a sweep has stopped the run in W&B."""
        self._is_stopped = True
        logger.info("W&B: the run is to stop")
        os.kill(os.getpid(), signal.SIGINT)

    # ---- while training ----

    def log(self, what: str, action: Action) -> None:
        """Call `action` with the run now; for actions that do not wait for the server."""
        if self._run is None:
            return
        with optional(f"W&B: {what} was not recorded", self._failures):
            try:
                action(self._run)
            except ConnectionError as error:
                self._restart_offline(error)
                if self._run is not None:
                    action(self._run)

    def _restart_offline(self, error: ConnectionError) -> None:
        """Continue in an offline segment after wandb-core has died (test_training_outlives_wandb_core)."""
        self._run = None
        self._service.end()
        with optional("W&B: wandb-core has died, and nothing more is recorded", self._failures):
            if self._settings.ON_FAILURE != "offline":
                raise error
            self._run = self._init("offline", reinit="create_new")  # the old run still counts as active here
            text = f"W&B: wandb-core has died ({error_summary(error)}), and recording continues offline"
            warn(text, self._failures)

    def enqueue(self, what: str, action: Action) -> None:
        """Add an upload task, which waits for the server; see `UploadTask`."""
        if self._run is not None:
            self._uploads.add(UploadTask(what, action))

    # ---- end ----

    def finish(self, *, exit_code: int, is_preempted: bool = False) -> None:
        """Wait until all is sent, for at most WANDB.FINISH_TIMEOUT, log where it is, and end wandb-core."""
        if self._run is None:
            self._service.end()
            return
        unfinished = self._uploads.finish(self._settings.FINISH_TIMEOUT / 2)
        run, self._run = self._run, None
        is_sent = self._end_run(run, exit_code, is_preempted=is_preempted) and not run.offline
        if unfinished and not run.offline and self._settings.ON_FAILURE != "disable":
            with optional("W&B: what the server has not taken was not recorded", self._failures):
                self._record_offline(unfinished, exit_code, is_preempted=is_preempted)
        else:
            for task in unfinished:
                warn(f"W&B: {task.what} was not recorded ({task.error})", self._failures)
        if is_sent:
            segments.mark_sent(Path(run.dir).parent)
        self._log_location(run)

    def _end_run(self, run: wandb.Run, exit_code: int, *, is_preempted: bool) -> bool:
        """Return whether the run has ended, and, if online, the server has taken all of it."""
        is_sent = False
        with optional("W&B: the end of the run was not sent", self._failures):
            if is_preempted and not self._is_stopped:  # a sweep starts a preempted run again
                run.mark_preempting()
            run.finish(exit_code=exit_code)
            is_sent = True
        if is_sent and not run.offline and segments.was_rejected(Path(run.dir).parent):
            self._failures.append("W&B: the server rejected a part")
            is_sent = False
        self._service.end()
        return is_sent

    def _record_offline(self, tasks: list[UploadTask], exit_code: int, *, is_preempted: bool) -> None:
        """Record upload tasks in another segment of the run."""
        run = self._init("offline", reinit="create_new")
        for task in tasks:
            with optional(f"W&B: {task.what} was not recorded", self._failures):
                task.action(run)
                self._failures.append(f"{task.what} was not sent ({task.error})")
        self._end_run(run, exit_code, is_preempted=is_preempted)

    def _log_location(self, run: wandb.Run) -> None:
        unsent = segments.unsent_segments(self._folder, self._identity.run_id)
        if not unsent:
            segments.remove_kept_checkpoints(self._folder)
            logger.info("W&B: all is at %s", run.url)
            return
        state = "recorded offline" if run.offline else "not all could be sent"
        logger.info("W&B: %s; send it with: %s", state, shlex.join(segments.sync_command(unsent)))

    def raise_failures(self) -> None:
        """Fail a run that must not succeed without W&B.

        Raises:
            WorldError: Something was not recorded or not sent, and WANDB.ON_FAILURE is raise.
        """
        if self._failures and self._settings.ON_FAILURE == "raise":
            raise WorldError(
                f"W&B lacks a part of this run: {'; '.join(self._failures)}; the training itself is complete, see "
                f"{self._folder}. Fix: use WANDB.ON_FAILURE offline to accept that.",
                key="WANDB.ON_FAILURE",
            )
