"""From files and command lines to the frozen yacs tree, and back to YAML."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from reid.config.parsing import Given, example, nearest, read_file, read_overrides, shown
from reid.config.rules import check_combinations
from reid.config.schema import NO_EFFECT, RESNETS, SECTIONS, SETTINGS
from reid.config.validators import Refused
from reid.errors import SettingsError, UnknownKeyError

log = logging.getLogger("reid.config")


def load_config(
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    recorded: Iterable[Given] = (),
    subfolder: str = "",
) -> CfgNode:
    """The frozen settings: defaults, then the file, then the command line (KEY VALUE or KEY=VALUE; the last wins).

    Args:
        config_file: YAML.
        overrides: the command line's.
        recorded: what a checkpoint says that it was made with, in the place of a file.
        subfolder: of OUTPUT_DIR, which becomes OUTPUT_DIR; empty: none.
    """
    values = {key: default for key, (default, _) in SETTINGS.items()}
    places: dict[str, str] = {}  # where each key was given
    unused = {}
    from_file = read_file(str(config_file), SECTIONS) if config_file else ()
    for given in chain(recorded, from_file, read_overrides(overrides, SETTINGS)):
        if given.key in NO_EFFECT:
            unused[given.key] = given.where
        else:
            values[given.key] = _checked(given)
            places[given.key] = given.where
    _settle_backbone(values, places)
    values["OUTPUT_DIR"] = values["OUTPUT_DIR"] or f"runs/{Path(config_file).stem if config_file else 'default'}"
    values["OUTPUT_DIR"] += f"/{subfolder}" if subfolder else ""
    cfg = _tree(values)
    check_combinations(cfg)
    for key, where in unused.items():
        log.warning("%s has no effect (%s): %s", key, where, NO_EFFECT[key])
    return cfg


def dump(cfg: CfgNode) -> str:
    """The settings as YAML that load_config reads back to the same tree."""
    return str(yaml.safe_dump(as_plain_dict(cfg), sort_keys=False, width=120))


def as_plain_dict(cfg: CfgNode) -> dict[str, Any]:
    """The settings as nested dicts, lists, texts and numbers."""
    return {
        name: as_plain_dict(value)
        if isinstance(value, CfgNode)
        else list(value)
        if isinstance(value, tuple | list)
        else value
        for name, value in cfg.items()
    }


def by_full_key(cfg: CfgNode) -> dict[str, Any]:
    """The settings without nesting: SOLVER.BASE_LR -> its value."""
    return {key: reduce(getitem, key.split("."), cfg) for key in SETTINGS}


# ---- checks of one setting ----


def _checked(given: Given) -> Any:
    key, value, where = given
    if key in SECTIONS:
        first = next(known for known in SETTINGS if known.startswith(f"{key}."))
        raise SettingsError(
            f"{key} is a section and takes no value itself, got {shown(value)} {where}; "
            f"set one of its keys, as {first}",
            key=key,
        )
    if key not in SETTINGS:
        meant = " or ".join(nearest(key, [*SETTINGS, *SECTIONS]))
        remedy = f"did you mean {meant}?" if meant else "the keys are in reid/config/schema.py"
        raise UnknownKeyError(f"every setting must be one of the known keys, got {key} {where}; {remedy}", key=key)
    default, check = SETTINGS[key]
    try:
        return check(value)
    except Refused as refused:
        remedy = refused.remedy or f"use for example {example(default)}"
        raise SettingsError(f"{key} must be {refused.wanted}, got {shown(value)} {where}; {remedy}", key=key) from None


def _settle_backbone(values: dict[str, Any], places: dict[str, str]) -> None:
    """Gives the settings that not every backbone leaves open the value that they have there."""
    name = values["MODEL.NAME"]
    if name in RESNETS:
        return
    if "MODEL.STEM_RELU" in places and not values["MODEL.STEM_RELU"]:
        log.warning(
            "MODEL.STEM_RELU no has no effect (%s): the stem of %s always has its activation",
            *(places["MODEL.STEM_RELU"], name),
        )
    values["MODEL.STEM_RELU"] = True
    if name.startswith("timm/"):
        values |= {key: None for key in ("INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD") if key not in places}


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
