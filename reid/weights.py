"""Weights from files: trunks and whole models, read safely, with a report, never a silently random layer."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from reid import distributed, imagenet, timm_models
from reid.backbones import own_normalisation
from reid.config.load import as_plain_dict
from reid.errors import WorldError
from reid.layouts import CLASSIFIERS, holds_whole_model, inner, is_optimizer, likely_backbone
from reid.model import ReIDModel
from reid.safetensors_files import read_safetensors
from reid.wrapping import shared_out

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.weights")

_OF_IDENTITIES = ("classifier.", "centers")  # entries that are of use with the same identities only
_UNUSED = tuple(f"base.{name}" for name in CLASSIFIERS)


def read_file(path: Path, setting: str, *, key: str | None = None) -> dict[str, Any]:
    """What torch.save or safetensors wrote, if it is tensors and plain values only, and whole to the last bit.

    Args:
        path: of the file.
        setting: Full key of the setting that names the file, or a description of the file, for the error.
        key: Key of the error where `setting` is a description.

    Raises:
        WorldError: no such file, not such a file, or one that would run code when loaded.
    """
    key = key or setting
    if not path.is_file():
        raise WorldError(
            f"{setting} must name a file with weights, but there is none at {path}; correct the path", key=key
        )
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    except pickle.UnpicklingError as error:
        raise WorldError(
            f"{setting}={path} is refused: it is damaged, or holds Python objects, which could run any code when "
            "loaded, and not a state dict only; where it is a model that reid-strong-baseline has saved as a whole, "
            f"take out its weights with: python launch/convert.py {path} OUT.pth",
            key=key,
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = "; ".join(str(error).splitlines()[:1]) or type(error).__name__
        raise WorldError(
            f"{setting}={path} cannot be read as a file of weights, it is damaged or none: {reason}; give another file",
            key=key,
        ) from error
    if isinstance(content, dict) and is_optimizer(content):
        raise WorldError(
            f"{setting}={path} must hold a model, and it holds the state of an optimiser; give the file with the "
            "model, which reid-strong-baseline calls NAME_model_N.pth",
            key=key,
        )
    state = inner(content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise WorldError(
            f"{setting}={path} must hold a state dict, got {type(state).__name__}; give another file", key=key
        )
    return content


def _unpickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # with a CRC-32 of every tensor, which torch.load does not look at
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that it then refuses
        return torch.load(path, map_location="cpu", weights_only=True)


def state_dict_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint of ours or others, or the content itself where it is one; "module." taken off."""
    return {name.removeprefix("module."): value for name, value in inner(content).items() if isinstance(value, Tensor)}


def load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    *,
    optional: tuple[str, ...] = (),
    key: str | None = None,
) -> None:
    """Copies the state into the module and logs what was loaded and what was not.

    Args:
        module: takes the weights, in place.
        state: name -> tensor.
        source: the setting and file it came from, for the report.
        optional: beginnings of names that may be missing or of another shape, and then keep their values, or that only
            the state has.
        key: Full key of the setting that names the source, for the error.

    Raises:
        WorldError: an entry that is not optional is missing, has another shape, or is one that the module lacks: a
            smaller ResNet would fit into a larger one's weights.
    """
    wanted = {
        name: value
        for name, value in module.state_dict().items()
        # Absent from files written before PyTorch 0.4.1; only counts batches.
        if name in state or not name.endswith("num_batches_tracked")
    }
    missing = [name for name in wanted if name not in state]
    mismatched = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    unexpected = [name for name in state if name not in wanted]
    wrong = [name for name in missing + mismatched + unexpected if not name.startswith(optional)]
    if wrong:
        raise WorldError(
            f"{source} does not fit this model: of {len(wanted)} entries {len(missing)} are missing and "
            f"{len(mismatched)} have another shape, and {len(unexpected)} are too many ({_some(wrong)}); "
            f"{_remedy(wrong, state, wanted)}",
            key=key,
        )
    fitting = {
        name: shared_out(value, like=wanted[name])
        for name, value in state.items()
        if name in wanted and name not in mismatched
    }
    module.load_state_dict(fitting, strict=False)
    logger.info(
        "weights from %s: %d of %d entries loaded, %s missing, %s of another shape, %s not used",
        *(source, len(fitting), len(wanted), *map(_counted, (missing, mismatched, unexpected))),
    )


def _remedy(wrong: list[str], state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    if all(name.startswith("classifier.") for name in wrong) and "classifier.weight" in wrong:
        shapes = [tuple(part["classifier.weight"].shape) for part in (state, wanted) if "classifier.weight" in part]
        return (
            f"its classifier is {shapes[0]} and the training set's {shapes[-1]}; give a file of the same training set, "
            "or use MODEL.PRETRAIN_CHOICE finetune"
        )
    if holds_whole_model(state) and not holds_whole_model(wanted):
        return "it holds a whole model and not a backbone: use MODEL.PRETRAIN_CHOICE self, or finetune"
    theirs, own = likely_backbone(state), likely_backbone(wanted)
    if theirs is not None and theirs != own:
        return f"by its names and shapes it is of a {theirs}: set MODEL.NAME {theirs}, or give another file"
    if theirs is not None and not any(name.startswith("base.") for name in wrong):
        return "set MODEL.NECK to the file's"
    if holds_whole_model(wanted) and not holds_whole_model(state):
        return "it holds no whole model (base.*, bottleneck.*, classifier.*): give a checkpoint of one"
    if all("pos_embed" in name or "rel_pos" in name for name in wrong):
        return "set INPUT.SIZE_TRAIN to the one that it was trained with"
    return "set MODEL.NAME and MODEL.NECK to the file's"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({_some(names)})" if names else "0"


# ---- what a training starts from ----


def initialise(model: ReIDModel, cfg: CfgNode) -> None:
    """Gives a new model the weights that MODEL.PRETRAIN_CHOICE names; called by all ranks.

    Raises:
        WorldError: the file is missing or does not fit.
    """
    choice = cfg.MODEL.PRETRAIN_CHOICE
    if choice == "imagenet":
        _initialise_backbone(model, cfg)
    elif choice != "none":
        distributed.together(lambda: _initialise_whole(model, cfg))


def _initialise_whole(model: ReIDModel, cfg: CfgNode) -> None:
    path, source = Path(cfg.MODEL.PRETRAIN_PATH), f"MODEL.PRETRAIN_PATH={cfg.MODEL.PRETRAIN_PATH}"
    content = read_file(path, "MODEL.PRETRAIN_PATH")
    check_settings(content, cfg, source, key="MODEL.PRETRAIN_PATH")
    state = state_dict_of(content)
    if cfg.MODEL.PRETRAIN_CHOICE == "self":
        load_state(model, state, source, optional=("centers", *_UNUSED), key="MODEL.PRETRAIN_PATH")
        return
    others = {name: value for name, value in state.items() if not name.startswith(_OF_IDENTITIES)}
    load_state(model, others, source, optional=(*_OF_IDENTITIES, *_UNUSED), key="MODEL.PRETRAIN_PATH")
    logger.info(
        "MODEL.PRETRAIN_CHOICE finetune: the classifier is new, for %d identities; that of the file was for %d",
        *(model.classifier.out_features, num_pids_of(content)),
    )


def _initialise_backbone(model: ReIDModel, cfg: CfgNode) -> None:
    name, path, setting = cfg.MODEL.NAME, cfg.MODEL.PRETRAIN_PATH, "MODEL.PRETRAIN_PATH"
    key = setting
    if name not in imagenet.SOURCES:
        source = f"{setting}={path}" if path else f"timm's pretrained weights of {name}"

        def read() -> dict[str, Tensor]:
            content = read_file(Path(path), setting) if path else None
            return timm_models.pretrained(cfg, content and state_dict_of(content), source)

        if not path:
            key = "MODEL.PRETRAIN_CHOICE"
            distributed.once_per_node(read)
        state = distributed.together(read)
        optional = tuple(set(state) - set(model.base.state_dict()))  # its classifier
        distributed.together(lambda: load_state(model.base, state, source, optional=optional, key=key))
        return
    if distributed.on_main(lambda: _takes_own(name, path)):  # nodes may differ in what is there
        distributed.once_per_node(lambda: imagenet.fetch(name))
        path = str(distributed.together(lambda: imagenet.fetch(name)))
        key, setting = "MODEL.PRETRAIN_CHOICE", "MODEL.PRETRAIN_CHOICE imagenet: the file"
    state = distributed.together(lambda: state_dict_of(read_file(Path(path), setting, key=key)))
    distributed.together(lambda: load_state(model.base, state, f"{setting}={path}", optional=CLASSIFIERS, key=key))


def _takes_own(name: str, path: str) -> bool:
    """Whether the machine's own copy of the backbone's weights is meant, wherever that lies.

    Files of reid-strong-baseline name one in their author's home.

    Raises:
        WorldError: MODEL.PRETRAIN_PATH is not there, and not by another name either.
    """
    if not path or Path(path).exists():
        return not path
    owner = imagenet.owner_of(Path(path).name)
    if owner == name:
        logger.warning("MODEL.PRETRAIN_PATH=%s is not there; taking this machine's own copy of these weights", path)
        return True
    whose = f", and by its name it would be of {owner}" if owner else ""
    raise WorldError(
        f"MODEL.PRETRAIN_PATH must name a file with weights of {name}, but there is none at {path}{whose}; correct the "
        f"path, or set it to '' for the weights from {imagenet.SOURCES[name].url}",
        key="MODEL.PRETRAIN_PATH",
    )


# ---- made with other settings ----

# What decides how images become embeddings; another value gives other embeddings, or nonsense, without a word.
_DECISIVE = (
    *("MODEL.NAME", "MODEL.LAST_STRIDE", "MODEL.STEM_RELU", "MODEL.NECK"),
    *("INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD"),
)


def check_settings(content: dict[str, Any], cfg: CfgNode, source: str, *, key: str) -> None:
    """Compares the settings that one of our checkpoints was made with to those that it is to be used with.

    Args:
        content: Content of the checkpoint.
        cfg: The whole configuration.
        source: Setting and file that the checkpoint came from, for messages.
        key: Full key or option that names the source, for the error.

    Raises:
        WorldError: one of those that decide what the model computes is another.
    """
    if not isinstance(content.get("config"), str):  # of reid-strong-baseline
        if cfg.MODEL.STEM_RELU and re.fullmatch(r"resnet\d+", cfg.MODEL.NAME):
            logger.warning(
                "warning: %s does not say how it was trained; the ResNets of reid-strong-baseline have no ReLU in the "
                "stem: if it is one of these, use MODEL.STEM_RELU no, as configs/legacy does",
                source,
            )
        return
    made_with, used_with = _decisive(yaml.safe_load(content["config"])), _decisive(as_plain_dict(cfg))
    differences = []
    for name in _DECISIVE:
        before, now = made_with[name], used_with[name]
        if before != now:
            differences.append(f"{name} was {before!r} and is now {now!r}")
    if differences:
        raise WorldError(
            f"{source} is a model of other settings: {'; '.join(differences)}; use the --config_file that it was "
            "trained with (config.yaml in its run's folder)",
            key=key,
        )


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The decisive ones by full key; a normalisation that was left to the backbone is written out."""
    values = {}
    for key in _DECISIVE:
        section, name = key.split(".")
        values[key] = settings.get(section, {}).get(name)
    for key, place in (("INPUT.PIXEL_MEAN", 0), ("INPUT.PIXEL_STD", 1)):
        if values[key] is None:
            values[key] = list(own_normalisation(values["MODEL.NAME"])[place])
    return values


# ---- what is in a file ----


def num_pids_of(content: dict[str, Any]) -> int:
    """The number of identities of the file's classifier; 1 where it has none."""
    classifier = state_dict_of(content).get("classifier.weight")
    return len(classifier) if classifier is not None and classifier.dim() == 2 else 1


def checksum(content: dict[str, Any]) -> str:
    """Of all weights in the file, the same for the same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict_of(content).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_for_evaluation(model: ReIDModel, content: dict[str, Any], source: str) -> None:
    """Load backbone and neck of a checkpoint; the classifier plays no part in retrieval. Called by all ranks."""
    distributed.together(lambda: load_here(model, content, source))


def load_here(model: ReIDModel, content: dict[str, Any], source: str) -> None:
    """Load backbone and neck of a checkpoint on this process alone."""
    load_state(model, state_dict_of(content), source, optional=(*_OF_IDENTITIES, *_UNUSED), key="TEST.WEIGHT")
