"""The files in configs/: each loads, states what to expect, and is the experiment that its name promises."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from reid.config.load import by_full_key, load_config
from reid.config.rules import label_smoothing, use_center_loss, use_identity_loss, use_triplet_loss, validate_training

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yml"))
LEGACY = ["baseline.yml", "softmax.yml", "softmax_triplet.yml", "softmax_triplet_with_center.yml"]

# As reid-strong-baseline's README publishes them: rank-1 and mAP on Market-1501, then on DukeMTMC-reID.
LADDER = {
    "1_baseline": (87.7, 74.0, 79.7, 63.8),
    "2_warmup": (88.7, 75.2, 80.6, 65.1),
    "3_random_erasing": (91.3, 79.3, 81.5, 68.3),
    "4_label_smoothing": (91.4, 80.3, 82.4, 69.3),
    "5_last_stride": (92.0, 81.7, 82.6, 70.6),
    "6_bnneck": (94.1, 85.7, 86.2, 75.9),
    "7_center": (94.5, 85.9, 86.4, 76.4),
    "8_re_ranking": (95.4, 94.2, 90.3, 89.1),
}
BACKBONES = {
    "resnet18": (91.7, 77.8, 82.5, 68.8),
    "resnet34": (92.7, 82.7, 86.4, 73.6),
    "resnet50": (94.5, 85.9, 86.4, 76.4),
    "resnet101": (94.5, 87.1, 87.6, 77.6),
    "resnet152": (80.9, 59.0, 87.5, 78.0),
    "se_resnet50": (94.4, 86.3, 86.4, 76.5),
    "se_resnet101": (94.6, 87.3, 87.5, 78.0),
    "se_resnext50": (94.9, 87.6, 88.0, 78.3),
    "se_resnext101": (95.0, 88.0, 88.4, 79.0),
    "resnet50_ibn_a": (95.0, 88.2, 90.1, 79.1),
}


def settings_of(name: str, *overrides: str) -> dict:
    settings = by_full_key(load_config(str(CONFIGS / name), list(overrides)))
    left_out = ("OUTPUT_DIR", "WANDB.", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.EVAL_PERIOD")
    return {key: value for key, value in settings.items() if not key.startswith(left_out)}


def differences(one: dict, other: dict) -> dict:
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


def published(name: str) -> tuple[float, ...]:
    header = (CONFIGS / name).read_text().split("\n\n")[0]
    return tuple(map(float, re.findall(r"(?:rank-1|mAP) ([0-9.]+) %", header)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_header_of_config_gives_command_and_expected_scores(path, caplog):
    header = path.read_text().split("\n\n")[0]
    name = path.relative_to(CONFIGS.parent).as_posix()
    for part in (f"--config_file {name}", "torchrun", "hardware", "hours", "mAP", "rank-1"):
        assert part in header
    (command,) = re.findall(r"uv run torchrun .*", header)
    arguments = shlex.split(command)
    overrides = arguments[arguments.index("--config_file") + 2 :]
    cfg = load_config(str(path), overrides)
    validate_training(cfg, 2)
    assert f"runs/{path.stem}" == cfg.OUTPUT_DIR
    assert cfg.WANDB.ENTITY == ""
    assert caplog.records == []


# ---- the published experiments ----


@pytest.mark.parametrize("name", LEGACY)
def test_a_legacy_file_is_as_published(name):
    cfg = load_config(str(CONFIGS / "legacy" / name), [])
    assert not cfg.MODEL.STEM_RELU
    assert not cfg.MODEL.SMOOTH_SOFTMAX
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.SOLVER.EVAL_PERIOD == (20 if name == "softmax.yml" else 40)
    assert cfg.DATALOADER.NUM_WORKERS == 8


def test_the_legacy_files_are_the_ladders_ends():
    recipe = by_full_key(load_config(None, []))
    full = settings_of("legacy/softmax_triplet.yml")
    assert differences(full, {key: recipe[key] for key in full}) == {}
    assert differences(settings_of("legacy/baseline.yml"), settings_of("ladder/1_baseline.yml")) == {}
    assert differences(full, settings_of("ladder/6_bnneck.yml")) == {}
    with_center = settings_of("legacy/softmax_triplet_with_center.yml")
    assert differences(with_center, settings_of("ladder/7_center.yml")) == {}
    assert differences(with_center, full) == {
        "MODEL.IF_WITH_CENTER": (True, False),
        "MODEL.METRIC_LOSS_TYPE": ("triplet_center", "triplet"),
    }


def test_softmax_leaves_out_label_smoothing_only_as_published():
    legacy, ours = (load_config(str(CONFIGS / name), []) for name in ("legacy/softmax.yml", "softmax.yml"))
    assert [(use_identity_loss(cfg), use_triplet_loss(cfg), use_center_loss(cfg)) for cfg in (legacy, ours)] == [
        (True, False, False)
    ] * 2
    assert (label_smoothing(legacy), label_smoothing(ours)) == (0.0, 0.1)


def test_every_step_of_the_ladder_adds_one_trick():
    names = [path.relative_to(CONFIGS).as_posix() for path in sorted((CONFIGS / "ladder").glob("*.yml"))]
    steps = [differences(settings_of(below), settings_of(above)) for below, above in pairwise(names)]
    assert steps == [
        {"SOLVER.WARMUP_ITERS": (0, 10)},
        {"INPUT.RE_PROB": (0.0, 0.5)},
        {"MODEL.IF_LABELSMOOTH": (False, True)},
        {"MODEL.LAST_STRIDE": (2, 1)},
        {"MODEL.NECK": ("no", "bnneck")},
        {"MODEL.IF_WITH_CENTER": (False, True), "MODEL.METRIC_LOSS_TYPE": ("triplet", "triplet_center")},
        {"TEST.RE_RANKING": (False, True)},
    ]


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        *((f"ladder/{name}.yml", figures) for name, figures in LADDER.items()),
        *((f"backbones/{name}.yml", figures) for name, figures in BACKBONES.items()),
    ],
)
def test_a_header_has_the_published_figures(name, figures):
    assert published(name) == figures


@pytest.mark.parametrize("path", sorted((CONFIGS / "backbones").glob("*.yml")), ids=lambda path: path.stem)
def test_a_backbones_file_changes_the_backbone_alone(path):
    changed = differences(settings_of("ladder/7_center.yml"), settings_of(f"backbones/{path.name}"))
    expected = {} if path.stem == "resnet50" else {"MODEL.NAME": ("resnet50", path.stem)}
    if path.stem.startswith("se") or "ibn" in path.stem:  # whose stems have always had a ReLU
        expected["MODEL.STEM_RELU"] = (False, True)
    assert changed == expected


# ---- the new ones ----


@pytest.mark.parametrize("name", LEGACY)
def test_current_config_differs_from_legacy_only_in_known_fixes(name):
    cures = {"MODEL.STEM_RELU": (False, True)}
    if name == "softmax.yml":
        cures["MODEL.SMOOTH_SOFTMAX"] = (False, True)
    assert differences(settings_of(f"legacy/{name}"), settings_of(name)) == cures
