"""Rank 0's W&B run: where it is recorded, and what happens where W&B fails; knows nothing of what is recorded."""

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
from reid.handlers.wandb_jobs import Action, Job, Jobs, NotDone, first_line, in_short
from reid.handlers.wandb_pieces import forget_kept, gave_up, mark_sent, send, sync_words, unsent_pieces
from reid.handlers.wandb_process import Service

if TYPE_CHECKING:
    import wandb
    from yacs.config import CfgNode

logger = logging.getLogger("reid.tracking")

_MOST_REVIVALS = 3  # of W&B's own process


@dataclass(frozen=True)
class Identity:
    """Which run this is.

    Attributes:
        run_id: of W&B.
        is_known: whether an earlier process has begun it.
        resume: what the server is to do where it knows the run, or does not.
        job_type: the kind of run.
    """

    run_id: str
    is_known: bool
    resume: Literal["allow", "must", "never"]
    job_type: str


class Session:
    """One process's piece of a W&B run; whatever becomes of W&B stays in here, but for what WANDB.ON_FAILURE raises.

    Nothing is waited for but the begin (WANDB.INIT_TIMEOUT) and the end (WANDB.FINISH_TIMEOUT): rows and pictures go to
    W&B's own process, which keeps them on the disk too; what asks the server first, tables and artifacts, is done by a
    thread, and goes to the disk as another piece of the run where the server has not answered to the end.

    Args:
        cfg: the whole configuration; WANDB is read.
        folder: of the run.
        config: what W&B shows as the run's configuration.
        identity: which run it is.

    Raises:
        SettingsError: W&B refuses its settings, or WANDB.RESUME cannot be met.
        WorldError: W&B cannot be reached, and WANDB.ON_FAILURE is raise.
    """

    def __init__(self, cfg: CfgNode, folder: Path, config: dict[str, Any], identity: Identity) -> None:
        self._settings, self._folder, self._config, self._identity = cfg.WANDB, folder, config, identity
        self._run: wandb.Run | None = None
        self._num_revivals = 0
        self._is_stopped = False
        self._complaints: list[str] = []  # what ON_FAILURE raise raises in the end
        self._service = Service()
        self._jobs = Jobs(lambda: self._run)
        try:
            self._run = self._begin()
        finally:
            if self._run is None:
                self._service.end()

    @property
    def run_id(self) -> str:
        return self._identity.run_id

    @property
    def is_recording(self) -> bool:
        return self._run is not None

    # ---- the begin ----

    def _begin(self) -> wandb.Run | None:
        mode, reason = self._wanted_mode()
        if mode == "disabled":
            logger.info("W&B: disabled, as %s", reason)
            return None
        self._service.start(self._folder)
        if self._settings.SYNC_TENSORBOARD and self._identity.job_type != "eval":  # which writes no such files
            from wandb.integration import tensorboard

            # Not by init(sync_tensorboard=True): without a root those rows would have the names of ours, and with them
            # the iteration at which they happen to be read.
            tensorboard.patch(root_logdir=str(self._folder.absolute()))
        run = None
        if mode == "online":
            run, reason = self._go_online()
            if run is None:
                mode = self._instead_of_online(reason)
        if mode == "offline":
            run = self._init("offline")
        if run is None:
            logger.info("W&B: disabled, as %s", reason)
            return None
        place = run.url if mode == "online" else f"offline, as {reason}"
        words = "continuing run" if self._identity.is_known else "run"
        logger.info("W&B: %s %s (%s)", words, run.name or run.id, place)
        return run

    def _wanted_mode(self) -> tuple[str, str]:
        """online, offline or disabled, and on whose word."""
        wanted, whose = self._settings.MODE, "WANDB.MODE"
        if not wanted:
            wanted, whose = os.environ.get("WANDB_MODE", ""), "the environment's WANDB_MODE"
        if wanted in ("offline", "disabled", "dryrun"):
            return "disabled" if wanted == "disabled" else "offline", f"{whose} is {wanted}"
        return "online", ""

    def _go_online(self) -> tuple[wandb.Run | None, str]:
        """The run on the server, or None and why not."""
        import wandb

        unsent = unsent_pieces(self._folder, self._identity.run_id)
        try:
            # Without `verify` it only asks whether there is a key: no prompt, no network, nothing written.
            if not wandb.login(prompt=False, verify=bool(unsent)):
                return None, "no W&B key was found; set WANDB_API_KEY or run: wandb login"
        except Exception as error:  # of wandb's own, pydantic's, and others
            return None, _why(error)
        if unsent and not send(unsent, self._settings.FINISH_TIMEOUT):
            return None, "what was recorded before could not be sent"
        try:
            return self._init("online"), ""
        except Exception as error:  # of wandb's own, pydantic's, and others
            for piece in unsent_pieces(self._folder, self._identity.run_id):
                mark_sent(piece)  # nothing is in it: the ones before have been sent
            self._service.end()  # without it the id counts as in use by this process
            if isinstance(error, wandb.errors.UsageError) and self._identity.resume != "allow":
                raise SettingsError(
                    f"WANDB.RESUME is {self._identity.resume}, but W&B says: {first_line(error)}; use allow",
                    key="WANDB.RESUME",
                ) from error
            return None, _why(error)

    def _instead_of_online(self, reason: str) -> str:
        if self._settings.ON_FAILURE == "raise":
            raise WorldError(
                f"W&B cannot be reached: {reason}; WANDB.ON_FAILURE offline records on the disk then, WANDB.MODE "
                "offline always",
                key="WANDB.ON_FAILURE",
            )
        return "offline" if self._settings.ON_FAILURE == "offline" else "disabled"

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
            # Offline only with allow do pieces of a run become one when they are sent.
            resume=self._identity.resume if mode == "online" else "allow",
            mode=mode,
            reinit=reinit,
            save_code=settings.SAVE_CODE,
            settings=wandb.Settings(
                silent=True,
                console="off",  # log.txt has it
                init_timeout=settings.INIT_TIMEOUT,
                finish_timeout=settings.FINISH_TIMEOUT / 2,  # the other half is for the jobs
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
        """For W&B's user or sweep, who want no more of this run: it saves and ends as after Ctrl-C."""
        self._is_stopped = True
        logger.info("W&B: the run is to stop")
        os.kill(os.getpid(), signal.SIGINT)

    # ---- in between ----

    def do(self, what: str, action: Action) -> None:
        """Does at once what does not ask the server."""
        if self._run is None:
            return
        try:
            action(self._run)
        except ConnectionError as error:
            self._revive(error)
            if self._run is not None:
                self.do(what, action)
        except Exception as error:  # whatever wandb raises, training goes on
            self._complain(f"{what} could not be recorded ({in_short(error)})")

    def _revive(self, error: ConnectionError) -> None:
        """W&B's own process has died: another one goes on offline, or none."""
        self._run = None
        words = f"its own process has died ({in_short(error)})"
        if self._settings.ON_FAILURE == "offline" and self._num_revivals < _MOST_REVIVALS:
            self._num_revivals += 1
            self._service.end()
            try:
                # The run of the dead one still counts as this process's own.
                self._run = self._init("offline", reinit="create_new")
            except Exception as another:  # whatever wandb raises, training goes on
                words += f" and cannot be started again ({in_short(another)})"
        self._complain(f"{words}; {'gives up' if self._run is None else 'goes on offline'}")

    def _complain(self, words: str) -> None:
        self._complaints.append(words)
        logger.warning("W&B: %s, and training goes on", words)

    def later(self, what: str, action: Action) -> None:
        """Does in a thread what waits for the server; in the order of the calls, and once more in the end if need be.

        Args:
            what: it is, for the warning where it fails.
            action: what to do with the run.
        """
        if self._run is not None:
            self._jobs.add(Job(what, action))

    # ---- the end ----

    def finish(self, *, exit_code: int, is_preempted: bool = False) -> None:
        """Waits for all to be sent, within WANDB.FINISH_TIMEOUT, and says where it is; ends W&B's own process."""
        if self._run is None:
            self._service.end()
            return
        left = self._jobs.finish(self._settings.FINISH_TIMEOUT / 2)
        run, self._run = self._run, None
        is_sent = self._end_run(run, exit_code, is_preempted=is_preempted) and not run.offline
        if left and not run.offline and self._settings.ON_FAILURE != "disable":
            left = self._record_offline(left, exit_code, is_preempted=is_preempted)
        for job, reason in left:
            self._complain(f"{job.what} could not be recorded ({reason})")
        if is_sent:
            mark_sent(Path(run.dir).parent)
        self._say_where(run)

    def _end_run(self, run: wandb.Run, exit_code: int, *, is_preempted: bool) -> bool:
        """Whether nothing of it is left to be sent, where it is online."""
        is_sent = True
        try:
            if is_preempted and not self._is_stopped:  # a sweep hands out a preempted run again
                run.mark_preempting()
            run.finish(exit_code=exit_code)
        except Exception as error:  # TimeoutError, and what a dead process gives
            is_sent = False
            self._complaints.append(f"the end could not be sent ({type(error).__name__})")
        if is_sent and not run.offline and gave_up(Path(run.dir).parent):
            is_sent = False
            self._complaints.append("the server refused a part")
        self._service.end()
        return is_sent

    def _record_offline(self, jobs: list[NotDone], exit_code: int, *, is_preempted: bool) -> list[NotDone]:
        """One more piece of the run, of what its server could not be asked for; returns what even so is not done."""
        try:
            run = self._init("offline", reinit="create_new")
        except Exception as error:  # whatever wandb raises, training goes on
            return [NotDone(job, f"{reason}; {in_short(error)}") for job, reason in jobs]
        left = []
        for job, reason in jobs:
            try:
                job.action(run)
                self._complaints.append(f"{job.what} could not be sent ({reason})")
            except Exception as error:  # whatever wandb raises, training goes on
                left.append(NotDone(job, f"{reason}; {in_short(error)}"))
        self._end_run(run, exit_code, is_preempted=is_preempted)
        return left

    def _say_where(self, run: wandb.Run) -> None:
        unsent = unsent_pieces(self._folder, self._identity.run_id)
        if not unsent:
            forget_kept(self._folder)
            logger.info("W&B: all is at %s", run.url)
            return
        words = "recorded offline" if run.offline else "not all could be sent"
        logger.info("W&B: %s; send it with: %s", words, shlex.join(sync_words(unsent)))

    def raise_complaints(self) -> None:
        """The end of a run that shall not succeed without W&B.

        Raises:
            WorldError: something could not be recorded or sent, and WANDB.ON_FAILURE is raise.
        """
        if self._complaints and self._settings.ON_FAILURE == "raise":
            raise WorldError(
                f"W&B lacks a part of this run: {'; '.join(self._complaints)}; the training itself is complete, see "
                f"{self._folder}; use WANDB.ON_FAILURE offline to take that for a success",
                key="WANDB.ON_FAILURE",
            )


def _why(error: Exception) -> str:
    """What wandb could not begin for."""
    if re.search(r"\b40[13]\b|API key", str(error)):
        return f"W&B refuses the key ({first_line(error)})"
    return f"W&B did not answer ({in_short(error)})"
