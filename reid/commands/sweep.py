"""The command `sweep`: validate a sweep file, create the sweep at W&B and start the agent of W&B."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reid.commands.arguments import Parser, at_least_one
from reid.config.parsing import nearest, quoted
from reid.config.schema import SETTINGS
from reid.config.validators import InvalidValue
from reid.errors import ReidError, SettingsError, UnknownKeyError
from reid.process.environment import load_environment_file
from reid.process.logs import set_up_console

logger = logging.getLogger(__name__)

_REQUIRED = ("program", "method", "parameters", "command")
_ARGUMENTS = "${args_no_hyphens}"  # replaced by the trial's KEY=VALUE, as launch/train.py takes them


def main() -> int:
    """Create the sweep of a file, or join an existing one, and run trials of it; return the exit code of a failure."""
    set_up_console()
    parser = Parser("--sweep-config FILE | --sweep-id ID [--count N]", "Search for settings with a W&B sweep.")
    parser.add_argument("--sweep-config", metavar="FILE", help="new sweep, as configs/sweeps/softmax_triplet.yaml")
    parser.add_argument("--sweep-id", metavar="ID", help="existing sweep to join, instead of a new one")
    count_help = "number of trials to run here; default: until the sweep ends"
    parser.add_argument("--count", metavar="N", type=at_least_one, help=count_help)
    try:
        arguments = parser.parse_args()
        load_environment_file(Path(".env"), os.environ)
        if not (arguments.sweep_config or arguments.sweep_id):
            raise SettingsError(
                "--sweep-config or --sweep-id must be given, got neither. Fix: add one of them.", key="--sweep-config"
            )
        sweep = read_sweep(Path(arguments.sweep_config)) if arguments.sweep_config else {}
        from reid.tracking.sweeps import create_sweep, log_in  # imports wandb, which takes a second

        log_in()
        name = arguments.sweep_id or create_sweep(sweep)
    except ReidError as error:
        logger.error("error: %s", error)
        return 2 if isinstance(error, ValueError) else 1
    logger.info("W&B: sweep %s; the same on another machine: wandb agent %s", name, name)
    count = ["--count", str(arguments.count)] if arguments.count else []
    sys.stdout.flush()
    # The agent replaces this process, which Slurm may signal alone, and forwards signals to the trials, which save.
    return os.execv(sys.executable, [sys.executable, "-m", "wandb", "agent", "--forward-signals", *count, name])


def read_sweep(file: Path) -> dict[str, Any]:
    """Return the definition of a sweep, whose parameters are settings with allowed values.

    Raises:
        SettingsError: The file is not such a sweep.
    """
    try:
        sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"--sweep-config must be a YAML file, got {file}: {reason}. Fix: correct it.", key="--sweep-config"
        ) from error
    missing = [name for name in _REQUIRED if not (isinstance(sweep, dict) and sweep.get(name))]
    if missing or not isinstance(sweep["parameters"], dict):
        required = ", ".join(missing) or "parameters as KEY: {values: [...]}"
        raise SettingsError(
            f"--sweep-config must be a W&B sweep, got {file} without {required}. Fix: see "
            "configs/sweeps/softmax_triplet.yaml.",
            key="--sweep-config",
        )
    if _ARGUMENTS not in sweep["command"]:
        raise SettingsError(
            f"command in {file} must pass the settings of a trial, got none. Fix: add {_ARGUMENTS}.",
            key="--sweep-config",
        )
    for key, space in sweep["parameters"].items():
        _validate_parameter(str(key), space, file)
    return dict(sweep)


def _validate_parameter(key: str, space: Any, file: Path) -> None:
    if key not in SETTINGS:
        meant = " or ".join(nearest(key, SETTINGS)) or "a key that reid settings lists"
        raise UnknownKeyError(
            f"parameters in {file} must be full keys of settings, got {key}. Fix: use {meant}.", key=key
        )
    space = space if isinstance(space, Mapping) else {}
    values = [*space.get("values", []), *(space[name] for name in ("value", "min", "max") if name in space)]
    if not values:
        raise SettingsError(f"{key} in {file} must have values, got nothing. Fix: add values, or min and max.", key=key)
    for value in values:
        try:
            SETTINGS[key].validate(value)
        except InvalidValue as error:
            fix = str(error) or "correct it"
            raise SettingsError(
                f"{key} in {file} must be {SETTINGS[key].validate.allowed}, got {quoted(value)}. Fix: {fix}", key=key
            ) from None
