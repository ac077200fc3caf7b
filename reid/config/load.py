"""Loading of settings: files and command lines to the frozen yacs tree, and back to YAML."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import reduce
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from reid.config.bundled import find_config_file
from reid.config.parsing import RawSetting, example, nearest, quoted, read_file, read_overrides
from reid.config.rules import validate_combinations
from reid.config.schema import NO_EFFECT, SECTIONS, SETTINGS
from reid.config.schema_model import RESNETS
from reid.config.validators import InvalidValue
from reid.errors import SettingsError, UnknownKeyError

logger = logging.getLogger(__name__)


def load_config(
    config_file: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    recorded: Iterable[RawSetting] = (),
    subfolder: str = "",
) -> CfgNode:
    """Return the frozen settings: the defaults, then those of the file, then those of the command line.

    Args:
        config_file: YAML file with settings; None for none.
        overrides: KEY VALUE pairs and KEY=VALUE items; the last occurrence of a key wins.
        recorded: Settings that a checkpoint was made with; they come before the file's.
        subfolder: Folder inside OUTPUT_DIR that becomes OUTPUT_DIR; empty for none.

    Raises:
        SettingsError: A key or value is not allowed, or the file cannot be read; its `key` names the setting.

    Example:
        >>> load_config("configs/demo.yml", ["SOLVER.BASE_LR", "0.001"]).SOLVER.BASE_LR
        0.001
    """
    values = {key: setting.default for key, setting in SETTINGS.items()}
    sources: dict[str, str] = {}
    unused = {}
    from_file = read_file(str(find_config_file(config_file)), SECTIONS) if config_file else ()
    for raw in chain(recorded, from_file, read_overrides(overrides, SETTINGS)):
        if raw.key in NO_EFFECT:
            unused[raw.key] = raw.source
        else:
            values[raw.key] = _validated(raw)
            sources[raw.key] = raw.source
    _resolve_backbone(values, sources)
    values["OUTPUT_DIR"] = values["OUTPUT_DIR"] or f"runs/{Path(config_file).stem if config_file else 'default'}"
    values["OUTPUT_DIR"] += f"/{subfolder}" if subfolder else ""
    cfg = _tree(values)
    validate_combinations(cfg)
    for key, source in unused.items():
        logger.warning("%s has no effect (%s): %s", key, source, NO_EFFECT[key])
    return cfg


def dump(cfg: CfgNode) -> str:
    """Return the settings as YAML that load_config reads back to the same tree."""
    return str(yaml.safe_dump(as_plain_dict(cfg), sort_keys=False, width=120))


def as_plain_dict(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings as nested dicts, lists, texts and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, CfgNode):
            return as_plain_dict(value)
        return list(value) if isinstance(value, tuple | list) else value

    return {name: plain(value) for name, value in cfg.items()}


def by_full_key(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings without nesting: SOLVER.BASE_LR -> its value."""
    return {key: reduce(getitem, key.split("."), cfg) for key in SETTINGS}


def _validated(raw: RawSetting) -> Any:
    key, value, source = raw
    if key in SECTIONS:
        first = next(known for known in SETTINGS if known.startswith(f"{key}."))
        raise SettingsError(
            f"{key} is a section and must have no value itself, got {quoted(value)} {source}; "
            f"set one of its keys, as {first}",
            key=key,
        )
    if key not in SETTINGS:
        meant = " or ".join(nearest(key, [*SETTINGS, *SECTIONS]))
        fix = f"did you mean {meant}?" if meant else "reid settings lists all keys"
        raise UnknownKeyError(f"every setting must be one of the known keys, got {key} {source}; {fix}", key=key)
    setting = SETTINGS[key]
    try:
        return setting.validate(value)
    except InvalidValue as error:
        fix = str(error) or f"use for example {example(setting.default)}"
        raise SettingsError(
            f"{key} must be {setting.validate.allowed}, got {quoted(value)} {source}; {fix}", key=key
        ) from None


def _resolve_backbone(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Set what the backbone decides: the activation of its stem, and of timm's models the normalization."""
    name = values["MODEL.NAME"]
    if name in RESNETS:
        return
    if "MODEL.STEM_RELU" in sources and not values["MODEL.STEM_RELU"]:
        logger.warning(
            "MODEL.STEM_RELU no has no effect (%s): the stem of %s always has its activation",
            sources["MODEL.STEM_RELU"],
            name,
        )
    values["MODEL.STEM_RELU"] = True
    if name.startswith("timm/"):
        values |= {key: None for key in ("INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD") if key not in sources}


def _tree(values: dict[str, Any]) -> CfgNode:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    cfg = CfgNode(nested)
    cfg.freeze()
    return cfg
