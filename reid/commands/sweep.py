"""W&B sweeps: a file checked like settings, the sweep created, W&B's own agent started."""

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
from reid.errors import ReidError, SettingsError, UnknownKeyError, WorldError
from reid.process.environment import load_environment_file
from reid.process.logs import Console

logger = logging.getLogger(__name__)

_NEEDED = ("program", "method", "parameters", "command")
_ARGUMENTS = "${args_no_hyphens}"  # the trial's KEY=VALUE, as launch/train.py takes them


def main() -> int:
    """Creates the sweep of a file, or goes on with one, and runs trials of it here; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Console(sys.stdout)])
    words = "--sweep-config FILE | --sweep-id ID [--count N]"
    parser = Parser(words, "Search for settings with a W&B sweep.")
    parser.add_argument("--sweep-config", metavar="FILE", help="of a new sweep, as configs/sweeps/softmax_triplet.yaml")
    parser.add_argument("--sweep-id", metavar="ID", help="of a sweep to go on with, instead of a new one")
    count_help = "trials to run here; without it, until the sweep ends"
    parser.add_argument("--count", metavar="N", type=at_least_one, help=count_help)
    try:
        arguments = parser.parse_args()
        load_environment_file(Path(".env"), os.environ)
        if not (arguments.sweep_config or arguments.sweep_id):
            raise SettingsError(
                "one of --sweep-config and --sweep-id must be given, got neither; add one of them", key="--sweep-config"
            )
        sweep = read_sweep(Path(arguments.sweep_config)) if arguments.sweep_config else {}
        _log_in()
        name = arguments.sweep_id or _create(sweep)
    except ReidError as error:
        logging.basicConfig(force=True, level=logging.INFO, format="%(message)s", handlers=[Console(sys.stderr)])
        logger.error("error: %s", error)
        return 2 if isinstance(error, ValueError) else 1
    logger.info("W&B: sweep %s; the same on another machine: wandb agent %s", name, name)
    count = ["--count", str(arguments.count)] if arguments.count else []
    sys.stdout.flush()
    # In place of this process, which Slurm may signal alone; the agent passes signals on to the trials, which save.
    return os.execv(sys.executable, [sys.executable, "-m", "wandb", "agent", "--forward-signals", *count, name])


def read_sweep(file: Path) -> dict[str, Any]:
    """A sweep's definition, whose parameters are settings with values that they take.

    Raises:
        SettingsError: it is none.
    """
    try:
        sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"--sweep-config must be a YAML file, got {file}: {reason}; correct it", key="--sweep-config"
        ) from error
    missing = [name for name in _NEEDED if not (isinstance(sweep, dict) and sweep.get(name))]
    if missing or not isinstance(sweep["parameters"], dict):
        wanted = ", ".join(missing) or "parameters as KEY: {values: [...]}"
        raise SettingsError(
            f"{file} must be a W&B sweep, but lacks {wanted}; see configs/sweeps/softmax_triplet.yaml",
            key="--sweep-config",
        )
    if _ARGUMENTS not in sweep["command"]:
        raise SettingsError(
            f"command in {file} must pass a trial's settings on, but lacks {_ARGUMENTS}; add it", key="--sweep-config"
        )
    for key, space in sweep["parameters"].items():
        _check_parameter(str(key), space, file)
    return dict(sweep)


def _check_parameter(key: str, space: Any, file: Path) -> None:
    if key not in SETTINGS:
        meant = " or ".join(nearest(key, SETTINGS)) or "a key of docs/settings.md"
        raise UnknownKeyError(
            f"parameters in {file} must be settings by their full keys, got {key}; use {meant}", key=key
        )
    space = space if isinstance(space, Mapping) else {}
    values = [*space.get("values", []), *(space[name] for name in ("value", "min", "max") if name in space)]
    if not values:
        raise SettingsError(
            f"{key} in {file} must say what to try, got nothing; give it values, or min and max", key=key
        )
    for value in values:
        try:
            SETTINGS[key].validate(value)
        except InvalidValue as error:
            remedy = str(error) or "correct it"
            raise SettingsError(
                f"{key} in {file} must be {SETTINGS[key].validate.allowed}, got {quoted(value)}; {remedy}", key=key
            ) from None


def _log_in() -> None:
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # of wandb's own, pydantic's, and others
        raise _refused("takes part in no sweep", error) from error
    if not has_key:
        raise WorldError(
            "W&B has no sweep for those without a key; set WANDB_API_KEY, or run: wandb login", key="WANDB_API_KEY"
        )


def _create(sweep: dict[str, Any]) -> str:
    """The new sweep's name, for agents on other machines too."""
    import wandb

    try:
        project = sweep.get("project") or SETTINGS["WANDB.PROJECT"].default
        sweep_id = wandb.sweep(sweep, entity=sweep.get("entity"), project=project)
    except Exception as error:  # of wandb's own, pydantic's, and others
        raise _refused("does not make the sweep", error) from error
    return "/".join([*([sweep["entity"]] if sweep.get("entity") else []), project, sweep_id])


def _refused(what: str, error: Exception) -> WorldError:
    reason = " ".join(str(error).split())
    return WorldError(
        f"W&B {what}: {reason}; see that the key is right and that there is a network", key="WANDB_API_KEY"
    )
