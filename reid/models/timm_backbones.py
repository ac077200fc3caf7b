"""Any other trunk that timm has, as MODEL.NAME timm/NAME; timm itself is imported here only when it is needed."""

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

from reid.errors import SettingsError, WorldError

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

PREFIX = "timm/"


class Plan(NamedTuple):
    """How timm is asked for a model."""

    name: str  # timm's, without the prefix
    options: dict[str, Any]  # of timm.create_model, besides num_classes
    num_features: int  # D

    def create(self, **options: Any) -> nn.Module:
        import timm

        return timm.create_model(self.name, **self.options, **options)


def plan_for(cfg: CfgNode) -> Plan:
    """How to ask for the model that the settings name; nothing of its real size is made.

    Args:
        cfg: the whole configuration; MODEL.NAME, MODEL.LAST_STRIDE and the two sizes are read.

    Raises:
        SettingsError: timm has no such model, or it does not take images of these sizes.
    """
    return _plan(cfg.MODEL.NAME, tuple(cfg.INPUT.SIZE_TRAIN), tuple(cfg.INPUT.SIZE_TEST), cfg.MODEL.LAST_STRIDE)


@cache
def _plan(full_name: str, train: tuple[int, int], test: tuple[int, int], last_stride: int) -> Plan:
    plan = Plan(_checked(full_name), {}, 0)
    plan = _with_option(plan, img_size=train)
    if test != train:
        plan = _with_option(plan, dynamic_img_size=True)
    if last_stride == 1:
        plan = _with_option(plan, output_stride=16)
        logger.info(
            "MODEL.LAST_STRIDE 1: %s",
            f"{full_name} keeps its map at 1/16 of the image's size, with dilation for stride"
            if "output_stride" in plan.options
            else f"timm cannot build {full_name} with another stride, so it stays as it is",
        )
    for key, size in (("INPUT.SIZE_TRAIN", train), ("INPUT.SIZE_TEST", test)):
        plan = plan._replace(num_features=_dry_run(plan, key, size))
    return plan


def _checked(full_name: str) -> str:
    """timm's name of the model."""
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
    """The plan with the option, where the model takes it: there is no list of those that do."""
    more = plan._replace(options=plan.options | option)
    try:
        with torch.device("meta"):  # neither memory nor arithmetic
            more.create(num_classes=0)
    except Exception:  # each model refuses it in its own way
        return plan
    return more


def _dry_run(plan: Plan, key: str, size: tuple[int, int]) -> int:
    """D of the embedding of an image of this size."""
    try:
        with torch.device("meta"):
            output = plan.create(num_classes=0)(torch.empty(2, 3, *size))
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise TypeError("it gives no feature vector")
    except Exception as error:
        own = "x".join(map(str, _pretrained_cfg(plan.name)["input_size"][1:]))
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingsError(
            f"{key} must be a size that {PREFIX}{plan.name} takes, got {size} ({reason}); its own is {own}, "
            "and another model may take any",
            key=key,
        ) from error
    return output.shape[1]


def build(plan: Plan) -> nn.Module:
    """Images [B, 3, H, W] to the vector [B, D] that the model's own classifier would see, after its own pooling.

    Dropout and stochastic depth, which some models come with, are off: they would differ from rank to rank.
    """
    model = plan.create(num_classes=0)
    for module in model.modules():
        rates = {"p"} if isinstance(module, _DropoutNd) else {"drop_prob", "drop_rate"}
        for rate in rates & vars(module).keys():
            setattr(module, rate, 0.0)
    return model


def pretrained(cfg: CfgNode, state: dict[str, Tensor] | None, source: str) -> dict[str, Tensor]:
    """The state dict of the model with its classifier, made to fit by timm: positions to the size of the images.

    Args:
        cfg: the whole configuration, as for `plan_for`.
        state: in timm's layout for this model; None: timm's own, from this machine or the network.
        source: of the state, for the error.

    Raises:
        WorldError: an entry is missing or does not fit, or there are no weights, or they cannot be fetched.
    """
    plan = plan_for(cfg)
    if state is None:
        return _fetched(plan)
    try:
        return _adapted(plan, state)
    except Exception as error:  # each model has its own way to read a file, and to stumble over another's
        reason = " ".join(str(error).split())[:300]
        raise WorldError(
            f"{source} does not fit {cfg.MODEL.NAME}: {reason}; give timm's file of that model",
            key="MODEL.PRETRAIN_PATH",
        ) from error


def _adapted(plan: Plan, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not state:  # which timm would take for none given
        raise ValueError("it is empty")
    own = _pretrained_cfg(plan.name)
    classifiers = [own["classifier"]] if isinstance(own["classifier"], str) else list(own["classifier"] or ())
    sizes = [len(state[f"{name}.weight"]) for name in classifiers if f"{name}.weight" in state]
    try:
        return _strictly(plan, state, num_classes=sizes[0] if sizes else own["num_classes"])
    except RuntimeError:
        if sizes:
            raise
        return _strictly(plan, state, num_classes=0)  # a file without a classifier


def _strictly(plan: Plan, state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    # timm is strict only where the file has as many classes as the model; else what is missing would stay random.
    overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0}
    return plan.create(pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay).state_dict()


def _fetched(plan: Plan) -> dict[str, Tensor]:
    own = _pretrained_cfg(plan.name)
    address = f"https://huggingface.co/{own['hf_hub_id']}" if own["hf_hub_id"] else own["url"]
    if not address:
        raise WorldError(
            f"MODEL.PRETRAIN_CHOICE is imagenet, but timm has no weights of {PREFIX}{plan.name}; name a file by "
            "MODEL.PRETRAIN_PATH, or use MODEL.PRETRAIN_CHOICE none",
            key="MODEL.PRETRAIN_CHOICE",
        )
    cached = _in_cache(own)
    if cached is not None:
        return _adapted(plan, load_file(cached))
    try:
        with suppress(HTTPError):  # some answer is all that is wanted: without any, the hub is tried for a minute
            urlopen(Request(address, method="HEAD"), timeout=10).close()
        return plan.create(pretrained=True).state_dict()
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else (str(error).splitlines() or [type(error).__name__])[0]
        raise WorldError(
            f"MODEL.PRETRAIN_CHOICE is imagenet, but the weights of {PREFIX}{plan.name} cannot be fetched here "
            f"({reason}); download them from {address} elsewhere and name the file by MODEL.PRETRAIN_PATH, or train "
            "from scratch with MODEL.PRETRAIN_CHOICE none",
            key="MODEL.PRETRAIN_CHOICE",
        ) from error


def _in_cache(own: dict[str, Any]) -> str | None:
    """The file of the hub that this machine already has, where there is one; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    file = own["hf_hub_filename"] or "model.safetensors"
    if not own["hf_hub_id"] or not file.endswith(".safetensors"):
        return None
    found = try_to_load_from_cache(own["hf_hub_id"], file)
    return found if isinstance(found, str) else None


def normalization(full_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue that the model's pretrained weights want."""
    own = _pretrained_cfg(_checked(full_name))
    return tuple(own["mean"]), tuple(own["std"])


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm knows of the model's pretrained weights; of ImageNet's usual ones where there are none."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return vars(get_pretrained_cfg(name) or PretrainedCfg())
