"""Any other trunk that timm has, as MODEL.NAME timm/NAME; timm itself is imported here only when it is needed."""

from __future__ import annotations

import difflib
import logging
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from reid.errors import SettingsError

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.timm_models")

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
        + (f"did you mean {near}?" if near else "timm.list_models() lists them")
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
            "and another model may take any"
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


def normalisation(full_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue that the model's pretrained weights want."""
    own = _pretrained_cfg(_checked(full_name))
    return tuple(own["mean"]), tuple(own["std"])


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm knows of the model's pretrained weights; of ImageNet's usual ones where there are none."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return vars(get_pretrained_cfg(name) or PretrainedCfg())
