"""Tests of timm models as backbones: options, errors, pretrained weights, and training in the real program."""

import json
import logging
import re

import pytest
import timm
import torch
from program import names, newest, records
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from reid.checkpoints.weights import initialize
from reid.config.load import dump, load_config
from reid.data.preprocessing import BatchPreprocessor
from reid.errors import SettingsError, WorldError
from reid.models import backbones, timm_backbones
from reid.models.reid_model import build_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def settings(name, *overrides):
    return load_config(None, [f"MODEL.NAME=timm/{name}", "MODEL.PRETRAIN_CHOICE=none", *overrides])


def pictures(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


# ---- the name ----


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tiny_patch16_225", "timm/vit_tiny_patch16_224"),
        ("resnet50.a1_in2k", "timm/resnet50.a1_in1k"),
        ("resnet18.of_mine", "timm/resnet18.tv_in1k"),
    ],
)
def test_unknown_timm_name_is_rejected_with_suggestions(name, near):
    with refused(SettingsError, "MODEL.NAME", f"timm {timm.__version__}", f"got timm/{name};", f" {near}"):
        backbones.validate_backbone(settings(name))


@pytest.mark.parametrize(
    ("name", "remedy"), [("hf-hub:someone/resnet18", "timm/seresnet18"), ("§§§§", "timm.list_models()")]
)
def test_where_nothing_is_like_it_the_list_is_named(name, remedy):
    with refused(SettingsError, "MODEL.NAME", f"got timm/{name}", remedy):
        timm_backbones.normalization(f"timm/{name}")


def test_unknown_name_is_reported_before_data_is_read(place):
    message = place.refusal("train", "OUTPUT_DIR", "misspelt", "MODEL.NAME", "timm/resnet52", num_ranks=2, code=2)
    assert all(fact in message for fact in ("MODEL.NAME", "got timm/resnet52", "timm/resnet152")), message
    assert "misspelt" not in names(place.folder)


# ---- options ----


@pytest.mark.parametrize(
    ("name", "sizes", "stride", "options"),
    [
        ("test_resnet", ((256, 128), (256, 128)), 1, {"output_stride": 16}),
        ("test_resnet", ((256, 128), (256, 128)), 2, {}),
        ("test_vit", ((256, 128), (256, 128)), 1, {"img_size": (256, 128)}),
        ("test_vit", ((256, 128), (384, 128)), 1, {"img_size": (256, 128), "dynamic_img_size": True}),
        ("test_convnext", ((256, 128), (384, 128)), 2, {}),
    ],
)
def test_options_are_those_that_the_model_accepts(name, sizes, stride, options):
    sizes = [f"INPUT.{key}={size}" for key, size in zip(("SIZE_TRAIN", "SIZE_TEST"), sizes, strict=True)]
    assert timm_backbones.plan_for(settings(name, *sizes, f"MODEL.LAST_STRIDE={stride}")).options == options


def test_effect_of_last_stride_is_reported(caplog):
    caplog.set_level(logging.INFO, "reid")
    backbones.validate_backbone(settings("test_resnet", "INPUT.SIZE_TRAIN=(40,40)"))
    backbones.validate_backbone(settings("test_vit", "INPUT.SIZE_TRAIN=(48,48)"))
    backbones.validate_backbone(settings("test_vit", "INPUT.SIZE_TRAIN=(64,48)", "MODEL.LAST_STRIDE=2"))
    with_dilation, no_effect = caplog.messages
    assert re.search(r"MODEL\.LAST_STRIDE 1\b.*timm/test_resnet.*1/16", with_dilation)
    assert re.search(r"MODEL\.LAST_STRIDE 1\b.*no effect.*timm/test_vit", no_effect)


def test_the_last_stride_is_seen_in_the_map():
    maps = {}
    for stride in (1, 2):
        backbone = build_model(settings("test_resnet", f"MODEL.LAST_STRIDE={stride}"), 2).base
        maps[stride] = backbone.forward_features(pictures(256, 128)).shape[2:]
    assert maps == {1: (16, 8), 2: (8, 4)}


def test_a_size_that_the_model_does_not_take_is_rejected():
    facts = ("timm/nest_tiny", "got (64, 32)", "Input height (64) doesn't match", "224x224")
    with refused(SettingsError, "INPUT.SIZE_TRAIN", *facts):
        backbones.validate_backbone(settings("nest_tiny", "INPUT.SIZE_TRAIN=(64,32)"))


# ---- what it computes ----


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "mobilenetv3_small_050", "test_vit4"])
def test_features_are_those_that_the_classifier_sees(name):
    """The model may have any pooling, head or norm after its blocks."""
    cfg = settings(name, "INPUT.SIZE_TRAIN=(64,32)", "INPUT.SIZE_TEST=(64,32)", "TEST.NECK_FEAT=before")
    plan = timm_backbones.plan_for(cfg)
    complete = plan.create().eval()  # with a classifier
    model = build_model(cfg, num_pids=3).eval()
    assert model.num_features == plan.num_features == model.bottleneck.num_features
    model.base.load_state_dict({name: complete.state_dict()[name] for name in model.base.state_dict()})
    seen = []
    complete.get_classifier().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        embedding = model(pictures(64, 32))
        complete(pictures(64, 32))
    assert embedding.shape == (2, plan.num_features)
    torch.testing.assert_close(embedding, seen[0].flatten(1))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "legacy_seresnet18", "rexnet_100"])
def test_no_dropout_or_stochastic_depth_makes_ranks_differ(name):
    """These models come with dropout or stochastic depth."""
    model = build_model(settings(name, "INPUT.SIZE_TRAIN=(64,64)", "INPUT.SIZE_TEST=(64,64)"), 3).base.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    assert torch.equal(model(pictures(64, 64)), model(pictures(64, 64)))


# ---- normalization ----


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("timm/test_vit", [], ((0.5,) * 3, (0.5,) * 3)),
        ("timm/test_vit", ["INPUT.PIXEL_STD=(1,2,3)"], ((0.5,) * 3, (1.0, 2.0, 3.0))),
        ("timm/test_vit", ["INPUT.PIXEL_MEAN=(0,0,0)", "INPUT.PIXEL_STD=(1,2,3)"], ((0.0,) * 3, (1.0, 2.0, 3.0))),
        ("timm/test_efficientnet", [], IMAGENET),
        ("timm/vit_base_patch16_clip_224.openai", [], (timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD)),
        ("resnet18", [], IMAGENET),
        ("resnet18", ["INPUT.PIXEL_MEAN=None", "INPUT.PIXEL_STD=None"], IMAGENET),
    ],
)
def test_normalization_is_that_of_settings_or_else_of_the_model(tmp_path, name, overrides, expected):
    cfg = load_config(None, [f"MODEL.NAME={name}", *overrides])
    assert backbones.normalization(cfg) == expected
    (tmp_path / "config.yaml").write_text(dump(cfg))
    again = load_config(str(tmp_path / "config.yaml"), [])
    assert dump(again) == dump(cfg)
    assert backbones.normalization(again) == expected


def test_the_normalization_reaches_the_pixels():
    cfg = settings("test_vit")
    batch = type("Batch", (), {"images": torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1).expand(1, 2, 1, 3)})
    pixels = BatchPreprocessor(cfg, torch.device("cpu")).for_evaluation(batch)
    assert pixels.flatten().unique().tolist() == [-1, 1]


# ---- pretrained weights ----


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Return a file in timm's layout, for 160x160 pixels and 1000 classes, and its state dict."""
    torch.manual_seed(5)
    state = timm.create_model("test_vit").state_dict()
    file = tmp_path_factory.mktemp("vit") / "model.safetensors"
    save_file(state, file)
    return file, state


SMALL = ("INPUT.SIZE_TRAIN=(64,32)", "INPUT.SIZE_TEST=(64,32)")


def start(name, file, choice="imagenet"):
    overrides = (*SMALL, f"MODEL.PRETRAIN_CHOICE={choice}", f"MODEL.PRETRAIN_PATH={file}")
    model = build_model(settings(name, *overrides), 3)
    initialize(model, settings(name, *overrides))
    return model


def saved(folder, state):
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"


def test_weights_of_timm_are_made_to_fit_the_size_of_the_images(vit, caplog):
    caplog.set_level(logging.INFO, "reid")
    loaded = start("test_vit", vit[0]).base.state_dict()
    changed = {name for name, value in loaded.items() if not torch.equal(value, vit[1].get(name, torch.zeros(0)))}
    assert changed == {"pos_embed"}
    assert loaded["pos_embed"].shape == (1, 1 + 4 * 2, 64)
    assert vit[1]["pos_embed"].shape == (1, 1 + 10 * 10, 64)
    facts = (
        f"MODEL.PRETRAIN_PATH={vit[0]}",
        f"{len(loaded)} of {len(loaded)}",
        "0 missing",
        "0 of another",
        "2 (head.",
    )
    assert all(fact in caplog.messages[-1] for fact in facts), caplog.messages


@pytest.mark.parametrize("classes", [0, 7])
def test_the_files_classifier_may_have_any_size_or_be_missing(vit, tmp_path, classes):
    state = {name: value for name, value in vit[1].items() if not name.startswith("head.")}
    if classes:
        state |= {"head.weight": torch.ones(classes, 64), "head.bias": torch.ones(classes)}
    loaded = start("test_vit", saved(tmp_path, {"state_dict": state})).base.state_dict()
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("test_vit", lambda state: state.pop("blocks.1.mlp.fc1.bias")),
        ("test_vit", lambda state: state.update({"blocks.0.mlp.fc1.bias": torch.ones(1)})),
        ("test_vit", lambda state: state.update({"more": torch.ones(1)})),
        ("test_vit", lambda state: state.clear()),
        ("test_vit2", lambda state: None),
        ("test_resnet", lambda state: None),
    ],
    ids=["missing", "another shape", "unexpected", "empty", "another vit", "another network"],
)
def test_weights_that_do_not_fit_are_rejected(vit, tmp_path, name, change):
    state = dict(vit[1])
    change(state)
    with pytest.raises(WorldError, match=rf"\AMODEL\.PRETRAIN_PATH=[^\n]*w\.pth [^\n]*timm/{name}\b[^\n]*\Z") as error:
        start(name, saved(tmp_path, state))
    assert error.value.key == "MODEL.PRETRAIN_PATH"


def test_full_model_can_be_finetuned_on_other_identities(vit, tmp_path):
    source = start("test_vit", vit[0])
    loaded = start("test_vit", saved(tmp_path, source.state_dict()), "finetune")
    assert torch.equal(loaded.base.pos_embed, source.base.pos_embed)


def test_model_of_another_image_size_is_rejected_with_remedy(vit, tmp_path):
    larger = build_model(settings("test_vit"), 3).state_dict()
    with refused(WorldError, "MODEL.PRETRAIN_PATH", "(base.pos_embed)", "INPUT.SIZE_TRAIN"):
        start("test_vit", saved(tmp_path, larger), "self")


def test_missing_network_error_names_the_download(place):
    settings = ("OUTPUT_DIR", "no_weights", "MODEL.NAME", "timm/test_vit", "MODEL.PRETRAIN_CHOICE", "imagenet")
    message = place.refusal("train", *settings, num_ranks=2, code=1)
    assert "MODEL.PRETRAIN_CHOICE" in message
    assert re.search(r"https://huggingface\.co/timm/test_vit\.r160_in1k .*MODEL\.PRETRAIN_PATH", message), message


def test_model_without_pretrained_weights_is_an_error():
    with refused(WorldError, "MODEL.PRETRAIN_CHOICE", "timm/test_vit4", "MODEL.PRETRAIN_PATH"):
        start("test_vit4", "")


# ---- in the real program ----


@pytest.mark.parametrize(
    "name", ["timm/test_efficientnet", pytest.param("timm/vit_tiny_patch16_224", marks=pytest.mark.slow)]
)
def test_it_trains_and_is_evaluated(place, name):
    """On two ranks, whose DistributedDataParallel would wait for a parameter without a gradient."""
    folder = name.replace("/", "_")
    message = place.train("OUTPUT_DIR", folder, "MODEL.NAME", name, "SOLVER.MAX_EPOCHS", 1, num_ranks=2).out
    assert "warning" not in message
    trained = json.loads((place.folder / folder / "result.json").read_text())
    assert records(place.folder / folder, "val")[-1]["mAP"] == trained["mAP"]
    (best,) = (place.folder / folder / "checkpoints").glob("best_*.pt")
    (evaluated,) = place.run(
        "evaluate",
        *("--config_file", f"{folder}/config.yaml", "OUTPUT_DIR", f"{folder}_again", "TEST.WEIGHT", best),
        bare=True,
    )
    assert evaluated.code == 0, evaluated
    assert json.loads((place.folder / f"{folder}_again" / "result.json").read_text())["mAP"] == trained["mAP"]
    assert "INPUT.PIXEL_MEAN" not in evaluated.err
    assert newest(place.folder / folder)["config"].count("PIXEL_MEAN: null") == 1


def test_it_trains_with_frozen_batchnorm(place):
    state = []
    for epochs in (1, 2):
        place.train(
            *("OUTPUT_DIR", "frozen", "MODEL.NAME", "timm/test_efficientnet", "MODEL.FREEZE_BN", "yes"),
            *("SOLVER.MAX_EPOCHS", epochs),
        )
        state.append(newest(place.folder / "frozen")["model"])
    changed = {name for name in state[0] if not torch.equal(state[0][name], state[1][name])}
    model = build_model(settings("test_efficientnet"), 2)
    of_norms = {
        f"base.{name}.{part}"
        for name, layer in model.base.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
        for part in layer.state_dict()
    }
    assert not changed & of_norms
    assert len(of_norms) > 50
    assert "base.conv_stem.weight" in changed
