"""A trained model from TEST.WEIGHT, ready to embed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reid import distributed, weights
from reid.errors import SettingsError
from reid.model import ReIDModel, build_model
from reid.run import check_start, place
from reid.weight_file import read_weight

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode


class Trained(NamedTuple):
    """A model with its weights."""

    model: ReIDModel  # in evaluation mode
    file: Path
    content: dict[str, Any]  # of the file
    source: str  # the setting and the file, for messages
    checksum: str  # of the weights


def check_weight_is_named(cfg: CfgNode) -> None:
    if not cfg.TEST.WEIGHT:
        raise SettingsError("TEST.WEIGHT must name the checkpoint to use, got ''; add TEST.WEIGHT FILE to the command")


def load_trained(cfg: CfgNode, accelerator: Accelerator) -> Trained:
    """The model in TEST.WEIGHT; called by all ranks.

    Raises:
        SettingsError: no file is named, or there is no such backbone.
        WorldError: it cannot be read, does not fit, was made with other settings, or ranks differ.
    """
    check_start(cfg)
    distributed.together(lambda: check_weight_is_named(cfg))
    source = f"TEST.WEIGHT={cfg.TEST.WEIGHT}"
    file, content = read_weight(cfg)
    distributed.together(lambda: weights.check_settings(content, cfg, source))
    checksum = weights.checksum(content)
    distributed.agree({"the contents of TEST.WEIGHT": checksum})
    model = build_model(cfg, num_pids=weights.num_pids_of(content))
    weights.load_for_evaluation(model, content, source)
    place(model, cfg, accelerator)
    return Trained(model.eval(), file, content, source, checksum)
