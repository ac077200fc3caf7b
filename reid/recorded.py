"""The settings that a checkpoint or a gallery was made with, for commands without --config_file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reid.config.parsing import RawSetting
from reid.config.schema import SETTINGS
from reid.errors import WorldError
from reid.gallery import read_facts
from reid.trained import check_weight_is_named
from reid.weight_file import read_weight_here

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.recorded")

# How the work was done there; this machine may be another.
_OF_THE_MACHINE = ("MODEL.DEVICE", "SOLVER.PRECISION", "SOLVER.SHARDING")


def of_checkpoint(cfg: CfgNode, own: dict[str, Any]) -> list[RawSetting]:
    """The settings inside TEST.WEIGHT; none where it holds none, as the files of reid-strong-baseline."""
    del own
    check_weight_is_named(cfg)
    _, content = read_weight_here(cfg)
    if not isinstance(content.get("config"), str):
        logger.info("TEST.WEIGHT=%s holds no settings: those not given are the defaults", cfg.TEST.WEIGHT)
        return []
    return _settings_in(content["config"], f"TEST.WEIGHT={cfg.TEST.WEIGHT}", key="TEST.WEIGHT")


def of_gallery(cfg: CfgNode, own: dict[str, Any]) -> list[RawSetting]:
    """The settings that the gallery was made with, its TEST.WEIGHT among them."""
    del cfg
    return _settings_in(read_facts(Path(own["gallery"])).config, f"--gallery {own['gallery']}", key="--gallery")


def _settings_in(text: str, source: str, *, key: str) -> list[RawSetting]:
    try:
        nested = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WorldError(
            f"the settings in {source} cannot be read; name their file by --config_file", key=key
        ) from error
    found: list[RawSetting] = []
    _flatten(nested, "", f"in {source}", found)
    return [setting for setting in found if setting.key not in _OF_THE_MACHINE]


def _flatten(node: Any, key: str, where: str, found: list[RawSetting]) -> None:
    is_section = any(known.startswith(f"{key}.") for known in SETTINGS)
    if isinstance(node, dict) and (is_section or not key):
        for name, value in node.items():
            _flatten(value, f"{key}.{name}" if key else str(name), where, found)
    else:
        found.append(RawSetting(key, node, where))
