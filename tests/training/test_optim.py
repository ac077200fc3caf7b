"""The published learning rates, epoch by epoch; and which parameters get which rate and decay."""

import json
from pathlib import Path

import pytest
import torch
from refusals import refused
from torch import nn

from reid.config.load import load_config
from reid.distributed.accelerator import load_optimizer
from reid.errors import SettingsError
from reid.models.reid_model import build_model
from reid.training.optim import build_optimizer, learning_rate, set_learning_rate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedule.json").read_text())


def solver(**settings):
    return load_config(None, [f"SOLVER.{key}={value}" for key, value in settings.items()]).SOLVER


def scheduled(schedule):
    return solver(
        BASE_LR=schedule["base_lr"],
        STEPS=tuple(schedule["steps"]),
        GAMMA=schedule["gamma"],
        WARMUP_FACTOR=schedule["warmup_factor"],
        WARMUP_ITERS=schedule["warmup_iters"],
        WARMUP_METHOD=schedule["warmup_method"],
    )


# ---- learning rate ----


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_every_epoch_has_its_recorded_learning_rate(name):
    expected = GOLDEN[name]["lr_in_epoch_1_to_n"]
    rates = [learning_rate(scheduled(GOLDEN[name]), epoch) for epoch in range(1, len(expected) + 1)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_default_schedule_is_the_published_one():
    expected = GOLDEN["softmax_triplet"]["lr_in_epoch_1_to_n"]
    assert [learning_rate(solver(), epoch) for epoch in range(1, len(expected) + 1)] == pytest.approx(expected)


def test_the_rate_falls_after_epochs_40_and_70():
    rates = [learning_rate(solver(), epoch) for epoch in (11, 40, 41, 70, 71, 120)]
    assert rates == pytest.approx([3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6, 3.5e-6], rel=1e-12, abs=0)


def test_linear_warmup_starts_at_factor_and_ends_on_time():
    rates = [learning_rate(solver(BASE_LR=1.0), epoch) for epoch in (1, 2, 6, 10, 11)]
    assert rates == pytest.approx([0.01, 0.109, 0.505, 0.901, 1.0])


@pytest.mark.parametrize("method", ["linear", "constant"])
def test_no_warm_up_epochs_mean_no_warm_up(method):
    rates = [learning_rate(solver(WARMUP_ITERS=0, WARMUP_METHOD=method), epoch) for epoch in (1, 2)]
    assert rates == [3.5e-4, 3.5e-4]


def test_a_constant_warm_up_stays_at_its_factor():
    settings = solver(BASE_LR=1.0, WARMUP_ITERS=3, WARMUP_METHOD="constant", WARMUP_FACTOR=0.2)
    assert [learning_rate(settings, epoch) for epoch in range(1, 6)] == [0.2, 0.2, 0.2, 1.0, 1.0]


def test_steps_within_the_warm_up_count():
    settings = solver(BASE_LR=1.0, WARMUP_ITERS=4, WARMUP_METHOD="constant", WARMUP_FACTOR=0.5, STEPS="(2,)", GAMMA=0.1)
    assert [learning_rate(settings, epoch) for epoch in range(1, 6)] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.1])


# ---- optimizer ----


@pytest.fixture(scope="module")
def model():
    return build_model(load_config(None, ["MODEL.NAME=resnet18", "MODEL.PRETRAIN_CHOICE=none"]), 20)


def groups_by_name(optimizer, model):
    """Return name -> group of every parameter that the optimizer moves."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    members = [(names[parameter], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(dict(members)) == len(members)
    return dict(members)


def test_optimizer_has_all_parameters_but_the_frozen_neck_bias(model):
    names = set(groups_by_name(build_optimizer(solver(), model), model))
    assert names == {name for name, _ in model.named_parameters()} - {"bottleneck.bias"}
    assert {"base.conv1.weight", "base.bn1.bias", "bottleneck.weight", "classifier.weight"} <= names


def test_biases_have_another_rate_and_decay(model):
    settings = solver(BIAS_LR_FACTOR=2.0, WEIGHT_DECAY=5e-4, WEIGHT_DECAY_BIAS=0.0)
    optimizer = build_optimizer(settings, model)
    set_learning_rate(optimizer, 0.125)
    for name, group in groups_by_name(optimizer, model).items():
        is_bias = name.endswith("bias")
        assert group["lr"] == (0.25 if is_bias else 0.125), name
        assert group["weight_decay"] == (0.0 if is_bias else 5e-4), name


def test_the_recipe_treats_biases_as_weights(model):
    groups = build_optimizer(solver(), model).param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(groups[0]["lr"], 5e-4)}


def test_the_first_epochs_rate_is_set_from_the_start(model):
    groups = build_optimizer(solver(BIAS_LR_FACTOR=2.0), model).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([3.5e-6, 7e-6], rel=1e-12, abs=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "NAdam", "RAdam", "RMSprop", "Adagrad"])
def test_the_optimizer_is_torchs_of_that_name_with_its_defaults(model, name):
    optimizer = build_optimizer(solver(OPTIMIZER_NAME=name), model)
    assert type(optimizer) is getattr(torch.optim, name)
    ours = {"params", "lr", "weight_decay", "lr_factor", "momentum", "fused"}
    defaults = getattr(torch.optim, name)(model.parameters()).param_groups[0]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in set(defaults) - ours} == {key: defaults[key] for key in set(defaults) - ours}
        assert group.get("momentum") == (0.9 if name == "SGD" else defaults.get("momentum"))
        assert bool(group.get("fused")) == (name in ("Adam", "AdamW", "SGD"))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_fused_and_plain_optimizer_agree_and_can_be_switched(name):
    def trained(*kinds):
        torch.manual_seed(0)
        layer, state = nn.Linear(7, 5).double(), None
        for fused in kinds:
            optimizer = build_optimizer(solver(OPTIMIZER_NAME=name, FUSED=fused), layer)
            if state is not None:
                load_optimizer(optimizer, state)
            assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused != "no"}
            for _ in range(5):
                optimizer.zero_grad()
                layer(torch.eye(7).double()).square().sum().backward()
                optimizer.step()
            state = optimizer.state_dict()
        return layer.weight.detach()

    expected = trained("no", "no")
    for kinds in (("auto", "yes"), ("yes", "no"), ("no", "auto")):
        torch.testing.assert_close(trained(*kinds), expected, rtol=1e-12, atol=0)


def test_what_torch_has_no_fused_step_for_is_rejected():
    with refused(SettingsError, "SOLVER.FUSED", "RAdam"):
        solver(OPTIMIZER_NAME="RAdam", FUSED="yes")
    assert solver(OPTIMIZER_NAME="RAdam", FUSED="no").FUSED == "no"


def test_fused_sgd_under_fp16_is_rejected():
    with refused(SettingsError, "SOLVER.FUSED", "fp16"):
        solver(OPTIMIZER_NAME="SGD", FUSED="yes", PRECISION="fp16")
    assert not build_optimizer(solver(OPTIMIZER_NAME="SGD", PRECISION="fp16"), nn.Linear(3, 2)).defaults["fused"]


def test_the_momentum_of_sgd_is_the_settings(model):
    optimizer = build_optimizer(solver(OPTIMIZER_NAME="SGD", MOMENTUM=0.5), model)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}


def test_a_model_without_biases_makes_one_group():
    groups = build_optimizer(solver(), nn.Linear(3, 2, bias=False)).param_groups
    assert [len(group["params"]) for group in groups] == [1]


def test_a_step_decays_and_moves_by_rate_and_factor():
    """Plain SGD by hand: p - lr * factor * (gradient + decay * p)."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 4.0)
    settings = solver(OPTIMIZER_NAME="SGD", MOMENTUM=0.0, BIAS_LR_FACTOR=3.0, WEIGHT_DECAY=0.1, WEIGHT_DECAY_BIAS=0.2)
    optimizer = build_optimizer(settings, layer)
    set_learning_rate(optimizer, 0.5)
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2 - 0.5 * (1 + 0.1 * 2))
    assert layer.bias.item() == pytest.approx(4 - 0.5 * 3 * (1 + 0.2 * 4))
