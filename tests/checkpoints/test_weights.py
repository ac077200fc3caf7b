"""Tests of weights from files: accepted files, errors and their messages.

Also covers reid.checkpoints.pretrained.
"""

import json
import logging
import pickle
import random
import re
import shutil
from pathlib import Path
from urllib.error import URLError

import golden_weights
import pytest
import torch
from program import newest, records
from refusals import refused
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnext50_32x4d

from reid.checkpoints.pretrained import SOURCES
from reid.checkpoints.state_dicts import checksum_of, num_pids_of, state_dict_of
from reid.checkpoints.weights import initialize, load_for_retrieval, load_state, read_file, verify_settings
from reid.config.load import dump, load_config
from reid.errors import WorldError
from reid.models.backbones import BACKBONES
from reid.models.reid_model import build_model

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "backbone_state_dict.json").read_text())


def settings(*overrides):
    return load_config(None, ["MODEL.NAME=resnet18", "MODEL.PRETRAIN_CHOICE=none", *overrides])


def model_of(*overrides, num_pids=5):
    return build_model(settings(*overrides), num_pids)


def start(*overrides, num_pids=5):
    """Return a model initialized by these settings."""
    model = model_of(*overrides, num_pids=num_pids)
    initialize(model, settings(*overrides))
    return model


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Return a file as torchvision publishes it, with its classifier, and its state dict."""
    file = tmp_path_factory.mktemp("imagenet") / "resnet18.pth"
    state = resnet18(weights=None).state_dict()
    torch.save(state, file)
    return file, state


# ---- reading a file ----


class Malicious:
    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def test_a_file_that_would_run_code_is_rejected_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    with refused(WorldError, "TEST.WEIGHT", "w.pth", "any code"):
        read_file(tmp_path / "w.pth", "TEST.WEIGHT")
    torch.save({"model": Malicious()}, tmp_path / "zipped.pth")
    with refused(WorldError, "TEST.WEIGHT", "zipped.pth", "any code"):
        read_file(tmp_path / "zipped.pth", "TEST.WEIGHT")
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named_with_its_setting(tmp_path):
    with refused(WorldError, "MODEL.PRETRAIN_PATH", "MODEL.PRETRAIN_PATH", str(tmp_path / "gone.pth")):
        read_file(tmp_path / "gone.pth", "MODEL.PRETRAIN_PATH")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_never_gives_anything_but_our_error(tmp_path, seed):
    draw = random.Random(seed)
    intact = tmp_path / "intact.pth"
    damaged = tmp_path / "damaged.pth"
    torch.save({"a": torch.zeros(100), "b": [1, "x"]}, intact, _use_new_zipfile_serialization=seed != 0)
    content = intact.read_bytes()
    samples = [content[: draw.randrange(len(content))] for _ in range(40)]
    samples += [bytes(draw.randrange(32, 127) for _ in range(draw.randrange(60))) for _ in range(60)]
    samples += [b"hello world\n", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b""]
    for sample in samples:
        damaged.write_bytes(sample)
        with refused(WorldError, "TEST.WEIGHT", f"TEST.WEIGHT={damaged}"):
            read_file(damaged, "TEST.WEIGHT")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {1: torch.zeros(1)}, {"model": "resnet18"}])
def test_a_file_without_a_state_dict_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with refused(WorldError, "TEST.WEIGHT", f"TEST.WEIGHT={tmp_path}/w.pth", "state dict"):
        read_file(tmp_path / "w.pth", "TEST.WEIGHT")


# ---- loading a state ----


def test_what_was_loaded_and_what_was_not_is_reported(caplog):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    kept = module[1].weight.clone()
    ones = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (9, 9), "2.weight": (1,)}
    with caplog.at_level(logging.INFO, "reid"):
        load_state(module, {name: torch.ones(shape) for name, shape in ones.items()}, "FILE", optional=("1.", "2."))
    (message,) = caplog.messages
    facts = ("FILE", "2 of 4", "1 (1.bias) missing", "1 (1.weight) of another shape", "1 (2.weight) unused")
    assert all(fact in message for fact in facts), message
    assert torch.equal(module[0].weight, torch.ones(3, 2))
    assert torch.equal(module[1].weight, kept)


def test_mismatched_state_is_rejected_and_changes_nothing():
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    state = {"weight": torch.ones(9, 9), "scale": torch.ones(1)}
    counts = ("of 2 entries", "1 are missing", "1 have another shape", "1 are unexpected")
    with refused(WorldError, "TEST.WEIGHT", "FILE", *counts, "(bias, weight, scale)"):
        load_state(module, state, "FILE", key="TEST.WEIGHT")
    assert torch.equal(module.weight, before)


def test_the_prefix_of_a_wrapped_model_is_taken_off():
    wrapped = {f"module.{name}": value for name, value in nn.Linear(2, 2).state_dict().items()}
    assert state_dict_of({"model": wrapped}).keys() == {"weight", "bias"}
    assert state_dict_of(wrapped).keys() == {"weight", "bias"}


def test_files_from_before_batches_were_counted_still_load(caplog):
    source, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(source.running_mean, 7)
    old = {name: value for name, value in source.state_dict().items() if name != "num_batches_tracked"}
    caplog.set_level(logging.INFO, "reid")
    load_state(target, old, "FILE")
    assert torch.equal(target.running_mean, source.running_mean)
    (message,) = caplog.messages
    assert all(fact in message for fact in ("4 of 4", "0 missing", "0 of another shape", "0 unused")), message


# ---- what a training starts from ----


def test_torchvision_weights_fill_the_complete_backbone(imagenet):
    file, state = imagenet
    model = model_of()
    classifier = model.classifier.weight.clone()
    initialize(model, settings("MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={file}"))
    backbone = model.base.state_dict()
    assert backbone.keys() == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(value, state[name]) for name, value in backbone.items())
    assert torch.equal(model.classifier.weight, classifier)


@pytest.mark.parametrize(
    ("of_file", "of_model", "entry"),
    [
        ("resnet18", "resnet34", "layer1.2.conv1.weight"),
        ("resnet34", "resnet18", "layer1.2.conv1.weight"),
        ("resnet50", "resnet101", "layer3.6.conv1.weight"),
        ("resnet101", "resnet50", "layer3.6.conv1.weight"),
        ("resnet18", "resnet50", "layer1.0.conv3.weight"),
        ("resnet50", "resnet50_ibn_a", "layer1.0.bn1.IN.weight"),
        ("resnet50_ibn_a", "resnet50", "layer1.0.bn1.weight"),
        ("resnet50_ibn_a", "resnet101_ibn_a", "layer3.6.conv1.weight"),
        ("se_resnet50", "resnet50", "conv1.weight"),
        ("resnet50", "se_resnet50", "layer0.conv1.weight"),
        ("se_resnet50", "se_resnext50", "layer1.0.conv1.weight"),
        ("se_resnet152", "senet154", "layer0.conv2.weight"),
    ],
)
def test_other_architecture_is_rejected_with_entry_and_name(of_file, of_model, entry):
    with torch.device("meta"):
        file, model = (BACKBONES[name](last_stride=2, stem_relu=True) for name in (of_file, of_model))
        complete_file, complete_model = (build_model(settings(f"MODEL.NAME={name}"), 3) for name in (of_file, of_model))
    remedy = f"MODEL.NAME {of_file},"
    with refused(WorldError, None, "X ", f"({entry}", remedy):
        load_state(model, file.state_dict(), "X", optional=("fc.",))
    with refused(WorldError, None, "X ", f"(base.{entry}", remedy):
        load_state(complete_model, complete_file.state_dict(), "X", optional=("base.fc.",))


@pytest.mark.parametrize(("of_file", "of_model"), [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_imagenet_file_of_another_backbone_is_rejected(tmp_path, of_file, of_model):
    torch.save(BACKBONES[of_file](last_stride=2, stem_relu=True).state_dict(), tmp_path / "w.pth")
    with refused(WorldError, "MODEL.PRETRAIN_PATH", f"{tmp_path}/w.pth", f"MODEL.NAME {of_file},"):
        start(f"MODEL.NAME={of_model}", "MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={tmp_path / 'w.pth'}")


def test_unknown_architecture_is_rejected_without_a_suggestion():
    state = resnext50_32x4d(weights=None).state_dict()
    with refused(WorldError, None, "layer1.0.conv1.weight", "MODEL.NAME and MODEL.NECK"):
        load_state(BACKBONES["resnet50"](last_stride=1, stem_relu=True), state, "X", optional=("fc.",))


@pytest.mark.parametrize(
    ("name", "classifier", "layout"),
    [
        ("resnet50_ibn_a", "fc", "plain"),
        ("resnet50_ibn_a", "fc", "module."),
        ("resnet50_ibn_a", "fc", "state_dict"),
        ("se_resnet50", "last_linear", "plain"),
        ("se_resnet50", "last_linear", "without counters"),
        ("se_resnet50", "last_linear", "without classifier"),
    ],
)
def test_all_imagenet_weight_layouts_fill_the_complete_backbone(tmp_path, caplog, name, classifier, layout):
    """torchvision's, Cadene's and IBN-Net's names, wrapped or not, and files from before batches were counted."""
    backbone = BACKBONES[name](last_stride=2, stem_relu=True)
    backbone_state = {key: value for key, value in backbone.state_dict().items() if not key.startswith("fc.")}
    backbone_state["layer1.0.downsample.1.running_mean"] += 1  # what norms start with would not be missed
    content = {**backbone_state, f"{classifier}.weight": torch.ones(1000, 2048), f"{classifier}.bias": torch.ones(1000)}
    if layout == "without classifier":
        content = dict(backbone_state)
    if layout == "without counters":
        content = {key: value for key, value in content.items() if not key.endswith("num_batches_tracked")}
    if layout == "module.":
        content = {f"module.{key}": value for key, value in content.items()}
    if layout == "state_dict":
        content = {"epoch": 90, "arch": name, "best_prec1": 77.2, "state_dict": content}
    file = tmp_path / "w.pth"
    torch.save(content, file, _use_new_zipfile_serialization=False)  # as those files are
    caplog.set_level(logging.INFO, "reid")
    model = start(f"MODEL.NAME={name}", "MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={file}")
    loaded = model.base.state_dict()
    assert all(torch.equal(loaded[key], backbone_state[key]) for key in backbone_state)
    assert f"MODEL.PRETRAIN_PATH={file}" in caplog.messages[0]
    assert " 0 of another shape" in caplog.messages[0]


def test_one_missing_entry_is_an_error(imagenet, tmp_path):
    state = dict(imagenet[1])
    del state["layer3.1.bn2.running_mean"]
    torch.save(state, tmp_path / "w.pth")
    with refused(WorldError, "MODEL.PRETRAIN_PATH", "1 are missing", "(layer3.1.bn2.running_mean)"):
        start("MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={tmp_path / 'w.pth'}")


# ---- this machine's ImageNet weights ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a home without any weights, and disable downloads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return tmp_path


def unreachable(*arguments, **options):
    raise URLError("no network here")


@pytest.mark.parametrize("folder", ["torch/hub/checkpoints", ".cache/torch/checkpoints", ".torch/models"])
@pytest.mark.parametrize("file", ["resnet18-f37072fd.pth", "resnet18-5c106cde.pth"])
def test_cached_weights_need_no_network_and_go_by_file_name(home, imagenet, folder, file):
    (home / folder).mkdir(parents=True)
    (home / folder / file).write_bytes(imagenet[0].read_bytes())
    model = start("MODEL.PRETRAIN_CHOICE=imagenet")
    assert torch.equal(model.base.conv1.weight, imagenet[1]["conv1.weight"])


@pytest.mark.parametrize("name", BACKBONES)
def test_missing_weights_error_names_url_and_cache_folder(home, name):
    remedies = (SOURCES[name].url, f"{home}/torch/hub/checkpoints", "MODEL.PRETRAIN_PATH", "MODEL.PRETRAIN_CHOICE none")
    with refused(WorldError, "MODEL.PRETRAIN_CHOICE", f" {name} ", "no network here", *remedies):
        initialize(torch.nn.Module(), settings(f"MODEL.NAME={name}", "MODEL.PRETRAIN_CHOICE=imagenet"))


def test_the_authors_path_means_the_weights_by_that_name(home, imagenet, caplog):
    (home / ".torch/models").mkdir(parents=True)
    (home / ".torch/models/resnet18-f37072fd.pth").write_bytes(imagenet[0].read_bytes())
    path = "/home/haoluo/.torch/models/resnet18-5c106cde.pth"
    model = start("MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={path}")
    assert torch.equal(model.base.conv1.weight, imagenet[1]["conv1.weight"])
    assert f"MODEL.PRETRAIN_PATH={path} " in caplog.messages[0]


@pytest.mark.parametrize(
    ("name", "file", "whose"),
    [("resnet18", "resnet50-19c8e357.pth", "of resnet50."), ("resnet18", "mine.pth", "mine.pth,")],
)
def test_a_path_that_is_not_there_is_not_taken_for_anything_else(home, name, file, whose):
    with refused(WorldError, "MODEL.PRETRAIN_PATH", f" {name},", f"/home/haoluo/{file}", whose, SOURCES[name].url):
        start(f"MODEL.NAME={name}", "MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH=/home/haoluo/{file}")


def test_a_download_is_checked_and_kept(home, imagenet, monkeypatch):
    calls = []

    def download(url, file, digits, progress):
        calls.append((url, file, digits))
        shutil.copy(imagenet[0], file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        start("MODEL.PRETRAIN_CHOICE=imagenet")
    place = f"{home}/torch/hub/checkpoints/resnet18-f37072fd.pth"
    assert calls == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", place, "f37072fd")]


# ---- full models ----


def test_full_model_checkpoint_is_loaded_with_its_classifier(tmp_path):
    source = model_of()
    torch.save({"epoch": 3, "model": source.state_dict()}, tmp_path / "best.pt")
    target = model_of()
    initialize(target, settings("MODEL.PRETRAIN_CHOICE=self", f"MODEL.PRETRAIN_PATH={tmp_path / 'best.pt'}"))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_other_number_of_identities_is_rejected_for_training(tmp_path):
    torch.save(model_of(num_pids=6).state_dict(), tmp_path / "w.pt")
    with refused(WorldError, "MODEL.PRETRAIN_PATH", "(classifier.weight)", "(6, 512)", "(5, 512)", "finetune"):
        start("MODEL.PRETRAIN_CHOICE=self", f"MODEL.PRETRAIN_PATH={tmp_path / 'w.pt'}")


def test_finetuning_reinitializes_classifier_and_centers_only(tmp_path, caplog):
    center = ("MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=triplet_center")
    source = model_of(*center, num_pids=6)
    golden_weights.fill(source)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    caplog.set_level(logging.INFO, "reid")
    for num_pids in (5, 6):  # the same number does not make them the same
        caplog.clear()
        torch.manual_seed(1)
        model = model_of(*center, num_pids=num_pids)
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        path = f"MODEL.PRETRAIN_PATH={tmp_path / 'w.pt'}"
        initialize(model, settings(*center, "MODEL.PRETRAIN_CHOICE=finetune", path))
        for name, value in model.state_dict().items():
            kept = name in ("classifier.weight", "centers")
            assert torch.equal(value, (fresh if kept else source.state_dict())[name])
        num_entries = len(fresh)
        loaded, new = caplog.messages
        counts = (f"{num_entries - 2} of {num_entries}", "2 (centers, classifier.weight) missing", "0 unused")
        assert all(fact in loaded for fact in (path, *counts)), loaded
        assert re.search(rf"finetune.* {num_pids} identities.* 6$", new)


@pytest.mark.parametrize(
    ("state", "keywords"),
    [
        (
            lambda: model_of("MODEL.NECK=no").state_dict(),
            ("bottleneck.weight", "MODEL.NECK"),
        ),
        (lambda: model_of("MODEL.NAME=resnet34").state_dict(), ("MODEL.NAME resnet34,",)),
        (lambda: resnet18(weights=None).state_dict(), ("not a full model",)),
        (
            lambda: {name: v for name, v in model_of().state_dict().items() if "layer2" not in name},
            ("base.layer2.0.conv1",),
        ),
    ],
    ids=["no neck", "another backbone", "a backbone alone", "incomplete"],
)
@pytest.mark.parametrize("choice", ["self", "finetune"])
def test_backbone_and_neck_must_be_complete(tmp_path, choice, state, keywords):
    torch.save(state(), tmp_path / "w.pt")
    with refused(WorldError, "MODEL.PRETRAIN_PATH", f"MODEL.PRETRAIN_PATH={tmp_path}/w.pt", *keywords):
        start(f"MODEL.PRETRAIN_CHOICE={choice}", f"MODEL.PRETRAIN_PATH={tmp_path / 'w.pt'}")


def test_the_state_of_an_optimizer_is_no_model(tmp_path):
    model = nn.Linear(1, 1)
    torch.save(torch.optim.Adam(model.parameters()).state_dict(), tmp_path / "resnet50_optimizer_2.pth")
    with refused(WorldError, "TEST.WEIGHT", "resnet50_optimizer_2.pth", "NAME_model_N.pth"):
        read_file(tmp_path / "resnet50_optimizer_2.pth", "TEST.WEIGHT")


def test_safetensors_are_read_too(tmp_path, imagenet):
    save_file({name: value.contiguous() for name, value in imagenet[1].items()}, tmp_path / "w.safetensors")
    model = start("MODEL.PRETRAIN_CHOICE=imagenet", f"MODEL.PRETRAIN_PATH={tmp_path / 'w.safetensors'}")
    assert torch.equal(model.base.conv1.weight, imagenet[1]["conv1.weight"])
    (tmp_path / "w.safetensors").write_bytes(b"no such thing")
    with refused(WorldError, "TEST.WEIGHT", f"TEST.WEIGHT={tmp_path}/w.safetensors"):
        read_file(tmp_path / "w.safetensors", "TEST.WEIGHT")


@pytest.mark.parametrize("name", ["resnet50_ibn_a", "resnet18"])
def test_published_checkpoints_are_loaded_completely(tmp_path, name):
    """Names and shapes are those of reid-strong-baseline's files, for training and for retrieval."""
    published = {
        key: torch.from_numpy(golden_weights.weight(key, tuple(shape))).float() if shape else torch.tensor(0)
        for key, shape in SHAPES[name].items()
    }
    torch.save(published, tmp_path / f"{name}_model_120.pth", _use_new_zipfile_serialization=False)
    path = f"MODEL.PRETRAIN_PATH={tmp_path / f'{name}_model_120.pth'}"
    model = start(f"MODEL.NAME={name}", "MODEL.PRETRAIN_CHOICE=self", path, num_pids=751)
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())
    retrieval = model_of(f"MODEL.NAME={name}", num_pids=1)
    load_for_retrieval(retrieval, read_file(tmp_path / f"{name}_model_120.pth", "TEST.WEIGHT"), "TEST.WEIGHT")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), retrieval.eval()(images))


def test_evaluation_loads_backbone_and_neck_for_any_classifier():
    source, target = model_of(num_pids=6), model_of(num_pids=1)
    nn.init.normal_(source.bottleneck.weight)
    load_for_retrieval(target, {"model": source.state_dict()}, "FILE")
    images = torch.rand(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(target.eval()(images), source.eval()(images))


# ---- as the user meets it ----


def test_failed_download_names_url_and_target_folder(place):
    settings = ("OUTPUT_DIR", "no_weights", "MODEL.PRETRAIN_CHOICE", "imagenet")
    message = place.refusal("train", *settings, environment={"TORCH_HOME": "torch home"}, num_ranks=2, code=1)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert "torch home/hub/checkpoints" in message
    assert "MODEL.PRETRAIN_CHOICE" in message
    assert "MODEL.PRETRAIN_PATH" in message


def test_evaluating_other_architecture_is_rejected_once(place):
    file = place.folder / "resnet34.pt"
    torch.save(model_of("MODEL.NAME=resnet34").state_dict(), file)
    message = place.refusal("evaluate", "OUTPUT_DIR", "other", "TEST.WEIGHT", "resnet34.pt", num_ranks=2, code=1)
    assert "TEST.WEIGHT=resnet34.pt" in message
    assert "base.layer" in message


def test_missing_weight_error_suggests_best_checkpoint_of_run(place):
    folder = place.folder / "offered" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("best_0099_mAP_0.5000.pt", "best_10000_mAP_0.6000.pt"):
        (folder / name).touch()
    message = place.refusal("evaluate", "OUTPUT_DIR", "offered", num_ranks=2, code=2)
    assert "TEST.WEIGHT" in message
    assert "offered/checkpoints/best_10000_mAP_0.6000.pt" in message


def test_resume_command_of_reid_strong_baseline_continues_epochs(place):
    """Training continues after the epoch in the file's name, at that epoch's learning rate; no optimizer is read."""
    state = build_model(settings("MODEL.STEM_RELU=yes"), 8).state_dict()
    torch.save(state, place.folder / "resnet18_model_2.pth", _use_new_zipfile_serialization=False)
    choice = ("MODEL.PRETRAIN_CHOICE", "('self')", "MODEL.PRETRAIN_PATH", "('resnet18_model_2.pth')")
    rates = ("SOLVER.WARMUP_ITERS", 5, "SOLVER.WARMUP_FACTOR", 0.01, "SOLVER.BASE_LR", 1e-6, "SOLVER.MAX_EPOCHS", 4)
    ended = place.train("OUTPUT_DIR", "old", *choice, *rates, num_ranks=2)
    assert re.search(r"\bepoch 2\b.*resnet18_model_2\.pth", ended.out)
    assert "MODEL.PRETRAIN_PATH=resnet18_model_2.pth: 126 of 126" in ended.out
    assert [(record["epoch"], record["iteration"]) for record in records(place.folder / "old", "train")] == [
        *((3, 5), (3, 6), (4, 7), (4, 8))
    ]
    t = 2 / 5  # of epoch 3, which counts from 1
    assert records(place.folder / "old", "train")[0]["lr"] == pytest.approx(1e-6 * (0.01 * (1 - t) + t))
    moved = newest(place.folder / "old")["model"]["base.conv1.weight"] - state["base.conv1.weight"]
    assert 0 < moved.abs().max() < 1e-3  # it started from the file's weights
    assert "all 4 epochs" in place.train("OUTPUT_DIR", "old", *choice, *rates, num_ranks=2).out


# ---- made with other settings ----


@pytest.mark.parametrize(
    ("changed", "keywords"),
    [
        ("MODEL.STEM_RELU=yes", ("MODEL.STEM_RELU", "False", "True")),
        ("MODEL.LAST_STRIDE=2", ("MODEL.LAST_STRIDE", " 1 ", " 2.")),
        ("INPUT.PIXEL_MEAN=(0,0,0)", ("INPUT.PIXEL_MEAN", "[0.485, 0.456, 0.406]", "[0.0, 0.0, 0.0]")),
    ],
)
def test_checkpoint_with_incompatible_settings_is_rejected(changed, keywords):
    content = {"model": model_of().state_dict(), "config": dump(settings())}
    source = {"source": "TEST.WEIGHT=x.pt", "key": "TEST.WEIGHT"}
    verify_settings(content, settings("TEST.NECK_FEAT=before", "INPUT.SIZE_TEST=(64,32)"), **source)
    with refused(WorldError, "TEST.WEIGHT", "TEST.WEIGHT=x.pt", *keywords, "--config_file"):
        verify_settings(content, settings(changed), **source)


def test_default_normalization_is_compared_by_its_actual_values():
    vit = ("MODEL.NAME=timm/test_vit",)
    content = {"config": dump(settings(*vit))}
    verify_settings(content, settings(*vit, "INPUT.PIXEL_MEAN=(.5,.5,.5)", "INPUT.PIXEL_STD=(.5,.5,.5)"), "X", key="X")
    with refused(WorldError, "X", "INPUT.PIXEL_STD", "[0.5, 0.5, 0.5]", "[0.2, 0.2, 0.2]"):
        verify_settings(content, settings(*vit, "INPUT.PIXEL_STD=(.2,.2,.2)"), "X", key="X")


@pytest.mark.parametrize(
    ("name", "relu", "num_warnings"),
    [("resnet18", "no", 0), ("resnet18", "yes", 1), ("resnet50_ibn_a", "yes", 0), ("se_resnet50", "yes", 0)],
)
def test_foreign_state_dict_warns_only_about_stem_relu(name, relu, num_warnings, caplog):
    cfg = settings(f"MODEL.NAME={name}", f"MODEL.STEM_RELU={relu}")
    with caplog.at_level(logging.WARNING, "reid"):
        verify_settings(model_of().state_dict(), cfg, "TEST.WEIGHT=x.pt", key="TEST.WEIGHT")
    assert len(caplog.messages) == num_warnings
    assert all("TEST.WEIGHT=x.pt" in message and "MODEL.STEM_RELU no" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("state", "keywords"),
    [
        (lambda: model_of(num_pids=8).state_dict(), ("(8, 512)", "(5, 512)")),
        (lambda: resnet18(weights=None).state_dict(), ("not a full model", "checkpoint")),
        (dict, ("not a full model", "checkpoint")),
    ],
)
def test_the_remedy_is_one_for_this_file(state, keywords):
    with refused(WorldError, "MODEL.PRETRAIN_PATH", "x.pt", *keywords):
        load_state(model_of(), state(), "MODEL.PRETRAIN_PATH=x.pt", key="MODEL.PRETRAIN_PATH")


def test_full_model_is_rejected_as_a_backbone():
    source = {"source": "MODEL.PRETRAIN_PATH=x.pt", "key": "MODEL.PRETRAIN_PATH"}
    with refused(WorldError, "MODEL.PRETRAIN_PATH", "x.pt", "MODEL.PRETRAIN_CHOICE self, or finetune"):
        load_state(model_of().base, model_of().state_dict(), optional=("fc.",), **source)


def test_the_number_of_identities_is_that_of_the_classifier():
    assert num_pids_of({"model": model_of(num_pids=8).state_dict()}) == 8
    assert num_pids_of({"classifier.weight": torch.tensor(1.0)}) == 1
    assert num_pids_of({}) == 1


def test_the_checksum_is_of_names_and_weights():
    state = model_of().state_dict()
    one = checksum_of({"model": state, "epoch": 1})
    assert one == checksum_of(dict(reversed(state.items())))
    state["classifier.weight"][0, 0] += 1e-6
    assert one != checksum_of(state)
