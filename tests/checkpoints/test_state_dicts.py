"""Tests of the recognition of state dicts by names and shapes."""

import pytest
import torch
from torchvision.models import resnext50_32x4d, wide_resnet50_2

from reid.checkpoints.state_dicts import epoch_in_name, inner, likely_backbone
from reid.models.backbones import BACKBONES


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("prefix", ["", "base."])
def test_every_backbone_is_recognized_by_its_names_and_shapes(name, prefix):
    with torch.device("meta"):
        state = BACKBONES[name](last_stride=1, stem_relu=True).state_dict()
    assert likely_backbone({prefix + key: value for key, value in state.items()}) == name


@pytest.mark.parametrize("build", [resnext50_32x4d, wide_resnet50_2])
def test_similar_architecture_is_not_recognized_as_a_backbone(build):
    with torch.device("meta"):
        state = build(weights=None).state_dict()
    assert likely_backbone(state) is None


def test_incomplete_state_dict_is_not_recognized_as_a_backbone():
    with torch.device("meta"):
        state = BACKBONES["resnet50"](last_stride=1, stem_relu=True).state_dict()
    assert likely_backbone({}) is None
    assert likely_backbone({key: value for key, value in state.items() if not key.startswith("layer2")}) is None


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("resnet50_model_2.pth", 2),
        ("resnet50_ibn_a_model_120.pth", 120),
        ("resnet50_model_0040.pth", 40),
        ("resnet50_ibn_a.pth", 0),
        ("resnet50_model_best.pth", 0),
        ("resnet50_model___import__('os').getpid().pth", 0),
        ("model_2.pth", 0),
        ("resnet50_model_2.pt", 0),
        ("best_0120_mAP_0.8570.pt", 0),
    ],
)
def test_the_epoch_is_read_from_reid_strong_baselines_names_only(name, epoch):
    assert epoch_in_name(name) == epoch


def test_a_state_dict_is_taken_out_of_its_wrapping():
    state = {"a": torch.zeros(1)}
    assert inner(state) is state
    assert inner({"model": state, "epoch": 1}) is state
    assert inner({"state_dict": state, "arch": "resnet50", "model": "resnet50"}) is state
