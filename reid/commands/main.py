"""From the command line to a running story: arguments, ranks, settings; errors come first, each as one sentence."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from reid.commands.arguments import COMMANDS, ParsedArguments, parse_arguments
from reid.config.load import load_config
from reid.config.rules import fitting_nodes, validate_training
from reid.distributed.launch_environment import World, read_world, speaks_for_node
from reid.errors import ReidError, SettingsError, UnsavedError, WorldError
from reid.process import logs
from reid.process.environment import load_environment_file
from reid.process.signals import MARKER, Preempted, Signals, write_marker

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from reid.config.parsing import RawSetting

# Exit codes of a process; torchrun prints them, and itself ends with 1 whenever one is not 0.
FAILED, BAD_INPUT, UNSAVED, PREEMPTED = 1, 2, 74, 85

# Seconds that a process with nothing to say waits for the one that says it: torchrun ends all with the first that ends.
_PATIENCE = 10.0

logger = logging.getLogger(__name__)


def _no_recorded_settings(cfg: CfgNode, own: dict[str, Any]) -> list[RawSetting]:
    del cfg, own
    return []


class _Work(NamedTuple):
    """What a command does."""

    work: Callable[..., object]  # of cfg, accelerator, signals, and the command's own arguments by name
    # of cfg and these arguments: the settings to go by without --config_file
    recorded: Callable[[CfgNode, dict[str, Any]], list[RawSetting]] = _no_recorded_settings


def main(story: str, description: str) -> int:
    """Runs the story, one of `commands.COMMANDS`, as the command line says; returns the exit code."""
    logs.set_up_console()
    signals = Signals(under_launcher="TORCHELASTIC_RUN_ID" in os.environ)
    try:
        with _dropped_signals_repeated(signals):
            return _run_command(story, description, signals)
    except (Preempted, KeyboardInterrupt):  # before there was anything to save
        logger.info("stopped by a signal")
        return PREEMPTED
    finally:
        signals.ignore()


def exit_process(code: int) -> NoReturn:
    """Ends this process as Python does, but without taking the interpreter apart behind all else.

    A process group's thread that lets go of a tensor just then waits for the interpreter, which ends such threads;
    C++ answers that with SIGABRT, and a training that has done everything would have failed
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does first; there is no public way
    atexit._run_exitfuncs()
    logs.flush()
    os._exit(code)


@contextmanager
def _dropped_signals_repeated(signals: Signals) -> Iterator[None]:
    """For what signals' handlers raise while Python is in a fork's hooks or a destructor: it prints and drops that."""
    earlier = sys.unraisablehook

    def hear(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Preempted):
            signals.repeat()
        else:
            earlier(dropped)

    sys.unraisablehook = hear
    try:
        yield
    finally:
        sys.unraisablehook = earlier


def print_plan() -> int:
    """For job scripts: on how many nodes the training of the command line runs, and in which folder it will be."""
    logging.getLogger("reid").addHandler(logs.Console(sys.stderr))
    try:
        arguments = parse_arguments("plan", "Print the number of nodes that a training uses, and its OUTPUT_DIR.")
        cfg = load_config(arguments.config_file, arguments.overrides, subfolder=_trial())
        num_nodes = fitting_nodes(cfg, arguments.command_args["nodes"], arguments.command_args["ranks_per_node"])
    except ReidError as error:
        return _report(error, speaks=True)
    if num_nodes < arguments.command_args["nodes"]:
        logger.warning(
            "warning: the ranks of %d nodes cannot share SOLVER.IMS_PER_BATCH=%d evenly; it uses %d of them",
            *(arguments.command_args["nodes"], cfg.SOLVER.IMS_PER_BATCH, num_nodes),
        )
    logs.write_output(f"{num_nodes}\n{cfg.OUTPUT_DIR}\n")
    return 0


def _run_command(story: str, description: str, signals: Signals) -> int:
    try:
        load_environment_file(Path(".env"), os.environ)  # before wandb or torch look
        world = read_world(os.environ)
        if world.rank != 0:
            logging.getLogger("reid").setLevel(logging.ERROR)
        arguments = parse_arguments(story, description)
        cfg = load_config(arguments.config_file, arguments.overrides, subfolder=_trial() if story == "train" else "")
        if story == "train":
            validate_training(cfg, world.num_ranks)
        _check_alone(story, world)
        cfg, run = _prepare(story, arguments, cfg)
    except ReidError as error:  # the same on all processes of a node, so the first one speaks
        signals.release()
        return _report(error, speaks=speaks_for_node(os.environ))
    try:
        run(cfg, world, signals)
    except Preempted:
        if story == "train" and not (Path(cfg.OUTPUT_DIR) / MARKER).exists():
            write_marker(Path(cfg.OUTPUT_DIR), "stopped before there was anything to save")
        return PREEMPTED
    except ReidError as error:
        signals.release()
        return _report(error, speaks=world.rank == 0 or not error.is_shared)
    return 0


def _check_alone(story: str, world: World) -> None:
    if COMMANDS[story].one_process and world.num_ranks > 1:
        raise SettingsError(
            f"launch/{story}.py must be started as one process, got {world.num_ranks}; start it without torchrun",
            key="WORLD_SIZE",
        )


def _trial() -> str:
    """The run that an agent of a W&B sweep wants; its trials have the same command, and must not share a folder."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def _prepare(
    story: str, arguments: ParsedArguments, cfg: CfgNode
) -> tuple[CfgNode, Callable[[CfgNode, World, Signals], None]]:
    """The settings to go by, and the work.

    Imports torch and what rests on it only now: a wrong setting must not cost the seconds that this takes.
    """
    try:
        from reid.checkpoints import recorded_settings, weight_file
        from reid.commands import embed, evaluate, export, search
        from reid.commands.preflight import report
        from reid.distributed import collectives
        from reid.distributed.session import session
        from reid.training.train import train
    except (ImportError, RuntimeError) as error:
        raise explain_import_error(error) from error
    stories = {
        "train": _Work(train),
        "evaluate": _Work(evaluate.evaluate),
        "check": _Work(report.check),
        "export": _Work(export.export, recorded_settings.settings_of_checkpoint),
        "embed": _Work(embed.embed, recorded_settings.settings_of_checkpoint),
        "search": _Work(search.search, search.recorded_settings),
    }
    recorded_by = _no_recorded_settings if arguments.config_file else stories[story].recorded
    at_wandb = weight_file.is_at_wandb(cfg)  # fetched by one rank for all, which have to meet before

    def settle(found: list[RawSetting]) -> CfgNode:
        return load_config(arguments.config_file, [*arguments.overrides, *COMMANDS[story].fixed], recorded=found)

    found = [] if at_wandb else recorded_by(cfg, arguments.command_args)
    if found or COMMANDS[story].fixed:
        cfg = settle(found)

    def run_story(cfg: CfgNode, world: World, signals: Signals) -> None:
        try:
            with session(world, cfg) as accelerator:
                # Not before: while ranks look for each other no handler of Python's would run.
                signals.install()
                found = collectives.from_rank_zero(lambda: recorded_by(cfg, arguments.command_args)) if at_wandb else []
                if found:
                    with collectives.errors_shared():
                        cfg = settle(found)
                stories[story].work(cfg, accelerator, signals, **arguments.command_args)
        except RuntimeError as error:
            is_lost = world.num_ranks > 1 and collectives.is_lost_rank(error)
            raise explain_runtime_error(error, world.rank, lost_another=is_lost) from error

    return cfg, run_story


def explain_runtime_error(error: RuntimeError, rank: int, *, lost_another: bool) -> Exception:
    """A sentence for what the world does to a run; else the error itself."""
    first_line = (str(error).splitlines() or [""])[0]
    if lost_another:
        return WorldError(
            f"rank {rank} has lost another rank: {first_line}; see what that one said; the same command goes on from "
            "the last checkpoint"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return WorldError(
            f"rank {rank} has no GPU memory left: {first_line}; raise SOLVER.ACCUMULATE or the number of ranks, lower "
            f"SOLVER.IMS_PER_BATCH or TEST.IMS_PER_BATCH, or use SOLVER.PRECISION bf16",
            key="SOLVER.ACCUMULATE",
        )
    return error


def explain_import_error(error: Exception) -> Exception:
    """A sentence with the remedy for missing packages or a torchvision of another torch; else the error itself."""
    if isinstance(error, ModuleNotFoundError):
        return WorldError(f"the package {error.name} is not installed; install the project's packages with: uv sync")
    if "torchvision" not in str(error):
        return error
    try:
        pair = f"torch {version('torch')} and torchvision {version('torchvision')}"
    except PackageNotFoundError:
        return error
    return WorldError(
        f"{pair} do not belong together ({error}); install a pair that does with: "
        "uv sync --reinstall-package torch --reinstall-package torchvision"
    )


def _report(error: Exception, *, speaks: bool) -> int:
    if speaks:
        logger.error("error: %s", error)
    else:
        time.sleep(_PATIENCE)
    if isinstance(error, UnsavedError):
        return UNSAVED
    return BAD_INPUT if isinstance(error, ValueError) else FAILED
