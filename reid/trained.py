"""A trained model from TEST.WEIGHT, ready to embed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reid import distributed, weights
from reid.errors import SettingsError
from reid.model import ReIDModel, build_model
from reid.start import check_start
from reid.weight_file import read_weight
from reid.wrapping import place

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
        raise SettingsError(
            "TEST.WEIGHT must name the checkpoint to use, got ''; add TEST.WEIGHT FILE to the command",
            key="TEST.WEIGHT",
        )


def load_trained(cfg: CfgNode, accelerator: Accelerator) -> Trained:
    """The model in TEST.WEIGHT, before anything else of a run; called by all ranks.

    Raises:
        SettingsError: no file is named, or there is no such backbone.
        WorldError: ranks differ, and as `read_trained`.
    """
    check_start(cfg)
    distributed.together(lambda: check_weight_is_named(cfg))
    return read_trained(cfg, accelerator)


def read_trained(cfg: CfgNode, accelerator: Accelerator) -> Trained:
    """The same of settings that were checked.

    Raises:
        WorldError: the file cannot be read, does not fit, was made with other settings, or ranks have different ones.
    """
    source = f"TEST.WEIGHT={cfg.TEST.WEIGHT}"
    file, content = read_weight(cfg)
    distributed.together(lambda: weights.check_settings(content, cfg, source, key="TEST.WEIGHT"))
    checksum = weights.checksum(content)
    distributed.agree({"the contents of TEST.WEIGHT": checksum}, key="TEST.WEIGHT")
    model = build_model(cfg, num_pids=weights.num_pids_of(content))
    weights.load_for_evaluation(model, content, source)
    place(model, cfg, accelerator.device)
    return Trained(model.eval(), file, content, source, checksum)
