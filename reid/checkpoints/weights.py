"""Loading of backbones and full models from files, without running code; every layer left out is reported."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from reid.checkpoints import pretrained
from reid.checkpoints.safetensors_files import read_safetensors
from reid.checkpoints.state_dicts import (
    CLASSIFIERS,
    inner,
    is_full_model,
    is_optimizer,
    likely_backbone,
    num_pids_of,
    state_dict_of,
)
from reid.config.load import as_plain_dict
from reid.distributed import collectives
from reid.distributed.accelerator import shard_like
from reid.errors import WorldError
from reid.models import timm_backbones
from reid.models.backbones import default_normalization
from reid.models.reid_model import ReIDModel

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_OF_IDENTITIES = ("classifier.", "centers")  # entries that only the same identities can use
_UNUSED = tuple(f"base.{name}" for name in CLASSIFIERS)


def read_file(path: Path, setting: str, *, key: str | None = None) -> dict[str, Any]:
    """Return the content of a file of torch.save or safetensors: tensors and plain values only, verified bit by bit.

    Args:
        path: Path of the file.
        setting: Full key of the setting that names the file, or a description of the file, for the error.
        key: Key of the error where `setting` is a description.

    Raises:
        WorldError: The file is missing, damaged, of another kind, or would run code when loaded.
    """
    error_of = partial(WorldError, key=key or setting)
    if not path.is_file():
        raise error_of(f"{setting} must be a file with weights, got {path}. Fix: correct the path.")
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else _load(path)
    except pickle.UnpicklingError as error:
        raise error_of(
            f"{setting}={path} must hold a state dict only, got a damaged file or Python objects, which could run any "
            "code when loaded. Fix: if it is a model that reid-strong-baseline saved, extract its weights with: "
            f"reid convert {path} OUT.pth"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = "; ".join(str(error).splitlines()[:1]).rstrip(".") or type(error).__name__
        raise error_of(
            f"{setting}={path} must be a file of weights, but cannot be read: {reason}. Fix: give another file."
        ) from error
    if isinstance(content, dict) and is_optimizer(content):
        raise error_of(
            f"{setting}={path} must hold a model, got the state of an optimizer. Fix: give the file with the model, "
            "which reid-strong-baseline calls NAME_model_N.pth."
        )
    state = inner(content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise error_of(f"{setting}={path} must hold a state dict, got {type(state).__name__}. Fix: give another file.")
    return content


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # with a CRC-32 of every tensor, which torch.load does not verify
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that it then rejects
        return torch.load(path, map_location="cpu", weights_only=True)


def load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    *,
    optional: tuple[str, ...] = (),
    key: str | None = None,
) -> None:
    """Copy the state into the module and log which entries were loaded.

    Args:
        module: Module that receives the weights, in place.
        state: Tensors by name.
        source: Setting and file that the state comes from, for the report.
        optional: Prefixes of entries that may be missing, of another shape or unexpected; those keep their values.
        key: Full key of the setting that names the source, for the error.

    Raises:
        WorldError: An entry that is not optional is missing, has another shape or is unexpected. Unexpected entries
            count because a smaller ResNet would fit into the weights of a larger one.
    """
    wanted = {
        name: value
        for name, value in module.state_dict().items()
        # Only counts batches; absent from files written before PyTorch 0.4.1.
        if name in state or not name.endswith("num_batches_tracked")
    }
    missing = [name for name in wanted if name not in state]
    mismatched = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    unexpected = [name for name in state if name not in wanted]
    wrong = [name for name in missing + mismatched + unexpected if not name.startswith(optional)]
    if wrong:
        raise WorldError(
            f"{source} must fit this model: of {len(wanted)} entries {len(missing)} are missing, {len(mismatched)} "
            f"have another shape, and {len(unexpected)} are unexpected ({_some(wrong)}). {_fix(wrong, state, wanted)}",
            key=key,
        )
    fitting = {
        name: shard_like(value, like=wanted[name])
        for name, value in state.items()
        if name in wanted and name not in mismatched
    }
    module.load_state_dict(fitting, strict=False)
    logger.info(
        "weights from %s: %d of %d entries loaded, %s missing, %s of another shape, %s unused",
        *(source, len(fitting), len(wanted), *map(_count, (missing, mismatched, unexpected))),
    )


def _fix(wrong: list[str], state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    if all(name.startswith("classifier.") for name in wrong) and "classifier.weight" in wrong:
        shapes = [tuple(part["classifier.weight"].shape) for part in (state, wanted) if "classifier.weight" in part]
        return (
            f"Its classifier is {shapes[0]} and the training set's {shapes[-1]}. Fix: give a file of the same training "
            "set, or use MODEL.PRETRAIN_CHOICE finetune."
        )
    if is_full_model(state) and not is_full_model(wanted):
        return "It is a full model, not a backbone. Fix: use MODEL.PRETRAIN_CHOICE self, or finetune."
    backbone = likely_backbone(state)
    if backbone is not None and backbone != likely_backbone(wanted):
        return f"It is a {backbone} by its names and shapes. Fix: set MODEL.NAME {backbone}, or give another file."
    if backbone is not None and not any(name.startswith("base.") for name in wrong):
        return "Fix: set MODEL.NECK to the file's."
    if is_full_model(wanted) and not is_full_model(state):
        return "It is not a full model (base.*, bottleneck.*, classifier.*). Fix: give a checkpoint of one."
    if all("pos_embed" in name or "rel_pos" in name for name in wrong):
        return "Fix: set INPUT.SIZE_TRAIN to the size that it was trained with."
    return "Fix: set MODEL.NAME and MODEL.NECK to the file's."


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _count(names: list[str]) -> str:
    return f"{len(names)} ({_some(names)})" if names else "0"


# ---- initialization of a training ----


def initialize(model: ReIDModel, cfg: CfgNode) -> None:
    """Load the weights that MODEL.PRETRAIN_CHOICE names into a new model; called by all ranks.

    Raises:
        WorldError: The file is missing or does not fit.
    """
    choice = cfg.MODEL.PRETRAIN_CHOICE
    if choice == "imagenet":
        _initialize_backbone(model, cfg)
    elif choice != "none":
        with collectives.errors_shared():
            _initialize_full_model(model, cfg)


def _initialize_full_model(model: ReIDModel, cfg: CfgNode) -> None:
    path, source = Path(cfg.MODEL.PRETRAIN_PATH), f"MODEL.PRETRAIN_PATH={cfg.MODEL.PRETRAIN_PATH}"
    content = read_file(path, "MODEL.PRETRAIN_PATH")
    verify_settings(content, cfg, source, key="MODEL.PRETRAIN_PATH")
    state = state_dict_of(content)
    if cfg.MODEL.PRETRAIN_CHOICE == "self":
        load_state(model, state, source, optional=("centers", *_UNUSED), key="MODEL.PRETRAIN_PATH")
        return
    others = {name: value for name, value in state.items() if not name.startswith(_OF_IDENTITIES)}
    load_state(model, others, source, optional=(*_OF_IDENTITIES, *_UNUSED), key="MODEL.PRETRAIN_PATH")
    logger.info(
        "MODEL.PRETRAIN_CHOICE finetune: the classifier is new, for %d identities; the file's has %d",
        *(model.classifier.out_features, num_pids_of(content)),
    )


def _initialize_backbone(model: ReIDModel, cfg: CfgNode) -> None:
    name, path = cfg.MODEL.NAME, cfg.MODEL.PRETRAIN_PATH
    if name not in pretrained.SOURCES:
        _initialize_timm_backbone(model, cfg)
        return
    # Rank 0 decides, as the files may differ between nodes.
    uses_cache = collectives.from_rank_zero(lambda: pretrained.uses_cache(name, path))
    if uses_cache:
        collectives.once_per_node(lambda: pretrained.fetch(name))
    setting = "MODEL.PRETRAIN_CHOICE imagenet: the file" if uses_cache else "MODEL.PRETRAIN_PATH"
    key = setting.partition(" ")[0]
    with collectives.errors_shared():
        file = pretrained.fetch(name) if uses_cache else Path(path)
        state = state_dict_of(read_file(file, setting, key=key))
        load_state(model.base, state, f"{setting}={file}", optional=CLASSIFIERS, key=key)


def _initialize_timm_backbone(model: ReIDModel, cfg: CfgNode) -> None:
    path, key = cfg.MODEL.PRETRAIN_PATH, "MODEL.PRETRAIN_PATH" if cfg.MODEL.PRETRAIN_PATH else "MODEL.PRETRAIN_CHOICE"
    source = f"{key}={path}" if path else f"timm's pretrained weights of {cfg.MODEL.NAME}"

    def read() -> dict[str, Tensor]:
        content = read_file(Path(path), key) if path else None
        return timm_backbones.pretrained(cfg, content and state_dict_of(content), source)

    if not path:
        collectives.once_per_node(read)
    with collectives.errors_shared():
        state = read()
        classifier = tuple(set(state) - set(model.base.state_dict()))
        load_state(model.base, state, source, optional=classifier, key=key)


# ---- comparison of settings ----

# Settings that determine the embedding of an image; with another value it would be silently wrong.
_DECISIVE = ("MODEL.NAME", "MODEL.LAST_STRIDE", "MODEL.STEM_RELU", "MODEL.NECK", "INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD")


def verify_settings(content: dict[str, Any], cfg: CfgNode, source: str, *, key: str) -> None:
    """Compare the settings recorded in a checkpoint with those that it is used with.

    Args:
        content: Content of the checkpoint.
        cfg: Complete configuration.
        source: Setting and file that the checkpoint came from, for messages.
        key: Full key or option that names the source, for the error.

    Raises:
        WorldError: A setting that determines the embedding differs.
    """
    if not isinstance(content.get("config"), str):  # a file of reid-strong-baseline
        if cfg.MODEL.STEM_RELU and re.fullmatch(r"resnet\d+", cfg.MODEL.NAME):
            logger.warning(
                "warning: %s has no recorded settings. If it is a ResNet of reid-strong-baseline, its stem has no "
                "ReLU: use MODEL.STEM_RELU no, as configs/legacy does",
                source,
            )
        return
    recorded, now = _decisive(yaml.safe_load(content["config"])), _decisive(as_plain_dict(cfg))
    differences = [
        f"{name} was {recorded[name]!r} and is now {now[name]!r}" for name in _DECISIVE if recorded[name] != now[name]
    ]
    if differences:
        raise WorldError(
            f"{source} was trained with other settings: {'; '.join(differences)}. Fix: use the --config_file that it "
            "was trained with (config.yaml in its run directory).",
            key=key,
        )


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the decisive settings by full key, with the backbone's normalization where none is set."""
    split = {key: key.split(".") for key in _DECISIVE}
    values = {key: settings.get(section, {}).get(name) for key, (section, name) in split.items()}
    for key, index in (("INPUT.PIXEL_MEAN", 0), ("INPUT.PIXEL_STD", 1)):
        if values[key] is None:
            values[key] = list(default_normalization(values["MODEL.NAME"])[index])
    return values


def load_for_retrieval(model: ReIDModel, content: dict[str, Any], source: str) -> None:
    """Load backbone and neck of a checkpoint; retrieval needs no classifier."""
    load_state(model, state_dict_of(content), source, optional=(*_OF_IDENTITIES, *_UNUSED), key="TEST.WEIGHT")
