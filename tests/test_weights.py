"""Weights from files: what is taken, what is refused, and in which words."""

import logging
import pickle
import random

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from reid.backbones import BACKBONES
from reid.config import dump, load_config
from reid.errors import WorldError
from reid.model import build_model
from reid.weights import (
    check_settings,
    checksum,
    initialise,
    load_for_evaluation,
    load_state,
    num_pids_of,
    read_file,
    state_dict_of,
)


def settings(*overrides):
    return load_config(None, ["MODEL.NAME=resnet18", "MODEL.PRETRAIN_CHOICE=none", *overrides])


def model_of(*overrides, num_pids=5):
    return build_model(settings(*overrides), num_pids)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file as torchvision publishes it, with a classifier of its own; and what is in it."""
    file = tmp_path_factory.mktemp("imagenet") / "resnet18.pth"
    state = resnet18(weights=None).state_dict()
    torch.save(state, file)
    return file, state


# ---- reading a file ----


class Malicious:
    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(WorldError, match=r"w.pth is refused: .* could run any code"):
        read_file(tmp_path / "w.pth", "TEST.WEIGHT")
    torch.save({"model": Malicious()}, tmp_path / "zipped.pth")
    with pytest.raises(WorldError, match=r"zipped.pth is refused: .* could run any code"):
        read_file(tmp_path / "zipped.pth", "TEST.WEIGHT")
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named_with_its_setting(tmp_path):
    with pytest.raises(
        WorldError, match=r"MODEL.PRETRAIN_PATH must name a file .* none at .*gone.pth; correct the path"
    ):
        read_file(tmp_path / "gone.pth", "MODEL.PRETRAIN_PATH")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_never_gives_anything_but_our_error(tmp_path, seed):
    draw = random.Random(seed)
    whole = tmp_path / "whole.pth"
    damaged = tmp_path / "damaged.pth"
    torch.save({"a": torch.zeros(100), "b": [1, "x"]}, whole, _use_new_zipfile_serialization=seed != 0)
    content = whole.read_bytes()
    samples = [content[: draw.randrange(len(content))] for _ in range(40)]
    samples += [bytes(draw.randrange(32, 127) for _ in range(draw.randrange(60))) for _ in range(60)]
    samples += [b"hello world\n", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b""]
    for sample in samples:
        damaged.write_bytes(sample)
        with pytest.raises(WorldError, match=r"TEST.WEIGHT=.*damaged.pth (is refused|cannot be read)"):
            read_file(damaged, "TEST.WEIGHT")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {1: torch.zeros(1)}, {"model": "resnet18"}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WorldError, match="must hold a state dict, got"):
        read_file(tmp_path / "w.pth", "TEST.WEIGHT")


# ---- loading a state ----


def test_what_was_loaded_and_what_was_not_is_reported(caplog):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    kept = module[1].weight.clone()
    ones = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (9, 9), "2.weight": (1,)}
    with caplog.at_level(logging.INFO, "reid.weights"):
        load_state(module, {name: torch.ones(shape) for name, shape in ones.items()}, "FILE", optional=("1.", "2."))
    assert caplog.messages == [
        "weights from FILE: 2 of 4 entries loaded; kept as they were: 1.bias, 1.weight; not used: 2.weight"
    ]
    assert torch.equal(module[0].weight, torch.ones(3, 2))
    assert torch.equal(module[1].weight, kept)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    state = {"weight": torch.ones(9, 9), "scale": torch.ones(1)}
    with pytest.raises(
        WorldError, match=r"1 are missing and 1 have another shape, and 1 are too many \(bias, weight, sc"
    ):
        load_state(module, state, "FILE")
    assert torch.equal(module.weight, before)


def test_the_prefix_of_a_wrapped_model_is_taken_off():
    wrapped = {f"module.{name}": value for name, value in nn.Linear(2, 2).state_dict().items()}
    assert state_dict_of({"model": wrapped}).keys() == {"weight", "bias"}
    assert state_dict_of(wrapped).keys() == {"weight", "bias"}


def test_files_from_before_batches_were_counted_still_load():
    source, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(source.running_mean, 7)
    old = {name: value for name, value in source.state_dict().items() if name != "num_batches_tracked"}
    load_state(target, old, "FILE")
    assert torch.equal(target.running_mean, source.running_mean)


# ---- what a training starts from ----


def test_torchvisions_layout_fills_the_whole_trunk(imagenet):
    file, state = imagenet
    model = model_of()
    classifier = model.classifier.weight.clone()
    initialise(model, settings("MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={file}"))
    trunk = model.base.state_dict()
    assert trunk.keys() == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(value, state[name]) for name, value in trunk.items())
    assert torch.equal(model.classifier.weight, classifier)


@pytest.mark.parametrize(
    ("of_file", "of_model", "entry"),
    [
        ("resnet18", "resnet34", "layer1.2.conv1.weight"),
        ("resnet34", "resnet18", "layer1.2.conv1.weight"),
        ("resnet50", "resnet101", "layer3.6.conv1.weight"),
        ("resnet101", "resnet50", "layer3.6.conv1.weight"),
        ("resnet18", "resnet50", "layer1.0.conv3.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_an_entry(tmp_path, of_file, of_model, entry):
    file = tmp_path / "weights.pth"
    torch.save(BACKBONES[of_file](last_stride=2, stem_relu=True).state_dict(), file)
    model = model_of(f"MODEL.NAME={of_model}")
    with pytest.raises(WorldError, match=rf"weights.pth does not fit this model: .*\({entry}.*; set MODEL.NAME"):
        initialise(model, settings("MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={file}"))


def test_a_checkpoint_of_the_whole_model_is_taken_with_its_classifier(tmp_path):
    source = model_of()
    torch.save({"epoch": 3, "model": source.state_dict()}, tmp_path / "best.pt")
    target = model_of()
    initialise(target, settings("MODEL.PRETRAIN_CHOICE=self", f"MODEL.PRETRAIN_PATH={tmp_path / 'best.pt'}"))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_a_checkpoint_with_other_identities_is_refused_for_training(tmp_path):
    torch.save(model_of(num_pids=6).state_dict(), tmp_path / "w.pt")
    with pytest.raises(WorldError, match=r"1 have another shape, .* \(classifier.weight\)"):
        initialise(model_of(), settings("MODEL.PRETRAIN_CHOICE=self", f"MODEL.PRETRAIN_PATH={tmp_path / 'w.pt'}"))


def test_evaluation_takes_backbone_and_neck_whatever_the_classifier():
    source, target = model_of(num_pids=6), model_of(num_pids=1)
    nn.init.normal_(source.bottleneck.weight)
    load_for_evaluation(target, {"model": source.state_dict()}, "FILE")
    images = torch.rand(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(target.eval()(images), source.eval()(images))


# ---- as the user meets it ----


def test_weights_that_cannot_be_fetched_are_named_with_the_place_to_put_them(place):
    settings = ("OUTPUT_DIR", "no_weights", "MODEL.PRETRAIN_CHOICE", "imagenet")
    said = place.refusal("train", *settings, environment={"TORCH_HOME": "torch home"}, num_ranks=2, code=1)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in said
    assert "put it into torch home/hub/checkpoints" in said
    assert "name the file by MODEL.PRETRAIN_PATH" in said


def test_evaluating_weights_of_another_architecture_is_refused_once(place):
    file = place.folder / "resnet34.pt"
    torch.save(model_of("MODEL.NAME=resnet34").state_dict(), file)
    said = place.refusal("evaluate", "OUTPUT_DIR", "other", "TEST.WEIGHT", "resnet34.pt", num_ranks=2, code=1)
    assert said.startswith("TEST.WEIGHT=resnet34.pt does not fit this model")
    assert "base.layer" in said


def test_without_a_checkpoint_to_evaluate_the_best_of_the_run_is_offered(place):
    folder = place.folder / "offered" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("best_0099_mAP_0.5000.pt", "best_10000_mAP_0.6000.pt"):
        (folder / name).touch()
    said = place.refusal("evaluate", "OUTPUT_DIR", "offered", num_ranks=2, code=2)
    assert said.endswith("the best of this run is offered/checkpoints/best_10000_mAP_0.6000.pt")


# ---- made with other settings ----


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("MODEL.STEM_RELU=yes", "MODEL.STEM_RELU was False and is now True"),
        ("MODEL.LAST_STRIDE=2", "MODEL.LAST_STRIDE was 1 and is now 2"),
        ("INPUT.PIXEL_MEAN=(0,0,0)", "INPUT.PIXEL_MEAN was [0.485, 0.456, 0.406] and is now [0.0, 0.0, 0.0]"),
    ],
)
def test_a_checkpoint_used_with_settings_that_would_give_nonsense_is_refused(changed, words):
    content = {"model": model_of().state_dict(), "config": dump(settings())}
    check_settings(content, settings("TEST.NECK_FEAT=before", "INPUT.SIZE_TEST=(64,32)"), "TEST.WEIGHT=x.pt")
    with pytest.raises(WorldError) as error:
        check_settings(content, settings(changed), "TEST.WEIGHT=x.pt")
    assert str(error.value) == (
        f"TEST.WEIGHT=x.pt is a model of other settings: {words}; use the --config_file that it was trained with "
        "(config.yaml in its run's folder)"
    )


def test_a_state_dict_of_others_has_no_settings_to_compare():
    check_settings(model_of().state_dict(), settings("MODEL.STEM_RELU=yes"), "TEST.WEIGHT=x.pt")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: model_of(num_pids=8).state_dict(), r"classifier is \(8, 512\) and the training set's \(5, 512\)"),
        (lambda: resnet18(weights=None).state_dict(), "it holds no whole model .*: give a checkpoint of one"),
        (dict, "it holds no whole model .*: give a checkpoint of one"),
    ],
)
def test_the_remedy_is_one_for_this_file(state, words):
    with pytest.raises(WorldError, match=words):
        load_state(model_of(), state(), "MODEL.PRETRAIN_PATH=x.pt")


def test_a_whole_model_is_no_backbone():
    with pytest.raises(WorldError, match=r"it holds a whole model and .*: use MODEL\.PRETRAIN_CHOICE self"):
        load_state(model_of().base, model_of().state_dict(), "MODEL.PRETRAIN_PATH=x.pt", optional=("fc.",))


def test_the_number_of_identities_is_that_of_the_classifier():
    assert num_pids_of({"model": model_of(num_pids=8).state_dict()}) == 8
    assert num_pids_of({"classifier.weight": torch.tensor(1.0)}) == 1
    assert num_pids_of({}) == 1


def test_the_checksum_is_of_names_and_weights():
    state = model_of().state_dict()
    one = checksum({"model": state, "epoch": 1})
    assert one == checksum(dict(reversed(state.items())))
    state["classifier.weight"][0, 0] += 1e-6
    assert one != checksum(state)
