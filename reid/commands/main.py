"""Every command from its command line to its exit code; user errors come first, each as one line."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from reid.commands.arguments import COMMANDS, ParsedArguments, parse_arguments
from reid.config.load import load_config
from reid.config.parsing import nearest
from reid.config.rules import fitting_nodes, validate_training
from reid.distributed.launch_environment import World, read_world, reports_for_node
from reid.errors import ReidError, SettingsError, UnsavedError, WorldError
from reid.process import logs
from reid.process.environment import load_environment_file
from reid.process.side_effects import first_line
from reid.process.signals import MARKER, Preempted, Signals, write_marker

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from reid.config.parsing import RawSetting

# Exit codes of a process. torchrun reports them, and exits with 1 itself unless all are 0.
FAILED, BAD_INPUT, UNSAVED, PREEMPTED = 1, 2, 74, 85

# Seconds a silent rank waits before exiting, so that the reporting rank can print the error: torchrun ends all ranks
# with the first one that exits.
_PATIENCE = 10.0

# Commands without ranks: module and function.
_OTHERS = {
    "convert": ("reid.commands.convert", "main"),
    "data": ("reid.commands.check_data", "main"),
    "plan": ("reid.commands.main", "print_plan"),
    "settings": ("reid.commands.settings", "main"),
    "summarize": ("reid.commands.summarize", "main"),
    "sweep": ("reid.commands.sweep", "main"),
}
_USAGE = """\
usage: reid COMMAND [ARGUMENTS]; reid COMMAND --help; reid --version

    train      train a model; resumes if it was interrupted
    evaluate   evaluate a checkpoint
    check      find problems of ranks, network, data and disk before a training
    data       verify the benchmarks on disk: reid data check
    settings   print the settings with their documentation
    embed      write the embeddings of a folder of images, as a gallery
    search     find images in a gallery
    export     write a model as ONNX, torch.export or safetensors
    convert    extract the weights of a pickled model
    summarize  mean and spread of several runs
    sweep      run a W&B sweep
    plan       nodes and folder of a training, for job scripts

Several ranks: torchrun --nproc_per_node=N -m reid COMMAND [ARGUMENTS]
"""

logger = logging.getLogger(__name__)


def console() -> NoReturn:
    """Run `reid COMMAND ...`, which does the same as `python launch/COMMAND.py ...`, and exit."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        logs.write_output(_USAGE)
        sys.exit(0 if name else BAD_INPUT)
    if name == "--version":
        logs.write_output(f"reid-strong {version('reid-strong')}\n")
        sys.exit(0)
    sys.argv[:2] = [f"reid {name}"]
    if name in _OTHERS:
        module, function = _OTHERS[name]
        exit_process(getattr(import_module(module), function)())
    if name in COMMANDS:
        exit_process(main(name))
    near = nearest(name, [*COMMANDS, *_OTHERS]) or ["train"]
    sys.stderr.write(f"error: COMMAND must be one of those that reid --help lists, got {name}. Fix: use {near[0]}.\n")
    sys.exit(BAD_INPUT)


def main(name: str) -> int:
    """Run a command of `arguments.COMMANDS` with the arguments of this process; return the exit code."""
    logs.set_up_console()
    signals = Signals(under_launcher="TORCHELASTIC_RUN_ID" in os.environ)
    try:
        with _dropped_signals_repeated(signals):
            return _run_command(name, signals)
    except (Preempted, KeyboardInterrupt):  # before there was anything to save
        logger.info("stopped by a signal")
        return PREEMPTED
    finally:
        signals.ignore()


def exit_process(code: int) -> NoReturn:
    """Exit without interpreter finalization.

    A process-group thread that frees a tensor at that point aborts with SIGABRT, and a finished training would count
    as failed (https://github.com/pytorch/pytorch/issues/190489).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # the interpreter's first step; there is no public function
    atexit._run_exitfuncs()
    logs.flush()
    os._exit(code)


@contextmanager
def _dropped_signals_repeated(signals: Signals) -> Iterator[None]:
    """Repeat a signal whose exception Python drops, as in a destructor or a hook of fork."""
    original = sys.unraisablehook

    def repeat(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Preempted):
            signals.repeat()
        else:
            original(dropped)

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = original


def print_plan() -> int:
    """Print the number of nodes that a training runs on, and its OUTPUT_DIR, for job scripts; return the exit code."""
    logging.getLogger("reid").addHandler(logs.Console(sys.stderr))
    try:
        arguments = parse_arguments("plan")
        cfg = load_config(arguments.config_file, arguments.overrides, subfolder=_sweep_run())
        num_nodes = fitting_nodes(cfg, arguments.command_args["nodes"], arguments.command_args["ranks_per_node"])
    except ReidError as error:
        return _report(error, is_reporter=True)
    given = arguments.command_args["nodes"]
    if num_nodes < given:
        logger.warning(
            f"warning: the ranks of {given} nodes cannot share SOLVER.IMS_PER_BATCH={cfg.SOLVER.IMS_PER_BATCH} evenly; "
            f"the training uses {num_nodes} of them"
        )
    logs.write_output(f"{num_nodes}\n{cfg.OUTPUT_DIR}\n")
    return 0


def _run_command(name: str, signals: Signals) -> int:
    try:
        load_environment_file(Path(".env"), os.environ)  # before wandb or torch read the environment
        world = read_world(os.environ)
        if world.rank != 0:
            logging.getLogger("reid").setLevel(logging.ERROR)
        arguments = parse_arguments(name)
        subfolder = _sweep_run() if name == "train" else ""
        cfg = load_config(arguments.config_file, arguments.overrides, subfolder=subfolder)
        if name == "train":
            validate_training(cfg, world.num_ranks)
        if COMMANDS[name].one_process and world.num_ranks > 1:
            raise SettingsError(
                f"{name} must be started as one process, got {world.num_ranks}. Fix: start it without torchrun.",
                key="WORLD_SIZE",
            )
        cfg, run = _prepare(name, arguments, cfg)
    except ReidError as error:  # the same on all processes of a node, so one of them reports it
        signals.release()
        return _report(error, is_reporter=reports_for_node(os.environ))
    try:
        run(cfg, world, signals)
    except Preempted:
        if name == "train" and not (Path(cfg.OUTPUT_DIR) / MARKER).exists():
            write_marker(Path(cfg.OUTPUT_DIR), "stopped before there was anything to save")
        return PREEMPTED
    except ReidError as error:
        signals.release()
        return _report(error, is_reporter=world.rank == 0 or not error.is_shared)
    return 0


def _sweep_run() -> str:
    """Return the id of a W&B sweep's run: all its runs have the same command, and must not share a folder."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def _no_settings(cfg: CfgNode, command_args: dict[str, Any]) -> list[RawSetting]:
    del cfg, command_args
    return []


class _Work(NamedTuple):
    run: Callable[..., object]  # takes cfg, accelerator, signals, and the arguments of the command by name
    # takes cfg and these arguments; returns the recorded settings that apply without --config_file
    recorded_settings: Callable[[CfgNode, dict[str, Any]], list[RawSetting]] = _no_settings


def _prepare(
    name: str, arguments: ParsedArguments, cfg: CfgNode
) -> tuple[CfgNode, Callable[[CfgNode, World, Signals], None]]:
    """Return the settings that apply, and the work; torch is imported here, after all settings are validated."""
    try:
        from reid.checkpoints import weight_file
        from reid.checkpoints.recorded_settings import settings_of_checkpoint
        from reid.commands import embed, evaluate, export, search
        from reid.commands.preflight import report
        from reid.distributed import collectives
        from reid.distributed.session import session
        from reid.training.train import train
    except (ImportError, RuntimeError) as error:
        raise explain_import_error(error) from error
    work = {
        "train": _Work(train),
        "evaluate": _Work(evaluate.evaluate),
        "check": _Work(report.check),
        "export": _Work(export.export, settings_of_checkpoint),
        "embed": _Work(embed.embed, settings_of_checkpoint),
        "search": _Work(search.search, search.recorded_settings),
    }[name]
    command_args, fixed = arguments.command_args, COMMANDS[name].fixed
    recorded_settings = _no_settings if arguments.config_file else work.recorded_settings
    at_wandb = weight_file.is_at_wandb(cfg)  # then rank 0 downloads it, after the ranks have met

    def with_recorded(cfg: CfgNode, recorded: list[RawSetting]) -> CfgNode:
        if not recorded and not fixed:
            return cfg
        return load_config(arguments.config_file, [*arguments.overrides, *fixed], recorded=recorded)

    def run(cfg: CfgNode, world: World, signals: Signals) -> None:
        try:
            with session(world, cfg) as accelerator:
                # Not earlier: while ranks look for each other, no Python signal handler runs.
                signals.install()
                if at_wandb:
                    recorded = collectives.from_rank_zero(lambda: recorded_settings(cfg, command_args))
                    with collectives.errors_shared():
                        cfg = with_recorded(cfg, recorded)
                work.run(cfg, accelerator, signals, **command_args)
        except RuntimeError as error:
            is_lost = world.num_ranks > 1 and collectives.is_lost_rank(error)
            raise explain_runtime_error(error, world.rank, lost_another=is_lost) from error

    return with_recorded(cfg, [] if at_wandb else recorded_settings(cfg, command_args)), run


def explain_runtime_error(error: RuntimeError, rank: int, *, lost_another: bool) -> Exception:
    """Translate a RuntimeError (lost rank, out of memory) into a user error; return any other unchanged."""
    reason = first_line(error)
    if lost_another:
        return WorldError(
            f"rank {rank} has lost another rank: {reason}. Fix: see the error of that rank; the same command "
            "resumes from the last checkpoint."
        )
    if type(error).__name__ == "OutOfMemoryError":
        return WorldError(
            f"rank {rank} has no GPU memory left: {reason}. Fix: raise SOLVER.ACCUMULATE or the number of ranks, "
            "lower SOLVER.IMS_PER_BATCH or TEST.IMS_PER_BATCH, or use SOLVER.PRECISION bf16.",
            key="SOLVER.ACCUMULATE",
        )
    return error


def explain_import_error(error: Exception) -> Exception:
    """Translate a missing package or a torchvision of another torch into a user error; return any other unchanged."""
    if isinstance(error, ModuleNotFoundError):
        return WorldError(f"the package {error.name} must be installed. Fix: install all packages with: uv sync")
    if "torchvision" not in str(error):
        return error
    try:
        pair = f"torch {version('torch')} and torchvision {version('torchvision')}"
    except PackageNotFoundError:
        return error
    return WorldError(
        f"torch and torchvision must be a matching pair, got {pair} ({error}). Fix: "
        "uv sync --reinstall-package torch --reinstall-package torchvision"
    )


def _report(error: Exception, *, is_reporter: bool) -> int:
    """Print the error, or wait until another process has; return the exit code."""
    if is_reporter:
        logger.error("error: %s", error)
    else:
        time.sleep(_PATIENCE)
    if isinstance(error, UnsavedError):
        return UNSAVED
    return BAD_INPUT if isinstance(error, ValueError) else FAILED
