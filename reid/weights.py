"""Weights from files: trunks and whole models, read safely, with a report, never a silently random layer."""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from reid import distributed
from reid.backbones import IMAGENET_WEIGHTS
from reid.config import as_plain_dict
from reid.errors import WorldError
from reid.model import ReIDModel
from reid.wrapping import shared_out

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.weights")


def read_file(path: Path, setting: str) -> dict[str, Any]:
    """What torch.save wrote, if it is tensors and plain values only, and whole to the last bit.

    Args:
        path: of the file.
        setting: the full key that names it, for the error.

    Raises:
        WorldError: no such file, not such a file, or one that would run code when loaded.
    """
    if not path.is_file():
        raise WorldError(f"{setting} must name a file with weights, but there is none at {path}; correct the path")
    try:
        if zipfile.is_zipfile(path):  # with a CRC-32 of every tensor, which torch.load does not look at
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WorldError(
            f"{setting}={path} is refused: it is damaged, or holds Python objects, which could run any code when "
            "loaded; give a file that holds a state dict only"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = "; ".join(str(error).splitlines()[:1]) or type(error).__name__
        raise WorldError(
            f"{setting}={path} cannot be read as a file of weights, it is damaged or none: {reason}; give another file"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise WorldError(f"{setting}={path} must hold a state dict, got {type(state).__name__}; give another file")
    return content  # type: ignore[no-any-return]


def state_dict_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The model's state dict in one of our checkpoints, or the content itself where it is one; "module." taken off."""
    state: dict[str, Any] = content.get("model", content)
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def load_state(module: nn.Module, state: dict[str, Tensor], source: str, *, optional: tuple[str, ...] = ()) -> None:
    """Copies the state into the module and logs what was loaded and what was not.

    Args:
        module: takes the weights, in place.
        state: name -> tensor.
        source: the setting and file it came from, for the report.
        optional: beginnings of names that may be missing or of another shape, and then keep their values, or that only
            the state has.

    Raises:
        WorldError: an entry that is not optional is missing, has another shape, or is one that the module lacks: a
            smaller ResNet would fit into a larger one's weights.
    """
    wanted = module.state_dict()
    # Absent from files written before PyTorch 0.4.1; only counts batches.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    mismatched = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    unexpected = [name for name in state if name not in wanted]
    wrong = [name for name in missing + mismatched + unexpected if not name.startswith(optional)]
    if wrong:
        raise WorldError(
            f"{source} does not fit this model: of {len(wanted)} entries {len(missing)} are missing and "
            f"{len(mismatched)} have another shape, and {len(unexpected)} are too many ({_some(wrong)}); "
            f"{_remedy(wrong, state, wanted)}"
        )
    fitting = {
        name: shared_out(value, like=wanted[name])
        for name, value in state.items()
        if name in wanted and name not in mismatched
    }
    module.load_state_dict(fitting, strict=False)
    kept = [*missing, *mismatched]
    logger.info(
        "weights from %s: %d of %d entries loaded%s%s",
        source,
        len(fitting),
        len(wanted),
        f"; kept as they were: {_some(kept)}" if kept else "",
        f"; not used: {_some(unexpected)}" if unexpected else "",
    )


def _remedy(wrong: list[str], state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    if all(name.startswith("classifier.") for name in wrong) and "classifier.weight" in wrong:
        shapes = [tuple(part["classifier.weight"].shape) for part in (state, wanted) if "classifier.weight" in part]
        return (
            f"its classifier is {shapes[0]} and the training set's {shapes[-1]}; give a file of the same training set"
        )
    if any(name.startswith("base.") for name in state) and not any(name.startswith("base.") for name in wanted):
        return "it holds a whole model and not a backbone: use MODEL.PRETRAIN_CHOICE self"
    if any(name.startswith("base.") for name in wanted) and not any(name.startswith("base.") for name in state):
        return "it holds no whole model (base.*, bottleneck.*, classifier.*): give a checkpoint of one"
    return "set MODEL.NAME and MODEL.NECK to the file's"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def initialise(model: ReIDModel, cfg: CfgNode) -> None:
    """Gives a new model the weights that MODEL.PRETRAIN_CHOICE names; called by all ranks.

    Raises:
        WorldError: the file is missing or does not fit.
    """
    choice, path = cfg.MODEL.PRETRAIN_CHOICE, cfg.MODEL.PRETRAIN_PATH
    if choice == "none":
        return
    source = f"MODEL.PRETRAIN_PATH={path}"
    if choice == "self":
        content = distributed.together(lambda: read_file(Path(path), "MODEL.PRETRAIN_PATH"))
        distributed.together(lambda: check_settings(content, cfg, source))
        distributed.together(lambda: load_state(model, state_dict_of(content), source, optional=("centers",)))
        return
    if path:
        state = distributed.together(lambda: state_dict_of(read_file(Path(path), "MODEL.PRETRAIN_PATH")))
    else:
        source = f"torchvision's ImageNet weights of {cfg.MODEL.NAME}"
        state = _fetch_imagenet(cfg.MODEL.NAME)
    distributed.together(lambda: load_state(model.base, state, source, optional=("fc.",)))


def _fetch_imagenet(name: str) -> dict[str, Tensor]:
    """torchvision's own weights, from its cache or the network, fetched by one process of every node.

    Raises:
        WorldError: they can be had from neither; says which file to put where.
    """
    url = IMAGENET_WEIGHTS[name].url
    folder = Path(torch.hub.get_dir()) / "checkpoints"

    def fetch() -> dict[str, Tensor]:
        try:
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(url, progress=False, weights_only=True)
        except OSError as error:
            raise WorldError(
                f"MODEL.PRETRAIN_CHOICE is imagenet, but the weights cannot be fetched here ({error}); download {url} "
                f"elsewhere and put it into {folder}, or name the file by MODEL.PRETRAIN_PATH, or train from scratch "
                "with MODEL.PRETRAIN_CHOICE none"
            ) from error
        return state

    distributed.once_per_node(fetch)
    return distributed.together(fetch)


# What decides how images become embeddings; another value gives other embeddings, or nonsense, without a word.
_DECISIVE = (
    *("MODEL.NAME", "MODEL.LAST_STRIDE", "MODEL.STEM_RELU", "MODEL.NECK"),
    *("INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD"),
)


def check_settings(content: dict[str, Any], cfg: CfgNode, source: str) -> None:
    """Compares the settings that one of our checkpoints was made with to those that it is to be used with.

    Raises:
        WorldError: one of those that decide what the model computes is another.
    """
    if not isinstance(content.get("config"), str):
        return  # of reid-strong-baseline
    made_with, used_with = yaml.safe_load(content["config"]), as_plain_dict(cfg)
    differences = []
    for key in _DECISIVE:
        section, name = key.split(".")
        before, now = made_with.get(section, {}).get(name), used_with[section][name]
        if before != now:
            differences.append(f"{key} was {before!r} and is now {now!r}")
    if differences:
        raise WorldError(
            f"{source} is a model of other settings: {'; '.join(differences)}; use the --config_file that it was "
            "trained with (config.yaml in its run's folder)"
        )


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
    """Backbone and neck from a checkpoint, as the classifier plays no part in retrieval; called by all ranks."""
    state = state_dict_of(content)
    distributed.together(lambda: load_state(model, state, source, optional=("classifier", "centers")))
