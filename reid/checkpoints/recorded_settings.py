"""Settings recorded in a checkpoint or a gallery, for commands without --config_file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import yaml

from reid.checkpoints.trained import validate_weight_is_given
from reid.checkpoints.weight_file import read_weight_here
from reid.config.parsing import RawSetting
from reid.config.schema import SETTINGS
from reid.errors import WorldError

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

# Settings of the machine that made the file; this one may differ.
_OF_THE_MACHINE = ("MODEL.DEVICE", "SOLVER.PRECISION", "SOLVER.SHARDING")


def settings_of_checkpoint(cfg: CfgNode, command_args: dict[str, Any]) -> list[RawSetting]:
    """Return the settings in TEST.WEIGHT; none for a file without settings, as those of reid-strong-baseline."""
    del command_args
    validate_weight_is_given(cfg)
    _, content = read_weight_here(cfg)
    return settings_of_content(cfg, content)


def settings_of_content(cfg: CfgNode, content: dict[str, Any]) -> list[RawSetting]:
    """Return the settings in the content of TEST.WEIGHT, see `settings_of_checkpoint`."""
    if not isinstance(content.get("config"), str):
        logger.info(
            "TEST.WEIGHT=%s has no recorded settings; the defaults apply to all that are not given", cfg.TEST.WEIGHT
        )
        return []
    return settings_in(content["config"], f"TEST.WEIGHT={cfg.TEST.WEIGHT}", key="TEST.WEIGHT")


def settings_in(text: str, source: str, *, key: str) -> list[RawSetting]:
    try:
        nested = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WorldError(
            f"the settings in {source} must be YAML, but are damaged. Fix: give --config_file.", key=key
        ) from error
    return [given for given in _flatten(nested, "", f"in {source}") if given.key not in _OF_THE_MACHINE]


def _flatten(node: Any, key: str, source: str) -> Iterator[RawSetting]:
    is_section = any(known.startswith(f"{key}.") for known in SETTINGS)
    if isinstance(node, dict) and (is_section or not key):
        for name, value in node.items():
            yield from _flatten(value, f"{key}.{name}" if key else str(name), source)
    else:
        yield RawSetting(key, node, source)
