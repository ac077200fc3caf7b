"""The trained model of TEST.WEIGHT, ready to embed images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reid.checkpoints import weights
from reid.checkpoints.state_dicts import checksum_of, num_pids_of
from reid.checkpoints.weight_file import read_weight
from reid.distributed import collectives
from reid.distributed.accelerator import move_model
from reid.errors import SettingsError
from reid.models.reid_model import ReIDModel, build_model
from reid.runs.start_checks import check_start

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from yacs.config import CfgNode


class TrainedModel(NamedTuple):
    """A model and the checkpoint that its weights come from."""

    model: ReIDModel  # in evaluation mode
    file: Path
    content: dict[str, Any]
    source: str  # setting and file, for messages
    checksum: str  # of the weights


def validate_weight_is_given(cfg: CfgNode) -> None:
    if not cfg.TEST.WEIGHT:
        raise SettingsError(
            "TEST.WEIGHT must name the checkpoint to use, got ''. Fix: add TEST.WEIGHT FILE to the command.",
            key="TEST.WEIGHT",
        )


def load_trained(cfg: CfgNode, accelerator: Accelerator) -> TrainedModel:
    """Check the start of a run and load TEST.WEIGHT; called by all ranks.

    Raises:
        SettingsError: TEST.WEIGHT is empty, or the backbone is unknown.
        WorldError: The ranks differ, or `read_trained` fails.
    """
    check_start(cfg)
    with collectives.errors_shared():
        validate_weight_is_given(cfg)
    return read_trained(cfg, accelerator)


def read_trained(cfg: CfgNode, accelerator: Accelerator) -> TrainedModel:
    """Load TEST.WEIGHT; the caller has already validated the settings. Called by all ranks.

    Raises:
        WorldError: The file is unreadable, does not fit, was made with other settings, or differs between ranks.
    """
    source = f"TEST.WEIGHT={cfg.TEST.WEIGHT}"
    file, content = read_weight(cfg)
    with collectives.errors_shared():
        weights.verify_settings(content, cfg, source, key="TEST.WEIGHT")
    checksum = checksum_of(content)
    collectives.require_same_on_all_ranks({"the contents of TEST.WEIGHT": checksum}, key="TEST.WEIGHT")
    with collectives.errors_shared():
        model = build_trained(cfg, content, source, accelerator.device)
    return TrainedModel(model, file, content, source, checksum)


def build_trained(cfg: CfgNode, content: dict[str, Any], source: str, device: torch.device) -> ReIDModel:
    """Return the model with the weights of a checkpoint's content, in eval mode on the device.

    Raises:
        WorldError: The weights do not fit the settings.
    """
    model = build_model(cfg, num_pids=num_pids_of(content))
    weights.load_for_retrieval(model, content, source)
    move_model(model, cfg, device)
    return model
