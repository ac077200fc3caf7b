"""Settings: defaults, documentation, accepted spellings, errors, rules, and the way back to YAML.

Also covers reid.config.schema, reid.config.schema_model, reid.config.schema_data, reid.config.schema_solver,
reid.config.schema_output, reid.config.load, reid.config.parsing, reid.config.validators, reid.config.rules.
"""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from reid.config.load import as_plain_dict, dump, load_config
from reid.config.rules import (
    fitting_nodes,
    label_smoothing,
    use_center_loss,
    use_identity_loss,
    use_triplet_loss,
    validate_training,
)
from reid.config.schema import SETTINGS
from reid.errors import SettingsError, UnknownKeyError

CONFIGS = Path(__file__).parents[2] / "configs"

# reid-strong-baseline's configs/softmax_triplet.yml, key for key and quote for quote.
PUBLISHED = """
MODEL:
  PRETRAIN_CHOICE: 'imagenet'
  PRETRAIN_PATH: '/home/user/.torch/models/resnet50-19c8e357.pth'
  METRIC_LOSS_TYPE: 'triplet'
  IF_LABELSMOOTH: 'on'
  IF_WITH_CENTER: 'no'

INPUT:
  SIZE_TRAIN: [256, 128]
  SIZE_TEST: [256, 128]
  PROB: 0.5 # random horizontal flip
  RE_PROB: 0.5 # random erasing
  PADDING: 10

DATASETS:
  NAMES: ('market1501')

DATALOADER:
  SAMPLER: 'softmax_triplet'
  NUM_INSTANCE: 4
  NUM_WORKERS: 8

SOLVER:
  OPTIMIZER_NAME: 'Adam'
  MAX_EPOCHS: 120
  BASE_LR: 0.00035

  CLUSTER_MARGIN: 0.3

  CENTER_LR: 0.5
  CENTER_LOSS_WEIGHT: 0.0005

  RANGE_K: 2
  RANGE_MARGIN: 0.3
  RANGE_ALPHA: 0
  RANGE_BETA: 1
  RANGE_LOSS_WEIGHT: 1

  BIAS_LR_FACTOR: 1
  WEIGHT_DECAY: 0.0005
  WEIGHT_DECAY_BIAS: 0.0005
  IMS_PER_BATCH: 64

  STEPS: [40, 70]
  GAMMA: 0.1

  WARMUP_FACTOR: 0.01
  WARMUP_ITERS: 10
  WARMUP_METHOD: 'linear'

  CHECKPOINT_PERIOD: 40
  LOG_PERIOD: 20
  EVAL_PERIOD: 40

TEST:
  IMS_PER_BATCH: 128
  RE_RANKING: 'no'
  WEIGHT: "path"
  NECK_FEAT: 'after'
  FEAT_NORM: 'yes'

OUTPUT_DIR: "/home/user/log/all_tricks"
"""


def value_of(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="x.yml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write_file


def assert_refused(config_file, overrides, key, *keywords, kind=SettingsError):
    """Assert that the error is one sentence on one line, about this key, with it and all of the keywords in it."""
    with refused(kind, key, key, *keywords):
        with pytest.raises(kind, match=r"\A[^\n]*[^.\n]\Z") as caught:
            load_config(config_file, overrides)
        raise caught.value


# ---- the tree ----


def test_every_key_has_its_default():
    cfg = load_config(None, [])
    for key, setting in SETTINGS.items():
        default = "runs/default" if key == "OUTPUT_DIR" else setting.default
        assert value_of(cfg, key) == default, key
        assert type(value_of(cfg, key)) is type(default), key


def test_every_default_passes_its_validator():
    for key, setting in SETTINGS.items():
        assert setting.validate(setting.default) == setting.default, key
        assert type(setting.validate(setting.default)) is type(setting.default), key


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_documented(key):
    """In a few full sentences, which do not name the setting itself."""
    doc = SETTINGS[key].doc
    assert re.fullmatch(r"[A-Zk].*\.", doc), doc
    assert "  " not in doc
    assert len(re.findall(r"[.;] ", doc)) <= 6, doc
    assert key not in doc
    assert SETTINGS[key].validate.allowed


def test_the_tree_is_frozen():
    cfg = load_config()
    assert cfg.is_frozen()
    with pytest.raises(AttributeError):
        cfg.SEED = 1
    with pytest.raises(AttributeError):
        cfg.DATASETS.SYNTHETIC.SEED = 1


def test_two_trees_share_nothing():
    load_config(None, []).WANDB.TAGS.append("mine")
    assert load_config(None, []).WANDB.TAGS == []


def test_a_settings_error_needs_no_torch():
    code = (
        "import sys\nfrom reid.config.load import load_config\n"
        "try: load_config(None, ['SOLVER.BASE_LR', '0'])\n"
        "except ValueError: pass\n"
        "print([name for name in ('torch', 'ignite', 'numpy', 'accelerate', 'wandb', 'PIL') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_prints_nothing(capfd, write):
    load_config(write(PUBLISHED), ["MODEL.DEVICE_ID", "('0')"])
    assert capfd.readouterr() == ("", "")


# ---- files and command lines of reid-strong-baseline ----


def test_the_published_file_runs_unchanged(write, caplog):
    with caplog.at_level(logging.WARNING, "reid"):
        cfg = load_config(
            write(PUBLISHED), ["MODEL.DEVICE_ID", "('your device id')", "DATASETS.NAMES", "('market1501')"]
        )
    ours = load_config(str(CONFIGS / "softmax_triplet.yml"), [])
    assert cfg.INPUT == ours.INPUT
    assert cfg.DATASETS == ours.DATASETS
    assert cfg.SOLVER.STEPS == (40, 70)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 40
    assert cfg.DATALOADER.NUM_WORKERS == 8
    assert cfg.OUTPUT_DIR == "/home/user/log/all_tricks"
    assert cfg.TEST.WEIGHT == "path"
    assert (cfg.MODEL.IF_LABELSMOOTH, cfg.MODEL.IF_WITH_CENTER, cfg.TEST.RE_RANKING, cfg.TEST.FEAT_NORM) == (
        True,
        False,
        False,
        True,
    )
    notices = [record.getMessage() for record in caplog.records]
    assert len(notices) == 7
    assert all("has no effect" in notice and "\n" not in notice for notice in notices)
    assert any("MODEL.DEVICE_ID" in notice and "CUDA_VISIBLE_DEVICES" in notice for notice in notices)
    for key in ("CLUSTER_MARGIN", "RANGE_K", "RANGE_MARGIN", "RANGE_ALPHA", "RANGE_BETA", "RANGE_LOSS_WEIGHT"):
        assert sum(f"SOLVER.{key} " in notice for notice in notices) == 1
        assert key not in cfg.SOLVER
    assert "DEVICE_ID" not in cfg.MODEL


@pytest.mark.parametrize("value", ["0", "{a: 1}", "[1, x]", "", "yes"])
def test_a_dead_key_may_have_any_value_and_is_mentioned_once(value, write, caplog):
    load_config(write(f"SOLVER: {{RANGE_K: {value}}}"), ["SOLVER.RANGE_K", "3", "SOLVER.RANGE_K=4"])
    assert len(caplog.records) == 1


# ---- accepted spellings ----

SPELLINGS = [
    ("DATASETS.NAMES", "('market1501')", ("market1501",)),
    ("DATASETS.NAMES", "('market1501',)", ("market1501",)),
    ("DATASETS.NAMES", "market1501", ("market1501",)),
    ("DATASETS.NAMES", "[synthetic]", ("synthetic",)),
    ("DATASETS.DEVICE_CACHE", "on", "on"),
    ("DATASETS.DEVICE_CACHE", "off", "off"),
    ("DATASETS.NAMES", "('market1501','synthetic')", ("market1501", "synthetic")),
    ("TEST.DATASETS", "[synthetic,market1501]", ("synthetic", "market1501")),
    ("TEST.DATASETS", "", ()),
    ("DATASETS.NAMES", "('market1501','dukemtmc')", ("market1501", "dukemtmc")),
    ("DATASETS.NAMES", "veri, cuhk03 ,msmt17", ("veri", "cuhk03", "msmt17")),
    ("DATASETS.NAMES", "data/mine.csv", ("data/mine.csv",)),
    ("DATASETS.NAMES", "[/d/a b.CSV, market1501, x.parquet]", ("/d/a b.CSV", "market1501", "x.parquet")),
    ("DATASETS.MSMT17.TRAIN", "train+val", "train+val"),
    ("DATASETS.VEHICLEID.TEST", "('2400')", 2400),
    ("DATASETS.NAMES", '["synthetic"]', ("synthetic",)),
    ("OUTPUT_DIR", "('/log/x')", "/log/x"),
    ("OUTPUT_DIR", "/log/it's (new)", "/log/it's (new)"),
    ("OUTPUT_DIR", "a=b", "a=b"),
    ("WANDB.NAME", "123", "123"),
    ("WANDB.NAME", "", ""),
    ("WANDB.NOTES", "lr=0.1; 'x'", "lr=0.1; 'x'"),
    ("WANDB.TAGS", "['a','b']", ["a", "b"]),
    ("WANDB.TAGS", "[a,b]", ["a", "b"]),
    ("WANDB.TAGS", "a,b", ["a", "b"]),
    ("WANDB.TAGS", "('a')", ["a"]),
    ("WANDB.TAGS", "", []),
    ("MODEL.IF_LABELSMOOTH", "('off')", False),
    ("MODEL.IF_LABELSMOOTH", "YES", True),
    ("MODEL.IF_LABELSMOOTH", "On", True),
    ("MODEL.IF_LABELSMOOTH", "true", True),
    ("MODEL.IF_LABELSMOOTH", "False", False),
    ("MODEL.IF_LABELSMOOTH", "no", False),
    ("MODEL.NECK", "no", "no"),
    ("MODEL.NECK", "('bnneck')", "bnneck"),
    ("WANDB.MODE", "", ""),
    ("SOLVER.BASE_LR", "1e-3", 1e-3),
    ("SOLVER.BASE_LR", "1", 1.0),
    ("SOLVER.BASE_LR", "('0.5')", 0.5),
    ("SOLVER.WARMUP_FACTOR", "1", 1.0),
    ("SOLVER.MARGIN", "None", None),
    ("SOLVER.MARGIN", "('none')", None),
    ("TEST.FPR", "[0.0001,0.01]", (0.0001, 0.01)),
    ("TEST.FPR", "1e-3", (0.001,)),
    ("TEST.FPR", "()", ()),
    ("TEST.SINGLE_GALLERY_SHOT", "yes", "yes"),
    ("SOLVER.MARGIN", "0", 0.0),
    ("SOLVER.STEPS", "[30, 55]", (30, 55)),
    ("SOLVER.STEPS", "(30, 55)", (30, 55)),
    ("SOLVER.STEPS", "30,55,80", (30, 55, 80)),
    ("SOLVER.STEPS", "(30)", (30,)),
    ("SOLVER.STEPS", "[]", ()),
    ("SOLVER.MAX_EPOCHS", "('5')", 5),
    ("INPUT.SIZE_TRAIN", "[384,128]", (384, 128)),
    ("INPUT.PIXEL_MEAN", "[0, 0.5, -1e-3]", (0.0, 0.5, -1e-3)),
    ("DATALOADER.NUM_WORKERS", "0", 0),
]


@pytest.mark.parametrize(("key", "word", "expected"), SPELLINGS)
def test_spellings_on_the_command_line(key, word, expected):
    for overrides in ([key, word], [f"{key}={word}"]):
        got = value_of(load_config(None, overrides), key)
        assert got == expected
        assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("key", "yaml_value", "expected"),
    [
        *((key, f"'{word}'", expected) for key, word, expected in SPELLINGS if "'" not in word and word != ""),
        ("DATASETS.NAMES", "('market1501')", ("market1501",)),
        ("DATASETS.NAMES", "[market1501]", ("market1501",)),
        ("DATASETS.DEVICE_CACHE", "on", "on"),
        ("DATASETS.DEVICE_CACHE", "off", "off"),
        ("OUTPUT_DIR", "('/log/x')", "/log/x"),
        ("MODEL.NECK", "no", "no"),
        ("MODEL.IF_WITH_CENTER", "no", False),
        ("MODEL.IF_LABELSMOOTH", "off", False),
        ("TEST.FEAT_NORM", "'yes'", True),
        ("TEST.FPR", "[0.5, 1e-4]", (0.5, 0.0001)),
        ("TEST.SINGLE_GALLERY_SHOT", "yes", "yes"),
        ("TEST.SINGLE_GALLERY_SHOT", "no", "no"),
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
        ("SOLVER.BIAS_LR_FACTOR", "2", 2.0),
        ("SOLVER.MARGIN", "null", None),
        ("SOLVER.MARGIN", "None", None),
        ("SOLVER.STEPS", "(40, 70)", (40, 70)),
        ("SOLVER.STEPS", "40", (40,)),
        ("INPUT.SIZE_TEST", "[384, 128]", (384, 128)),
        ("WANDB.TAGS", "[a, 'b c']", ["a", "b c"]),
        ("WANDB.NOTES", "é 中", "é 中"),
    ],
)
def test_spellings_in_a_file(key, yaml_value, expected, write):
    nested = ""
    for depth, name in enumerate(key.split(".")):
        nested += ("\n" if depth else "") + "  " * depth + f"{name}:"
    cfg = load_config(write(f"{nested} {yaml_value}\n"), [])
    assert value_of(cfg, key) == expected
    assert type(value_of(cfg, key)) is type(expected)


def test_command_line_overrides_file_and_last_occurrence_wins(write):
    file = write("SOLVER: {BASE_LR: 0.1, GAMMA: 0.2}")
    cfg = load_config(file, ["SOLVER.BASE_LR", "0.3", "SEED=5", "SOLVER.BASE_LR=0.4", "WANDB.NOTES", "a=b=c"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SEED, cfg.WANDB.NOTES) == (0.4, 0.2, 5, "a=b=c")


def test_value_after_equals_sign_may_look_like_a_key():
    cfg = load_config(None, ["WANDB.NAME=SOLVER.BASE_LR=0.1", "WANDB.GROUP=SEED"])
    assert (cfg.WANDB.NAME, cfg.WANDB.GROUP) == ("SOLVER.BASE_LR=0.1", "SEED")


def test_a_value_may_start_with_a_minus():
    assert load_config(None, ["INPUT.PIXEL_MEAN", "-1,-.5,0"]).INPUT.PIXEL_MEAN == (-1.0, -0.5, 0.0)
    assert_refused(None, ["SOLVER.BASE_LR", "-0.1"], "SOLVER.BASE_LR", "'-0.1'")


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "---\n", "MODEL:\n", "MODEL: {}\nDATASETS:\n  SYNTHETIC:\n"]
)
def test_an_empty_file_or_section_changes_nothing(text, write):
    cfg = load_config(write(text), ["OUTPUT_DIR", "o"])
    assert cfg == load_config(None, ["OUTPUT_DIR", "o"])


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load_config(write(b"\xef\xbb\xbfSEED: 3\r\n"), []).SEED == 3


def test_output_dir_is_named_after_the_file(write):
    assert load_config(write("", "my.exp.yml"), []).OUTPUT_DIR == "runs/my.exp"
    assert load_config(write("OUTPUT_DIR: there"), []).OUTPUT_DIR == "there"
    assert load_config(write("OUTPUT_DIR: there"), ["OUTPUT_DIR", "here"]).OUTPUT_DIR == "here"
    assert load_config("", []).OUTPUT_DIR == "runs/default"


# ---- refused: one value ----


@pytest.mark.parametrize(
    ("key", "word", "parts"),
    [
        ("SEED", "-1", ["from 0 to 4294967295", "example 0"]),
        ("SEED", "4294967296", ["from 0 to 4294967295"]),
        ("MODEL.DEVICE", "cuda:0", ["auto, cuda, cpu", "cuda?"]),
        ("MODEL.NAME", "resnet51", ["resnet18, resnet34, resnet50, resnet101, resnet152", "resnet50?"]),
        ("MODEL.NAME", "vit", ["resnet18", "example resnet50"]),
        ("MODEL.LAST_STRIDE", "3", ["from 1 to 2", "example 1"]),
        ("MODEL.NECK", "BNNeck", ["bnneck, no", "bnneck?"]),
        ("MODEL.PRETRAIN_CHOICE", "None", ["imagenet, self, finetune, none", "none?"]),
        ("MODEL.IF_LABELSMOOTH", "maybe", ["yes or no", "example yes"]),
        ("MODEL.IF_WITH_CENTER", "1", ["yes or no", "example no"]),
        ("INPUT.SIZE_TRAIN", "256", ["width", "example [256,128]"]),
        ("INPUT.SIZE_TRAIN", "256,128,3", ["width"]),
        ("INPUT.SIZE_TRAIN", "256,4", [">= 8"]),
        ("INPUT.SIZE_TEST", "256,128.0", ["whole numbers"]),
        ("INPUT.PROB", "1.5", ["from 0 to 1", "example 0.5"]),
        ("INPUT.RE_PROB", "-0.5", ["from 0 to 1"]),
        ("INPUT.PIXEL_MEAN", "0.5", ["three numbers"]),
        ("INPUT.PIXEL_MEAN", "a,b,c", ["three numbers", "[0.485,0.456,0.406]"]),
        ("INPUT.PIXEL_STD", "1,1,0", ["numbers > 0"]),
        ("INPUT.PADDING", "-1", [">= 0", "example 10"]),
        ("TEST.DATASETS", "market1502", ["market1501, dukemtmc,", "market1501?"]),
        ("DATASETS.NAMES", "market1502", ["market1501, dukemtmc,", "market1501?"]),
        ("DATASETS.NAMES", "DukeMTMC-reID", ["dukemtmc?"]),
        ("DATASETS.NAMES", "dukemtmcreid", ["dukemtmc?"]),
        ("DATASETS.NAMES", "Market-1501", ["market1501?"]),
        ("DATASETS.NAMES", "VeRi-776", ["veri?"]),
        ("DATASETS.NAMES", "occ_duke", ["occluded_duke?"]),
        ("DATASETS.NAMES", "CUHK03-NP", ["cuhk03?"]),
        ("DATASETS.NAMES", "(market1501,msmt)", ["'(market1501,msmt)'", "'msmt'", "msmt17?"]),
        ("DATASETS.NAMES", "veri,msmt17,veri", ["repetition", "use [veri,msmt17]"]),
        ("DATASETS.NAMES", "people.xlsx", [".parquet"]),
        ("DATASETS.NAMES", "", ["a list", "example [market1501]"]),
        ("DATASETS.VEHICLEID.TEST", "1000", ["800, 1600, 2400, 3200, 6000, 13164"]),
        ("DATASETS.VEHICLEID.TEST", "800.0", ["use 800"]),
        ("DATASETS.CUHK03.SPLIT", "20", ["from 0 to 19"]),
        ("DATASETS.MSMT17.TRAIN", "val", ["train, train+val"]),
        ("DATASETS.SYNTHETIC.NUM_CAMERAS", "1", [">= 2", "example 4"]),
        ("DATALOADER.NUM_WORKERS", "2.5", [">= 0"]),
        (
            "DATALOADER.SAMPLER",
            "softmax-triplet",
            ["softmax, triplet, softmax_triplet", "softmax_triplet?"],
        ),
        ("DATALOADER.NUM_INSTANCE", "0", [">= 1", "example 4"]),
        ("SOLVER.OPTIMIZER_NAME", "adam", ["Adam, AdamW, SGD", "Adam?"]),
        ("SOLVER.MAX_EPOCHS", "0", [">= 1", "example 120"]),
        ("SOLVER.BASE_LR", "0", ["> 0", "example 0.00035"]),
        ("SOLVER.BASE_LR", "fast", ["> 0"]),
        ("SOLVER.BASE_LR", "nan", ["> 0"]),
        ("SOLVER.BASE_LR", "inf", ["> 0"]),
        ("SOLVER.BASE_LR", "1e999", ["> 0"]),
        ("SOLVER.BASE_LR", "1" + 400 * "0", ["> 0"]),
        ("SOLVER.BASE_LR", "True", ["> 0"]),
        ("SOLVER.BASE_LR", "None", ["> 0"]),
        ("SOLVER.BASE_LR", "1+2j", ["> 0"]),
        ("SOLVER.BASE_LR", "", ["> 0"]),
        ("SOLVER.MOMENTUM", "1.1", ["from 0 to 1", "example 0.9"]),
        ("SOLVER.MARGIN", "-0.3", [">= 0 or None", "example 0.3"]),
        ("SOLVER.CENTER_LR", "0", ["> 0"]),
        ("SOLVER.CENTER_LOSS_WEIGHT", "0", ["> 0", "example 0.0005"]),
        ("SOLVER.WEIGHT_DECAY", "-1", [">= 0"]),
        ("SOLVER.WEIGHT_DECAY_BIAS", "-1", [">= 0"]),
        ("SOLVER.GAMMA", "0", ["> 0"]),
        ("SOLVER.STEPS", "70,40", ["increasing", "use [40,70]"]),
        ("SOLVER.STEPS", "40,40", ["increasing", "use [40]"]),
        ("SOLVER.STEPS", "40,x", ["increasing", "example [40,70]"]),
        ("SOLVER.STEPS", "-1,2", ["increasing"]),
        ("SOLVER.STEPS", "None", ["increasing"]),
        ("SOLVER.STEPS", "40.0", ["increasing", "use 40"]),
        ("SOLVER.WARMUP_FACTOR", "2", ["from 0 to 1"]),
        ("SOLVER.WARMUP_ITERS", "-1", [">= 0"]),
        ("SOLVER.WARMUP_METHOD", "cosine", ["linear, constant"]),
        ("SOLVER.LOG_PERIOD", "0", [">= 1", "example 20"]),
        ("SOLVER.EVAL_PERIOD", "0", [">= 1"]),
        ("SOLVER.CHECKPOINT_PERIOD", "0", [">= 1"]),
        ("SOLVER.IMS_PER_BATCH", "64.0", [">= 1", "use 64"]),
        ("SOLVER.IMS_PER_BATCH", "-64.0", [">= 1", "example 64"]),
        ("SOLVER.IMS_PER_BATCH", "True", [">= 1"]),
        ("SOLVER.IMS_PER_BATCH", "9" * 6000, [">= 1"]),
        ("SOLVER.PRECISION", "float32", ["fp32, fp64, bf16, fp16"]),
        ("SOLVER.TIMEOUT_MINUTES", "1e300", ["from 0.01 to 10080", "example 30.0"]),
        ("TEST.IMS_PER_BATCH", "0", [">= 1", "example 128"]),
        ("TEST.NECK_FEAT", "bn", ["after, before"]),
        ("TEST.FPR", "[0.1,1]", ["[0.0001,0.001,0.01]", "'[0.1,1]'"]),
        ("TEST.FPR", "0", ["between 0 and 1", "'0'"]),
        ("TEST.FPR", "[nan]", ["between 0 and 1"]),
        ("TEST.SINGLE_GALLERY_SHOT", "maybe", ["auto, yes, no", "example auto"]),
        ("OUTPUT_DIR", "None", ["text", "use ''"]),
        ("WANDB.PROJECT", "my/project", ["/\\#?%:", "example reid-strong-baseline"]),
        ("WANDB.PROJECT", "p" * 129, ["to 128 characters"]),
        ("WANDB.TAGS", "['']", ["1 to 64 characters"]),
        ("WANDB.TAGS", "t" * 65, ["1 to 64 characters", "example []"]),
        ("WANDB.TAGS", "[1, 2]", ["texts"]),
        ("WANDB.MODE", "onlin", ["'', online, offline, disabled", "online?"]),
        ("WANDB.INIT_TIMEOUT", "0", ["from 0.1 to 3600", "example 20.0"]),
    ],
)
def test_a_wrong_value_on_the_command_line(key, word, parts):
    got = repr(word) if len(repr(word)) <= 80 else repr(word)[:77] + "..."
    for overrides in ([key, word], [f"{key}={word}"]):
        assert_refused(None, overrides, key, got, "command line", *parts)


@pytest.mark.parametrize(
    ("key", "yaml_value", "parts"),
    [
        ("MODEL.NAME", "null", ["resnet18", "got None"]),
        ("MODEL.NAME", "[resnet50]", ["resnet18", "got ['resnet50']"]),
        ("MODEL.NAME", "no", ["resnet18", "got False"]),
        ("MODEL.IF_LABELSMOOTH", "null", ["yes or no", "got None"]),
        ("MODEL.IF_LABELSMOOTH", "1", ["yes or no", "got 1"]),
        ("MODEL.IF_LABELSMOOTH", "[yes]", ["yes or no", "got [True]"]),
        ("SOLVER.IMS_PER_BATCH", "true", [">= 1", "got True"]),
        ("SOLVER.IMS_PER_BATCH", "64.0", [">= 1", "got 64.0", "use 64"]),
        ("SOLVER.IMS_PER_BATCH", "{a: 1}", [">= 1", "got {'a': 1}"]),
        ("SOLVER.IMS_PER_BATCH", "null", ["got None", "example 64"]),
        ("SOLVER.BASE_LR", "yes", ["> 0", "got True"]),
        ("SOLVER.BASE_LR", ".nan", ["> 0", "got nan"]),
        ("SOLVER.BASE_LR", ".inf", ["> 0", "got inf"]),
        ("SOLVER.BASE_LR", "[0.1]", ["> 0", "got [0.1]"]),
        ("SOLVER.MARGIN", "[]", [">= 0 or None", "got []"]),
        ("SOLVER.STEPS", "{40: 70}", ["increasing", "got {40: 70}"]),
        ("SOLVER.STEPS", "[true]", ["increasing", "got [True]"]),
        ("WANDB.NAME", "123", ["text", "got 123", "quotes"]),
        ("WANDB.NAME", "2024-01-02", ["text", "got datetime.date(2024, 1, 2)", "quotes"]),
        ("WANDB.NAME", "no", ["text", "got False", "quotes"]),
        ("WANDB.NAME", "null", ["text", "got None", "use ''"]),
        ("DATASETS.NAMES", "[]", ["a list", "got []"]),
        ("DATASETS.NAMES", "[synthetic, synthetic]", ["repetition", "use [synthetic]"]),
        ("DATASETS.NAMES", "null", ["a list", "got None"]),
        ("DATASETS.NAMES", "[market1501, 3]", ["a list", "got ['market1501', 3]"]),
        ("WANDB.TAGS", "[2024]", ["texts", "got [2024]", "quotes"]),
    ],
)
def test_a_wrong_value_in_a_file(key, yaml_value, parts, write):
    section, name = key.split(".")
    file = write(f"# a comment\n{section}:\n  {name}: {yaml_value}\n")
    assert_refused(file, [], key, f"{file}, line 3", *parts)


def test_tensorboard_files_that_are_not_written_cannot_be_copied():
    copying = ["WANDB.SYNC_TENSORBOARD", "yes"]
    assert_refused(None, copying, "WANDB.SYNC_TENSORBOARD", "LOG.TENSORBOARD yes")
    assert load_config(None, [*copying, "LOG.TENSORBOARD", "yes"]).WANDB.SYNC_TENSORBOARD
    assert not load_config(None, [*copying, "WANDB.ENABLE", "no"]).LOG.TENSORBOARD


# ---- refused: keys ----


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("MODEL.NAM", "MODEL.NAME"),
        ("model.name", "MODEL.NAME"),
        ("SOLVER.Base_LR", "SOLVER.BASE_LR"),
        ("BASE_LR", "SOLVER.BASE_LR"),
        ("SOLVER.SAMPLER", "DATALOADER.SAMPLER"),
        ("IMS_PER_BATCH", "SOLVER.IMS_PER_BATCH or TEST.IMS_PER_BATCH"),
        ("SOLVER.IMS_PER_BATCHES", "SOLVER.IMS_PER_BATCH"),
        ("--SOLVER.BASE_LR", "SOLVER.BASE_LR"),
        ("SOLVERS", "SOLVER"),
    ],
)
def test_an_unknown_key_gets_the_nearest(key, meant):
    for overrides in ([key, "1"], [f"{key}=1"]):
        assert_refused(None, overrides, key, "command line", f"{meant}?", kind=UnknownKeyError)


def test_an_unknown_key_far_from_all_others():
    assert_refused(None, ["QQQQ", "1"], "QQQQ", "command line", "reid settings", kind=UnknownKeyError)
    assert_refused(None, ["=1"], "", "command line", kind=UnknownKeyError)


@pytest.mark.parametrize(
    ("text", "line", "key", "meant"),
    [
        ("SOLVER:\n  LR_BASE: 1\n", 2, "SOLVER.LR_BASE", "SOLVER.BASE_LR?"),
        ("solver:\n  BASE_LR: 1\n", 1, "solver", "SOLVER?"),
        ("SOLVER:\n  MODEL:\n    NAME: x\n", 2, "SOLVER.MODEL", "?"),
    ],
)
def test_an_unknown_key_in_a_file(text, line, key, meant, write):
    file = write(text)
    assert_refused(file, [], key, f"{file}, line {line}", meant, kind=UnknownKeyError)


def test_a_key_without_a_value():
    assert_refused(None, ["SEED", "1", "SOLVER.BASE_LR"], "SOLVER.BASE_LR", "the end", "SOLVER.BASE_LR=VALUE")
    for following in ("MODEL.NAME", "MODEL.NAME=resnet18"):
        assert_refused(None, ["OUTPUT_DIR", following, "resnet50"], "OUTPUT_DIR", following, "OUTPUT_DIR=VALUE")


def test_a_section_is_no_setting(write):
    for overrides in (["MODEL", "resnet50"], ["MODEL=resnet50"]):
        assert_refused(None, overrides, "MODEL", "section", "'resnet50'", "command line", "MODEL.NAME")
    file = write("MODEL: resnet50")
    assert_refused(file, [], "MODEL", "section", "'resnet50'", f"{file}, line 1", "MODEL.NAME")
    assert_refused(write("DATASETS: {SYNTHETIC: [1]}"), [], "DATASETS.SYNTHETIC", "section")


# ---- refused: files ----


def test_a_missing_file(tmp_path):
    with refused(SettingsError, "--config_file", f"{tmp_path}/none.yml", "No such file"):
        load_config(str(tmp_path / "none.yml"), [])


def test_a_folder_and_a_forbidden_file(tmp_path, monkeypatch):
    with refused(SettingsError, "--config_file", str(tmp_path), "Is a directory"):
        load_config(str(tmp_path), [])
    with refused(SettingsError, "--config_file", "a\0b"):
        load_config("a\0b", [])

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    with refused(SettingsError, "--config_file", "x.yml", "Permission denied"):
        load_config("x.yml", [])


@pytest.mark.parametrize(
    ("text", "key", "parts"),
    [
        (b"SEED: \xff", "--config_file", ["0xff", "UTF-8"]),
        (b"SEED: 1\nWANDB: \x07", "--config_file", ["0x7", "line 2"]),
        ("MODEL:\n\tNAME: x", "--config_file", ["YAML", "line 2, column 1"]),
        ("MODEL: [1, 2", "--config_file", ["YAML", "line 1, column 13"]),
        ("SEED: 1\n---\nSEED: 2", "--config_file", ["YAML", "line 2"]),
        ("SEED: !!python/object:os.system 1", "--config_file", ["YAML", "line 1, column 7"]),
        ("SOLVER:\n  STEPS: &a [*a]", "--config_file", ["YAML", "line 2"]),
        ("MODEL: &a\n  MODEL: *a", "--config_file", ["YAML", "line 1, column 8"]),
        ("SEED: *x", "--config_file", ["YAML", "line 1, column 7"]),
        ("SEED: {[1]: 2}", "--config_file", ["YAML", "line 1"]),
        ("- SEED", "--config_file", ["['SEED']", "SEED: 0"]),
        ("SEED", "--config_file", ["'SEED'"]),
        ("SEED: 2024-13-45", "SEED", ["line 1", "quote it"]),
        ("SEED: " + "9" * 6000, "SEED", ["line 1", "quote it"]),
        ("SEED: 1\nMODEL: {}\nSEED: 2", "SEED", ["once", "line 3", "line 1"]),
        ("SOLVER:\n  GAMMA: 1\n  GAMMA: 1\n", "SOLVER.GAMMA", ["once", "line 3", "line 2"]),
        ("SOLVER: {GAMMA: 1, GAMMA: 1}", "SOLVER.GAMMA", ["once", "line 1"]),
        ("SOLVER: {GAMMA: 1}\nSOLVER: {BASE_LR: 1}", "SOLVER", ["once", "line 2", "line 1"]),
        ("SOLVER: {GAMMA: 1}\nSOLVER.GAMMA: 1", "SOLVER.GAMMA", ["once", "line 2", "line 1"]),
        ("SOLVER:\n  5: 1", "--config_file", ["got 5", "line 2"]),
        ("no: 1", "--config_file", ["got no", "line 1"]),
        ("[1]: 1", "--config_file", ["list", "line 1"]),
        ("SOLVER:\n  <<: {GAMMA: 1}", "--config_file", ["<<", "line 2"]),
    ],
)
def test_a_broken_file(text, key, parts, write):
    file = write(text)
    with refused(SettingsError, key, file, *parts):
        load_config(file, [])


# ---- refused: settings that do not fit together ----


@pytest.mark.parametrize(
    ("overrides", "key", "parts"),
    [
        (["SOLVER.IMS_PER_BATCH", "66"], "SOLVER.IMS_PER_BATCH", ["NUM_INSTANCE=4", "got 66", "64 or 68"]),
        (["SOLVER.IMS_PER_BATCH", "2"], "SOLVER.IMS_PER_BATCH", ["NUM_INSTANCE=4", "got 2", "use 8"]),
        (["SOLVER.IMS_PER_BATCH", "6"], "SOLVER.IMS_PER_BATCH", ["got 6", "use 8"]),
        (["SOLVER.IMS_PER_BATCH", "4"], "SOLVER.IMS_PER_BATCH", ["2 identities", "NUM_INSTANCE=4", "got 4", "use 8"]),
        (["DATALOADER.NUM_INSTANCE", "1"], "DATALOADER.NUM_INSTANCE", ["at least 2", "got 1", "use 4"]),
        (
            ["SOLVER.PRECISION", "fp16", "MODEL.DEVICE", "cpu"],
            "SOLVER.PRECISION",
            ["MODEL.DEVICE", "cpu", "got fp16", "use fp32"],
        ),
        (
            ["MODEL.IF_WITH_CENTER", "yes"],
            "MODEL.METRIC_LOSS_TYPE",
            ["MODEL.IF_WITH_CENTER", "got triplet", "use triplet_center"],
        ),
        (
            ["MODEL.METRIC_LOSS_TYPE", "center"],
            "MODEL.METRIC_LOSS_TYPE",
            ["got center", "use triplet,", "MODEL.IF_WITH_CENTER yes"],
        ),
        (
            ["MODEL.METRIC_LOSS_TYPE", "triplet_center", "DATALOADER.SAMPLER", "triplet"],
            "MODEL.METRIC_LOSS_TYPE",
            ["got triplet_center", "MODEL.IF_WITH_CENTER yes"],
        ),
    ],
)
def test_settings_that_do_not_fit_together(overrides, key, parts):
    assert_refused(None, overrides, key, *parts)


@pytest.mark.parametrize(
    "overrides",
    [
        ["DATALOADER.SAMPLER", "softmax", "SOLVER.IMS_PER_BATCH", "66"],
        ["DATALOADER.SAMPLER", "softmax", "MODEL.METRIC_LOSS_TYPE", "center"],  # there it does not matter
        ["MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=center", "DATALOADER.NUM_INSTANCE=1"],
        ["MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=center", "SOLVER.IMS_PER_BATCH=4"],
        ["MODEL.IF_WITH_CENTER=yes", "MODEL.METRIC_LOSS_TYPE=triplet_center", "DATALOADER.SAMPLER=softmax"],
        ["SOLVER.PRECISION", "fp16"],
        ["SOLVER.STEPS", "40,700"],
        ["MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_PATH", "x.pt"],
        ["MODEL.PRETRAIN_CHOICE", "('self')", "TEST.WEIGHT", "('x.pth')"],
    ],
)
def test_settings_that_do_fit_together(overrides, caplog):
    load_config(None, overrides)
    assert caplog.records == []


# ---- ranks ----


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
def test_ranks_that_divide_the_identities(num_ranks):
    validate_training(load_config(None, []), num_ranks)


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "parts"),
    [
        ([], 3, ["NUM_INSTANCE=4", "16 on 3 ranks", "60 or 72"]),
        ([], 3, ["1, 2, 4, 8, 16 ranks"]),
        ([], 32, ["IMS_PER_BATCH 128,"]),
        (["DATALOADER.SAMPLER", "softmax"], 3, ["IMS_PER_BATCH=64", "63 or 66", "16, 32, 64 ranks"]),
        (
            ["DATALOADER.SAMPLER", "softmax", "SOLVER.IMS_PER_BATCH", "2"],
            3,
            ["2 on 3 ranks", "IMS_PER_BATCH 3,"],
        ),
    ],
)
def test_ranks_that_cannot_share_the_batch(overrides, num_ranks, parts):
    cfg = load_config(None, overrides)
    with refused(SettingsError, "SOLVER.IMS_PER_BATCH", *parts):
        validate_training(cfg, num_ranks)


@pytest.mark.parametrize(
    ("num_nodes", "ranks_per_node", "fitting"), [(1, 1, 1), (4, 4, 4), (3, 1, 2), (5, 2, 4), (4, 8, 2), (9, 16, 1)]
)
def test_the_most_nodes_that_can_share_a_batch_of_16_people(num_nodes, ranks_per_node, fitting):
    assert fitting_nodes(load_config(None, []), num_nodes, ranks_per_node) == fitting


def test_batch_not_divisible_by_ranks_of_one_node_is_rejected():
    with refused(SettingsError, "SOLVER.IMS_PER_BATCH", "16 on 3 ranks"):
        fitting_nodes(load_config(None, []), 4, 3)


@given(st.integers(2, 40), st.integers(2, 6), st.integers(1, 40))
def test_the_batch_sizes_and_rank_counts_of_the_message_would_do(pids, images, num_ranks):
    def cfg_of(batch):
        return load_config(None, [f"SOLVER.IMS_PER_BATCH={batch}", f"DATALOADER.NUM_INSTANCE={images}"])

    cfg = cfg_of(pids * images)
    if pids % num_ranks == 0:
        validate_training(cfg, num_ranks)
        return
    with pytest.raises(SettingsError) as caught:
        validate_training(cfg, num_ranks)
    batches, _, ranks = str(caught.value).partition("IMS_PER_BATCH ")[2].partition(", or one of ")
    for batch in re.findall(r"\d+", batches):
        validate_training(cfg_of(batch), num_ranks)
    for fitting in re.findall(r"\d+", ranks):
        validate_training(cfg, int(fitting))


# ---- which losses ----


@pytest.mark.parametrize(
    ("with_center", "sampler", "metric_loss", "identity", "triplet", "center", "epsilon"),
    [
        ("no", "softmax", "triplet", True, False, False, 0.0),
        ("no", "softmax", "center", True, False, False, 0.0),
        ("no", "triplet", "triplet", False, True, False, 0.0),
        ("no", "softmax_triplet", "triplet", True, True, False, 0.1),
        ("yes", "softmax", "center", True, False, True, 0.1),
        ("yes", "triplet", "center", True, False, True, 0.1),
        ("yes", "softmax_triplet", "center", True, False, True, 0.1),
        ("yes", "softmax", "triplet_center", True, True, True, 0.1),
        ("yes", "triplet", "triplet_center", True, True, True, 0.1),
        ("yes", "softmax_triplet", "triplet_center", True, True, True, 0.1),
    ],
)
def test_the_published_composition(with_center, sampler, metric_loss, identity, triplet, center, epsilon):
    overrides = [
        f"MODEL.IF_WITH_CENTER={with_center}",
        f"DATALOADER.SAMPLER={sampler}",
        "MODEL.METRIC_LOSS_TYPE",
        metric_loss,
    ]
    cfg = load_config(None, overrides)
    assert (use_identity_loss(cfg), use_triplet_loss(cfg), use_center_loss(cfg)) == (identity, triplet, center)
    assert label_smoothing(cfg) == epsilon
    assert label_smoothing(load_config(None, [*overrides, "MODEL.IF_LABELSMOOTH", "off"])) == 0.0
    smoothed = load_config(None, [*overrides, "MODEL.SMOOTH_SOFTMAX", "yes"])
    assert label_smoothing(smoothed) == (0.1 if identity else 0.0)


# ---- and back ----


def test_a_dump_is_read_back_to_the_same_tree(write):
    cfg = load_config(write(PUBLISHED), ["SOLVER.MARGIN", "None", "WANDB.TAGS", "a,no,1", "MODEL.NECK", "no"])
    text = dump(cfg)
    again = load_config(write(text, "config.yaml"), [])
    assert again == cfg
    assert dump(again) == text
    assert list(yaml.safe_load(text)) == list(cfg)
    assert load_config(write(dump(load_config(None, []))), []) == load_config(None, [])


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["no", "('a')", "None ", "~", "1", "a: b", "'"]
)


@given(TEXTS, st.floats(1e-300, 1e300), st.lists(st.integers(0, 999), unique=True), st.none() | st.floats(0, 9), TEXTS)
def test_every_dump_is_read_back(tmp_path_factory, notes, rate, steps, margin, tag):
    overrides = ["WANDB.NOTES", notes, "SOLVER.BASE_LR", str(rate), "SOLVER.STEPS", str(sorted(steps))]
    overrides += ["SOLVER.MARGIN", str(margin), "WANDB.TAGS", repr([tag or "x"])]
    try:
        cfg = load_config(None, overrides)
    except SettingsError:
        assert "None" in (notes, tag) or notes.partition("=")[0] in SETTINGS or "''" in repr([tag])
        return
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(cfg))
    assert load_config(str(path), []) == cfg


@given(st.sampled_from(sorted(SETTINGS)), TEXTS | st.from_regex(r"[-+(\['\"]*[0-9.e]+[)\]'\",0-9]*", fullmatch=True))
def test_any_argument_is_accepted_or_rejected_in_one_sentence(key, word):
    try:
        load_config(None, [f"{key}={word}"])
    except SettingsError as error:
        message, named = str(error), error.key
    else:
        return
    assert named in SETTINGS
    assert "\n" not in message
    assert re.search("; |Fix: ", message)  # what would work
    assert any(name in message for name in key.split("."))


def test_the_plain_dict_holds_plain_types_only():
    def leaves(node):
        for value in node.values():
            if isinstance(value, dict):
                assert type(value) is dict
                yield from leaves(value)
            else:
                yield value

    plain = as_plain_dict(load_config(None, []))
    assert {type(value) for value in leaves(plain)} == {int, float, str, bool, list}
    assert plain["SOLVER"]["STEPS"] == [40, 70]
    assert plain["DATASETS"]["SYNTHETIC"]["NUM_CAMERAS"] == 4
    assert math.isclose(plain["SOLVER"]["BASE_LR"], 3.5e-4)


@pytest.mark.parametrize(
    ("overrides", "key", "parts"),
    [(["INPUT.PADDING=129"], "INPUT.PADDING", ["INPUT.SIZE_TRAIN=(256, 128)", "got 129"])],
)
def test_settings_that_make_no_sense_together_are_rejected(overrides, key, parts):
    with refused(SettingsError, key, *parts):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["MODEL.PRETRAIN_CHOICE=none", "MODEL.PRETRAIN_PATH=x.pth"], ["'x.pth'", "none"]),
        (["MODEL.PRETRAIN_CHOICE=self"], ["''", "self"]),
    ],
)
def test_what_training_starts_from_matters_to_training_only(overrides, parts):
    cfg = load_config(None, overrides)
    with refused(SettingsError, "MODEL.PRETRAIN_PATH", "MODEL.PRETRAIN_CHOICE", *parts):
        validate_training(cfg, 1)


@pytest.mark.parametrize(
    ("batch", "num_ranks", "sync_bn", "parts"),
    [(1, 1, "yes", ["at least 2", "got 1", "use 64"]), (4, 4, "no", ["4 ranks", "got 4", "use 8", "SYNC_BN yes"])],
)
def test_batchnorm_needs_two_images(batch, num_ranks, sync_bn, parts):
    options = ["DATALOADER.SAMPLER=softmax", f"SOLVER.IMS_PER_BATCH={batch}", f"SOLVER.SYNC_BN={sync_bn}"]
    cfg = load_config(None, options)
    with refused(SettingsError, "SOLVER.IMS_PER_BATCH", *parts):
        validate_training(cfg, num_ranks)
    validate_training(load_config(None, [*options, "SOLVER.IMS_PER_BATCH=8"]), num_ranks)
