"""Models of timm as backbones, by MODEL.NAME timm/NAME. timm is imported only if one is used."""

from __future__ import annotations

import difflib
import logging
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from reid.errors import SettingsError, WorldError, reason_of

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

PREFIX = "timm/"


class Plan(NamedTuple):
    """Arguments for `timm.create_model`."""

    name: str  # in timm, without the prefix
    options: dict[str, Any]  # all options except num_classes
    num_features: int  # D

    def create(self, **options: Any) -> nn.Module:
        import timm

        return timm.create_model(self.name, **self.options, **options)


def plan_for(cfg: CfgNode) -> Plan:
    """Return the arguments that create the model of the settings; models are only built on the meta device.

    Args:
        cfg: Complete configuration; MODEL.NAME, MODEL.LAST_STRIDE and the two sizes are read.

    Raises:
        SettingsError: timm has no such model, or it does not take images of these sizes.
    """
    return _plan(cfg.MODEL.NAME, tuple(cfg.INPUT.SIZE_TRAIN), tuple(cfg.INPUT.SIZE_TEST), cfg.MODEL.LAST_STRIDE)


@cache
def _plan(full_name: str, train: tuple[int, int], test: tuple[int, int], last_stride: int) -> Plan:
    plan = Plan(_timm_name(full_name), {}, 0)
    plan = _with_option(plan, img_size=train)
    if test != train:
        plan = _with_option(plan, dynamic_img_size=True)
    if last_stride == 1:
        plan = _with_option(plan, output_stride=16)
        logger.info(
            "MODEL.LAST_STRIDE 1: %s",
            f"the feature map of {full_name} has 1/16 of the image's size, by dilation in place of stride"
            if "output_stride" in plan.options
            else f"it has no effect, as timm cannot build {full_name} with another stride",
        )
    for key, size in (("INPUT.SIZE_TRAIN", train), ("INPUT.SIZE_TEST", test)):
        plan = plan._replace(num_features=_dry_run(plan, key, size))
    return plan


def _timm_name(full_name: str) -> str:
    """Return the model's name in timm; raise an error for an unknown one."""
    import timm

    name = full_name.removeprefix(PREFIX)
    known = timm.list_models() + timm.list_pretrained()
    if name in known:
        return name
    near = " or ".join(f"{PREFIX}{candidate}" for candidate in difflib.get_close_matches(name, known, n=3))
    raise SettingsError(
        f"MODEL.NAME must be {PREFIX} and the name of a model of timm {timm.__version__}, got {full_name}; "
        + (f"did you mean {near}?" if near else "timm.list_models() lists them"),
        key="MODEL.NAME",
    )


def _with_option(plan: Plan, **option: Any) -> Plan:
    """Return the plan with the option if the model accepts it, which timm has no list of."""
    extended = plan._replace(options=plan.options | option)
    try:
        with torch.device("meta"):  # takes neither memory nor arithmetic
            extended.create(num_classes=0)
    except Exception:  # each model rejects it in its own way
        return plan
    return extended


def _dry_run(plan: Plan, key: str, size: tuple[int, int]) -> int:
    """Return D of the embedding of an image of this size."""
    try:
        with torch.device("meta"):
            output = plan.create(num_classes=0)(torch.empty(2, 3, *size))
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise TypeError("the model returns no feature vector")
    except Exception as error:  # each model rejects a size in its own way
        usual = "x".join(map(str, _pretrained_cfg(plan.name)["input_size"][1:]))
        reason = reason_of(error).rstrip(".")
        raise SettingsError(
            f"{key} must be a size that {PREFIX}{plan.name} takes, got {size} ({reason}); use its pretraining size "
            f"{usual}, or another model",
            key=key,
        ) from error
    return output.shape[1]


def build(plan: Plan) -> nn.Module:
    """Return a model from images [B, 3, H, W] to the vector [B, D] that its classifier would get.

    Dropout and stochastic depth, which some models come with, are off: they would differ from rank to rank.
    """
    model = plan.create(num_classes=0)
    for module in model.modules():
        rates = {"p"} if isinstance(module, _DropoutNd) else {"drop_prob", "drop_rate"}
        for rate in rates & vars(module).keys():
            setattr(module, rate, 0.0)
    return model


def pretrained(cfg: CfgNode, state: dict[str, Tensor] | None, source: str) -> dict[str, Tensor]:
    """Return the state dict of the model with its classifier; timm resizes position embeddings to the images' size.

    Args:
        cfg: Complete configuration, as for `plan_for`.
        state: State dict in timm's layout for this model; None for timm's pretrained weights.
        source: Setting and file of the state, for the error.

    Raises:
        WorldError: An entry is missing or does not fit, or there are no weights, or they cannot be downloaded.
    """
    plan = plan_for(cfg)
    if state is None:
        return _download(plan)
    try:
        return _adapt(plan, state)
    except Exception as error:  # each model reads a file, and fails on another model's, in its own way
        reason = " ".join(str(error).split())[:300]
        raise WorldError(
            f"{source} does not fit {cfg.MODEL.NAME}: {reason}; give timm's file of that model",
            key="MODEL.PRETRAIN_PATH",
        ) from error


def _adapt(plan: Plan, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not state:  # timm would take it for no state at all
        raise ValueError("it is empty")
    info = _pretrained_cfg(plan.name)
    classifiers = [info["classifier"]] if isinstance(info["classifier"], str) else list(info["classifier"] or ())
    sizes = [len(state[f"{name}.weight"]) for name in classifiers if f"{name}.weight" in state]
    try:
        return _load_strictly(plan, state, num_classes=sizes[0] if sizes else info["num_classes"])
    except RuntimeError:
        if sizes:
            raise
        return _load_strictly(plan, state, num_classes=0)  # a file without a classifier


def _load_strictly(plan: Plan, state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    # timm is strict only if file and model have equally many classes; else missing entries would stay random.
    overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0}
    return plan.create(pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay).state_dict()


def _download(plan: Plan) -> dict[str, Tensor]:
    """Return timm's pretrained weights, from this machine's cache where they are in it."""
    info = _pretrained_cfg(plan.name)
    address = f"https://huggingface.co/{info['hf_hub_id']}" if info["hf_hub_id"] else info["url"]
    if not address:
        raise WorldError(
            f"MODEL.PRETRAIN_CHOICE is imagenet, but timm has no weights of {PREFIX}{plan.name}; set "
            "MODEL.PRETRAIN_PATH to a file, or use MODEL.PRETRAIN_CHOICE none",
            key="MODEL.PRETRAIN_CHOICE",
        )
    cached = _cached_file(info)
    if cached is not None:
        return _adapt(plan, load_file(cached))
    try:
        with suppress(HTTPError):  # any answer will do: without a network, the hub's client retries for a minute
            urlopen(Request(address, method="HEAD"), timeout=10).close()
        return plan.create(pretrained=True).state_dict()
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else reason_of(error)
        raise WorldError(
            f"MODEL.PRETRAIN_CHOICE is imagenet, but the weights of {PREFIX}{plan.name} cannot be downloaded here "
            f"({reason}); download them from {address} elsewhere and set MODEL.PRETRAIN_PATH to the file, or train "
            "from scratch with MODEL.PRETRAIN_CHOICE none",
            key="MODEL.PRETRAIN_CHOICE",
        ) from error


def _cached_file(info: dict[str, Any]) -> str | None:
    """Return the file in the hub's cache on this machine, if any, without using the network."""
    from huggingface_hub import try_to_load_from_cache

    file = info["hf_hub_filename"] or "model.safetensors"
    if not info["hf_hub_id"] or not file.endswith(".safetensors"):
        return None
    path = try_to_load_from_cache(info["hf_hub_id"], file)
    return path if isinstance(path, str) else None


def normalization(full_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation (red, green, blue) that the model was pretrained with."""
    info = _pretrained_cfg(_timm_name(full_name))
    return tuple(info["mean"]), tuple(info["std"])


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """Return timm's description of the model's pretrained weights; timm's defaults if there are none."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return vars(get_pretrained_cfg(name) or PretrainedCfg())
