"""Tests of the model: names, features and initialization as published, and the effect of settings.

Also covers reid.models.backbones.
"""

import json
import re
from pathlib import Path

import golden_weights
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet

from reid.config.load import load_config
from reid.errors import SettingsError
from reid.models.backbones import BACKBONES, IBN
from reid.models.reid_model import ReIDOutput, build_model

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "backbone_state_dict.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "backbones.npz")


def config(name="resnet18", **settings):
    keys = {"NECK_FEAT": "TEST", "SAMPLER": "DATALOADER"}
    overrides = [f"{keys.get(key, 'MODEL')}.{key}={value}" for key, value in settings.items()]
    return load_config(None, [f"MODEL.NAME={name}", "MODEL.PRETRAIN_CHOICE=none", *overrides])


def small(num_pids=20, **settings):
    torch.manual_seed(0)
    return build_model(config(**settings), num_pids)


def pictures(num_images=4, size=(64, 32)):
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(0))


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


# ---- the published models ----


# One of each kind in the default run; senet154 has 115 million parameters.
FIRST = ("resnet18", "resnet50", "se_resnet50", "se_resnext50", "resnet50_ibn_a")
PUBLISHED = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_have_the_published_names(name):
    with torch.device("meta"):
        model = build_model(config(name), 751)
    assert list(shapes(model).items()) == list(SHAPES[name].items())


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request):
    """Return a backbone's name, and a function that builds the recorded float64 model in eval mode."""
    weights = {}

    def build(**settings):
        with torch.device("meta"):  # random weights would take too long
            model = build_model(config(request.param, **settings), 751).double().eval()
        if not weights:
            model.to_empty(device="cpu")
            golden_weights.fill(model)
            weights.update(model.state_dict())
        model.load_state_dict(weights, assign=True)
        return model

    return request.param, build


def test_features_are_the_published_ones(golden, published):
    name, build = published
    model, maps = build(), []
    model.base.register_forward_hook(lambda module, images, output: maps.append(output))
    with torch.no_grad():
        after = model(torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(after.numpy(), golden[f"{name}/after"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(maps[0].mean((2, 3)).numpy(), golden[f"{name}/before"], rtol=1e-9, atol=1e-10)


def test_features_with_last_stride_2_are_the_published_ones(golden, published):
    name, build = published
    with torch.no_grad():
        before = build(NECK_FEAT="before", LAST_STRIDE=2)(torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(before.numpy(), golden[f"{name}/before_last_stride_2"], rtol=1e-9, atol=1e-10)


def test_the_backbones_are_those_with_recorded_features():
    assert set(BACKBONES) == {*SHAPES, "resnet101_ibn_a"}


def test_every_backbone_can_be_chosen_and_no_other():
    assert [config(name).MODEL.NAME for name in BACKBONES] == list(BACKBONES)
    with pytest.raises(SettingsError) as error:
        config("resnet50_ibn_b")
    named, _, other = re.search(r"(\w+(, \w+)+), or (\S+)", str(error.value)).groups()
    assert named.split(", ") == list(BACKBONES)
    assert other.startswith("timm/")


def test_resnet101_ibn_a_extends_resnet50_ibn_a_in_layer3_only():
    """It has the same first layers as resnet50_ibn_a, as resnet101 has those of resnet50."""
    with torch.device("meta"):
        small, large, plain = (
            shapes(BACKBONES[name](last_stride=1, stem_relu=True))
            for name in ("resnet50_ibn_a", "resnet101_ibn_a", "resnet101")
        )
    more = {name: shape for name, shape in large.items() if name not in small}
    assert {name: shape for name, shape in large.items() if name in small} == small
    assert {name.split(".bn1.")[0] for name in more if ".bn1." in name} == {f"layer3.{i}" for i in range(6, 23)}
    outside = {name: shape for name, shape in large.items() if ".bn1." not in name and not name.startswith("fc.")}
    assert outside == {name: shape for name, shape in plain.items() if ".bn1." not in name}


# ---- training and retrieval ----


def test_training_gives_the_feature_before_the_neck_and_logits():
    model = small(num_pids=7).train()
    output = model(pictures())
    assert type(output) is ReIDOutput
    assert (output.feat.shape, output.logits.shape) == ((4, 512), (4, 7))
    normalized = (output.feat - output.feat.mean(0)) / (output.feat.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(output.logits, normalized @ model.classifier.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("neck_feat", "after_neck"), [("after", True), ("before", False)])
def test_retrieval_compares_the_feature_after_or_before_the_neck(neck_feat, after_neck):
    model = small(NECK_FEAT=neck_feat).eval()
    golden_weights.fill(model)
    with torch.no_grad():
        embedding = model(pictures())
        feat = model.base(pictures()).mean((2, 3))
        after = model.bottleneck(feat)
    assert embedding.shape == (4, 512)
    assert not torch.allclose(feat, after)
    torch.testing.assert_close(embedding, after if after_neck else feat)


@pytest.mark.parametrize(("last_stride", "size"), [(1, (16, 8)), (2, (8, 4))])
@pytest.mark.parametrize("name", [*PUBLISHED, pytest.param("resnet101_ibn_a", marks=pytest.mark.slow)])
def test_the_last_stride_sets_the_size_of_the_feature_map(name, last_stride, size):
    with torch.device("meta"):
        backbone = BACKBONES[name](last_stride=last_stride, stem_relu=False)
        feature_map = backbone(torch.empty(2, 3, 256, 128))
    assert feature_map.shape == (2, backbone.num_features, *size)


# ---- neck and initialization ----


def test_bnneck_and_classifier_initialization():
    model = small(num_pids=751)
    assert torch.equal(model.bottleneck.weight, torch.ones(512))
    assert torch.equal(model.bottleneck.bias, torch.zeros(512))
    assert (model.bottleneck.eps, model.bottleneck.momentum) == (1e-5, 0.1)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["bottleneck.bias"]
    assert model.classifier.bias is None
    assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.01)
    assert abs(model.classifier.weight.mean().item()) < 1e-5


def test_classifier_without_neck_has_bias_and_uses_raw_feature():
    model = small(NECK="no", num_pids=7)
    head = {name: shape for name, shape in shapes(model).items() if not name.startswith("base.")}
    assert head == {"classifier.weight": [7, 512], "classifier.bias": [7]}
    assert all(parameter.requires_grad for parameter in model.parameters())
    bound = 1 / 512**0.5  # torch's default for a linear layer: uniform within it
    assert model.classifier.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    feat, logits = model.train()(pictures())
    torch.testing.assert_close(logits, model.classifier(feat))
    model.eval()
    torch.testing.assert_close(model(pictures()), model.base(pictures()).mean((2, 3)))


# ---- centers ----


def test_centers_are_a_buffer_and_exist_only_with_center_loss():
    plain = small()
    with_centers = small(IF_WITH_CENTER="yes", METRIC_LOSS_TYPE="triplet_center")
    assert set(shapes(with_centers)) - set(shapes(plain)) == {"centers"}
    assert shapes(with_centers)["centers"] == [20, 512]
    assert dict(with_centers.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert with_centers.centers.std().item() == pytest.approx(1, abs=0.05)
    assert abs(with_centers.centers.mean().item()) < 0.05


# ---- which parameters learn ----


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({"SAMPLER": "softmax"}, {"bottleneck.bias"}),
        ({"SAMPLER": "softmax_triplet"}, {"bottleneck.bias"}),
        ({"SAMPLER": "triplet"}, {"bottleneck.weight", "bottleneck.bias", "classifier.weight"}),
        ({"SAMPLER": "triplet", "NECK": "no"}, {"classifier.weight", "classifier.bias"}),
        ({"SAMPLER": "triplet", "IF_WITH_CENTER": "yes", "METRIC_LOSS_TYPE": "triplet_center"}, {"bottleneck.bias"}),
    ],
    ids=["identity loss", "both losses", "triplet alone", "triplet alone without neck", "triplet and center"],
)
def test_parameters_unused_by_losses_are_frozen(settings, frozen):
    model = small(**settings).train()
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    feat, logits = model(pictures())
    loss = feat.square().sum() if "classifier.weight" in frozen else logits.square().sum()
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen


# ---- the stem ----


@pytest.mark.parametrize(("name", "build"), [("resnet18", resnet.resnet18), ("resnet50", resnet.resnet50)])
def test_backbone_equals_torchvision_only_with_stem_relu(name, build):
    torch.manual_seed(0)
    theirs = build().eval()
    theirs.fc = nn.Identity()
    model = small(name=name, STEM_RELU="yes", LAST_STRIDE=2, NECK_FEAT="before").eval()
    model.base.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs(pictures())
        torch.testing.assert_close(model(pictures()), expected)
        model.base.stem_relu = False
        assert not torch.allclose(model(pictures()), expected, rtol=0.1)
    assert small(name=name).base.stem_relu is False


@pytest.mark.parametrize("name", ["se_resnet50", "resnet50_ibn_a", "timm/resnet18"])
def test_stem_relu_no_has_no_effect_on_other_backbones(name, caplog):
    assert config(name).MODEL.STEM_RELU is True
    assert config(name, STEM_RELU="yes").MODEL.STEM_RELU is True
    assert caplog.messages == []
    assert config(name, STEM_RELU="no").MODEL.STEM_RELU is True
    (message,) = caplog.messages
    assert all(fact in message for fact in ("MODEL.STEM_RELU no", "command line", name)), message


def test_half_of_an_ibn_norm_is_over_each_image_alone():
    norm, x = IBN(5).train(), pictures()[:, :1] + torch.arange(5.0).view(1, 5, 1, 1)
    x = x * torch.arange(1.0, 5).view(4, 1, 1, 1)
    output = norm(x)
    assert (norm.IN.num_features, norm.BN.num_features) == (2, 3)
    torch.testing.assert_close(output[:, :2].mean((2, 3)), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(output[:, 2:].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert output[:, 2:].mean((2, 3)).abs().min() > 0.01
