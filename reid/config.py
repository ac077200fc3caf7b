"""The yacs tree: names, defaults, units, checks; old spellings accepted; frozen."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import reduce
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from reid.checks import (
    Check,
    Given,
    Refused,
    as_list,
    example,
    flag,
    increasing,
    integer,
    nearest,
    one_of,
    optional,
    read_file,
    read_overrides,
    real,
    sequence,
    shown,
    text,
)
from reid.combinations import check_combinations
from reid.data.names import NUM_CLASSIC_SPLITS
from reid.data_settings import benchmarks, benchmarks_or_none, vehicleid_test
from reid.errors import SettingsError, UnknownKeyError

_OPTIMIZERS = one_of("Adam", "AdamW", "SGD", "NAdam", "RAdam", "RMSprop", "Adagrad")
_SIZE = sequence(integer(8), "height and width, two whole numbers >= 8", length=2)
_MEAN = sequence(real(), "three numbers (red, green, blue)", length=3)
_STD = sequence(real(above=0), "three numbers > 0 (red, green, blue)", length=3)
_EPOCHS = increasing(sequence(integer(0), "increasing whole numbers >= 0"))
_RATES = sequence(real(above=0, below=1), "numbers between 0 and 1, as [0.0001,0.001,0.01]")
_NO_NAME = "/\\#?%:"  # which W&B takes in no name
_TAGS = as_list(sequence(text(shortest=1, longest=64), "a list of texts of 1 to 64 characters"))

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_SENETS = ("se_resnet50", "se_resnet101", "se_resnet152", "se_resnext50", "se_resnext101", "senet154")
_IBN_RESNETS = ("resnet50_ibn_a", "resnet101_ibn_a")

# Every setting once: full key, default, check. The defaults are the published recipe (configs/softmax_triplet.yml).
SETTINGS: dict[str, tuple[Any, Check]] = {
    "SEED": (0, integer(0, 2**32 - 1)),  # where all of the run's random numbers come from
    # the run's folder; empty: runs/ and the name of the configuration file, or runs/default without one
    "OUTPUT_DIR": ("", text()),
    # ---- MODEL ----
    # the backbone: one of reid-strong-baseline's, resnet101_ibn_a, or any that timm has, as timm/vit_small_patch16_224
    "MODEL.NAME": ("resnet50", one_of(*_RESNETS, *_SENETS, *_IBN_RESNETS, or_prefix="timm/")),
    "MODEL.DEVICE": ("auto", one_of("auto", "cuda", "cpu")),  # auto: cuda where there is a GPU, else cpu
    # stride of the last residual stage; 1 doubles the height and width of its map (16 x 8 for 256 x 128 images). Of
    # timm/NAME: 1 is timm's output_stride 16 where the model has that, and nothing where it has not, which is logged
    "MODEL.LAST_STRIDE": (1, integer(1, 2)),
    # The file of weights to start from. imagenet can do without one; where there is none at a path that ends in the
    # name of the backbone's own file, as in reid-strong-baseline's YAML files, this machine's own copy is taken.
    "MODEL.PRETRAIN_PATH": ("", text()),
    # imagenet: the backbone only; self: a whole model of the same identities, ours or reid-strong-baseline's, whose
    # NAME_model_N.pth goes on behind epoch N with a new optimiser; finetune: a whole model but for its classifier and
    # centers, for other identities; none: random weights. A run's own checkpoints come before all of them.
    "MODEL.PRETRAIN_CHOICE": ("imagenet", one_of("imagenet", "self", "finetune", "none")),
    # bnneck: a BatchNorm between the feature that the metric losses see and the classifier
    "MODEL.NECK": ("bnneck", one_of("bnneck", "no")),
    # ReLU after the first BatchNorm of a plain ResNet (resnet18 to resnet152); reid-strong-baseline's published weights
    # were trained without it. The other backbones always have their own, so there it is yes, and no is warned of.
    "MODEL.STEM_RELU": (False, flag),
    # adds the center loss, and then DATALOADER.SAMPLER chooses the batches only, no longer the losses
    "MODEL.IF_WITH_CENTER": (False, flag),
    # the backbone's BatchNorm layers keep the statistics, scale and shift that they start with
    "MODEL.FREEZE_BN": (False, flag),
    "MODEL.COMPILE": (False, flag),  # compile the training step's model by torch.compile; the first step takes a minute
    # images and weights with the channels innermost, which convolutions on GPUs are faster with; auto: there only
    "MODEL.CHANNELS_LAST": ("auto", one_of("auto", "yes", "no")),
    # triplet without a center loss; center or triplet_center with one
    "MODEL.METRIC_LOSS_TYPE": ("triplet", one_of("triplet", "center", "triplet_center")),
    "MODEL.IF_LABELSMOOTH": (True, flag),  # label smoothing (epsilon 0.1) of the identity loss
    # label smoothing also for SAMPLER softmax without center loss, where the published code silently leaves it out
    "MODEL.SMOOTH_SOFTMAX": (False, flag),
    # ---- INPUT ----
    "INPUT.SIZE_TRAIN": ((256, 128), _SIZE),  # pixels of a training image: height, width
    "INPUT.SIZE_TEST": ((256, 128), _SIZE),  # pixels of a test image: height, width
    "INPUT.PROB": (0.5, real(minimum=0, maximum=1)),  # probability of a horizontal flip
    "INPUT.RE_PROB": (0.5, real(minimum=0, maximum=1)),  # probability of random erasing
    # subtracted from pixels in 0..1; also what random erasing writes, after normalisation as published. None: what the
    # backbone's pretrained weights want, and so it is for a MODEL.NAME timm/NAME where it is not given
    "INPUT.PIXEL_MEAN": ((0.485, 0.456, 0.406), optional(_MEAN)),
    "INPUT.PIXEL_STD": ((0.229, 0.224, 0.225), optional(_STD)),  # pixels in 0..1 are divided by it; None: as above
    "INPUT.PADDING": (10, integer(0)),  # pixels of black border on each side before the random crop
    # ---- DATASETS ----
    # the benchmarks to train on, as one training set, and to test on, unless TEST.DATASETS names others; each a name or
    # the path of a table (path, pid, camid, split)
    "DATASETS.NAMES": (("market1501",), benchmarks),
    "DATASETS.ROOT_DIR": ("./data", text()),  # the folder that holds the benchmarks' folders
    "DATASETS.CACHE_DIR": ("./cache", text()),  # the folder for images that are decoded and resized once
    # all training images in the GPU's memory, so that an epoch needs no loading; auto: where they take a fifth of it at
    # most; on a CPU only with on
    "DATASETS.DEVICE_CACHE": ("auto", one_of("auto", "on", "off")),
    # add the 500,000 distractors to the gallery of Market-1501
    "DATASETS.MARKET1501.DISTRACTORS": (False, flag),
    # train+val: train on MSMT17's validation images too, as most publications do; reid-strong-baseline does not
    "DATASETS.MSMT17.TRAIN": ("train", one_of("train", "train+val")),
    # new: 767 people to train, scored as Market-1501; classic: 1,367 people, one gallery image of each drawn many times
    "DATASETS.CUHK03.PROTOCOL": ("new", one_of("new", "classic")),
    "DATASETS.CUHK03.BOXES": ("detected", one_of("detected", "labeled")),  # boxes by a detector or by hand
    "DATASETS.CUHK03.SPLIT": (0, integer(0, NUM_CLASSIC_SPLITS - 1)),  # which of the classic splits
    "DATASETS.VEHICLEID.TEST": (800, vehicleid_test),  # vehicles in the test list of VehicleID
    # a folder on each node's own disk, to which decoded images are copied while a run lasts; with names of environment
    # variables ($SLURM_TMPDIR), and without a copy where they are not set; empty: no copies
    "DATASETS.NODE_LOCAL_DIR": ("", text()),
    # people in the training set of the generated benchmark (NAMES synthetic)
    "DATASETS.SYNTHETIC.NUM_TRAIN_PIDS": (64, integer(2)),
    "DATASETS.SYNTHETIC.NUM_TEST_PIDS": (48, integer(2)),  # people in its query and gallery
    "DATASETS.SYNTHETIC.IMAGES_PER_PID": (12, integer(4)),  # images of each of its people
    "DATASETS.SYNTHETIC.NUM_CAMERAS": (4, integer(2)),  # its cameras; a query is looked for on the others, hence two
    # where its random numbers come from; not SEED, so that every run of a study sees the same people
    "DATASETS.SYNTHETIC.SEED": (0, integer(0, 2**32 - 1)),
    # ---- DATALOADER ----
    "DATALOADER.NUM_WORKERS": (2, integer(0)),  # 0: load in line; more: one thread loads ahead
    # batches and losses: softmax (any images, identity loss), triplet (P x K, triplet loss), softmax_triplet (both)
    "DATALOADER.SAMPLER": ("softmax_triplet", one_of("softmax", "triplet", "softmax_triplet")),
    "DATALOADER.NUM_INSTANCE": (4, integer(1)),  # K, the images per identity in a P x K batch
    # ---- SOLVER ----
    "SOLVER.OPTIMIZER_NAME": ("Adam", _OPTIMIZERS),  # a class of torch.optim
    # the whole step of the optimiser in one kernel; auto: where torch has one, for Adam, AdamW and (but for fp16) SGD
    "SOLVER.FUSED": ("auto", one_of("auto", "yes", "no")),
    "SOLVER.MAX_EPOCHS": (120, integer(1)),  # epochs to train
    "SOLVER.BASE_LR": (3.5e-4, real(above=0)),  # learning rate after warm-up
    "SOLVER.BIAS_LR_FACTOR": (1.0, real(minimum=0)),  # learning rate of biases, in units of BASE_LR
    "SOLVER.MOMENTUM": (0.9, real(minimum=0, maximum=1)),  # SGD only
    "SOLVER.MARGIN": (0.3, optional(real(minimum=0))),  # triplet margin in Euclidean distance; None: soft margin
    "SOLVER.CENTER_LR": (0.5, real(above=0)),  # learning rate of the centers; constant
    "SOLVER.CENTER_LOSS_WEIGHT": (0.0005, real(above=0)),  # factor of the center loss in the sum of losses
    "SOLVER.WEIGHT_DECAY": (5e-4, real(minimum=0)),  # weight decay of all but biases
    "SOLVER.WEIGHT_DECAY_BIAS": (5e-4, real(minimum=0)),  # weight decay of biases
    "SOLVER.GAMMA": (0.1, real(above=0)),  # factor of the learning rate at each of STEPS
    "SOLVER.STEPS": ((40, 70), _EPOCHS),  # epochs after which the learning rate falls
    "SOLVER.WARMUP_FACTOR": (0.01, real(minimum=0, maximum=1)),  # where warm-up starts, in units of BASE_LR
    "SOLVER.WARMUP_ITERS": (10, integer(0)),  # length of the warm-up in EPOCHS, despite the name; 0: none
    # linear: rises to BASE_LR; constant: stays at WARMUP_FACTOR until warm-up ends
    "SOLVER.WARMUP_METHOD": ("linear", one_of("linear", "constant")),
    "SOLVER.CHECKPOINT_PERIOD": (1, integer(1)),  # epochs between checkpoints
    # minutes between checkpoints within an epoch; besides those by the epoch; 0: none
    "SOLVER.CHECKPOINT_EVERY_MINUTES": (10.0, real(minimum=0)),
    "SOLVER.LOG_PERIOD": (20, integer(1)),  # iterations between log lines
    "SOLVER.EVAL_PERIOD": (40, integer(1)),  # epochs between evaluations; the last epoch is always evaluated
    "SOLVER.IMS_PER_BATCH": (64, integer(1)),  # images in the GLOBAL batch, P x K over all ranks
    # Micro-batches that the global batch goes through the model in, for batches that do not fit into memory; costs a
    # second forward pass. The losses are still those of the whole global batch, exactly. BatchNorm normalises over one
    # micro-batch of all ranks: IMS_PER_BATCH / ACCUMULATE images, every ACCUMULATE-th of the batch.
    "SOLVER.ACCUMULATE": (1, integer(1)),
    "SOLVER.CLIP_GRAD_NORM": (0.0, real(minimum=0)),  # largest 2-norm of all gradients together; 0: not clipped
    # fsdp: every rank keeps a share of weights, gradients and optimiser state only (FSDP2); needs GPUs
    "SOLVER.SHARDING": ("none", one_of("none", "fsdp")),
    "SOLVER.PRECISION": ("fp32", one_of("fp32", "fp64", "bf16", "fp16")),  # what the model computes in
    # BatchNorm statistics over the global batch; without it, several ranks train another model than one
    "SOLVER.SYNC_BN": (True, flag),
    # minutes without a step (or a batch of an evaluation) after which all ranks end, and which one hangs is said
    "SOLVER.TIMEOUT_MINUTES": (30.0, real(minimum=0.01, maximum=10080)),
    # ---- TEST ----
    # the benchmarks to test on, whose first chooses the best checkpoint; empty: DATASETS.NAMES
    "TEST.DATASETS": ((), benchmarks_or_none),
    "TEST.IMS_PER_BATCH": (128, integer(1)),  # images in an evaluation batch
    "TEST.RE_RANKING": (False, flag),  # k-reciprocal re-ranking, in training's evaluations too
    "TEST.RE_RANKING_K1": (20, integer(1)),  # nearest images that must be mutual
    "TEST.RE_RANKING_K2": (6, integer(1)),  # nearest images whose weights are averaged, the image itself among them
    "TEST.RE_RANKING_LAMBDA": (0.3, real(minimum=0, maximum=1)),  # share of the original distance
    "TEST.WEIGHT": ("", text()),  # the checkpoint to evaluate
    "TEST.NECK_FEAT": ("after", one_of("after", "before")),  # compare features after the BNNeck or before it
    "TEST.FEAT_NORM": (True, flag),  # L2-normalise features, so that they compare by cosine
    "TEST.FLIP": (False, flag),  # the embedding is the mean of those of the image and of its mirror image
    # false positive rates at which the true positive rate over all pairs is reported; empty: none
    "TEST.FPR": ((), _RATES),
    # CMC over one random image of each identity, ten times for each query; auto: as the benchmark says
    "TEST.SINGLE_GALLERY_SHOT": ("auto", one_of("auto", "yes", "no")),
    # ---- LOG ----
    # write train/* and val/* to TensorBoard files in OUTPUT_DIR/tensorboard too; needs: uv sync --extra tensorboard
    "LOG.TENSORBOARD": (False, flag),
    # ---- WANDB ----
    "WANDB.ENABLE": (True, flag),  # record the run with Weights & Biases
    "WANDB.PROJECT": ("reid-strong-baseline", text(longest=128, without=_NO_NAME)),  # the W&B project
    "WANDB.ENTITY": ("", text()),  # the W&B user or team; empty: the key's own
    "WANDB.NAME": ("", text()),  # the run's name; empty: W&B invents one
    "WANDB.TAGS": ([], _TAGS),  # the run's tags
    "WANDB.SYNC_TENSORBOARD": (False, flag),  # let W&B copy TensorBoard files; needs LOG.TENSORBOARD
    "WANDB.SAVE_CODE": (False, flag),  # let W&B copy the code
    # empty: the environment decides, offline where there is no key
    "WANDB.MODE": ("", one_of("", "online", "offline", "disabled")),
    "WANDB.GROUP": ("", text()),  # runs that W&B shows together
    "WANDB.JOB_TYPE": ("train", text()),  # the kind of run within its group; train: eval where one evaluates
    "WANDB.NOTES": ("", text()),  # free text
    # draw pictures (a training batch, ranked queries, CMC curves) into OUTPUT_DIR/pictures, for W&B where it is enabled
    "WANDB.LOG_IMAGES": (True, flag),
    "WANDB.NUM_QUERIES": (8, integer(0)),  # random queries, and as many of the worst, to draw of each test set
    # the W&B run to go on with; empty: the one that OUTPUT_DIR has begun, or a new one
    "WANDB.RUN_ID": ("", text(longest=64, without=_NO_NAME)),
    # allow: go on with the run where there is one; must: refuse to begin another; never: every start is a new run
    "WANDB.RESUME": ("allow", one_of("allow", "must", "never")),
    # checkpoints to keep at W&B as artifacts: every new best one (weights), and the last one of a process (all there is
    # to go on from, three times as large)
    "WANDB.LOG_CHECKPOINTS": ("best", one_of("none", "best", "last", "best+last")),
    "WANDB.INIT_TIMEOUT": (20.0, real(minimum=0.1, maximum=3600)),  # seconds to wait for W&B's answer at the start
    "WANDB.FINISH_TIMEOUT": (60.0, real(minimum=0.1, maximum=3600)),  # seconds to wait for the last upload
    # Where W&B cannot be reached: offline records on the disk; disable does without; raise ends the run, at once where
    # it is about to begin, in the end (when all else is saved) where something could not be recorded or sent.
    "WANDB.ON_FAILURE": ("offline", one_of("offline", "disable", "raise")),
}
_SECTIONS = {key[:dot] for key in SETTINGS for dot, letter in enumerate(key) if letter == "."}

_UNREAD = "reid-strong-baseline itself never reads it"
# Keys of reid-strong-baseline's files that do nothing here, and why.
_NO_EFFECT = {
    "MODEL.DEVICE_ID": "CUDA_VISIBLE_DEVICES or torchrun chooses the GPUs",
    "SOLVER.CLUSTER_MARGIN": _UNREAD,
    "SOLVER.RANGE_K": _UNREAD,
    "SOLVER.RANGE_MARGIN": _UNREAD,
    "SOLVER.RANGE_ALPHA": _UNREAD,
    "SOLVER.RANGE_BETA": _UNREAD,
    "SOLVER.RANGE_LOSS_WEIGHT": _UNREAD,
}

log = logging.getLogger("reid.config")


def load_config(
    config_file: str | None, overrides: list[str], *, recorded: Iterable[Given] = (), subfolder: str = ""
) -> CfgNode:
    """The frozen settings: defaults, then the file, then the command line (KEY VALUE or KEY=VALUE; the last wins).

    Args:
        config_file: YAML.
        overrides: the command line's.
        recorded: what a checkpoint says that it was made with, in the place of a file.
        subfolder: of OUTPUT_DIR, which becomes OUTPUT_DIR; empty: none.
    """
    values = {key: default for key, (default, _) in SETTINGS.items()}
    places: dict[str, str] = {}  # where each key was given
    unused = {}
    from_file = read_file(config_file, _SECTIONS) if config_file else ()
    for given in chain(recorded, from_file, read_overrides(overrides, SETTINGS)):
        if given.key in _NO_EFFECT:
            unused[given.key] = given.where
        else:
            values[given.key] = _checked(given)
            places[given.key] = given.where
    _settle_backbone(values, places)
    values["OUTPUT_DIR"] = values["OUTPUT_DIR"] or f"runs/{Path(config_file).stem if config_file else 'default'}"
    values["OUTPUT_DIR"] += f"/{subfolder}" if subfolder else ""
    cfg = _tree(values)
    check_combinations(cfg)
    for key, where in unused.items():
        log.warning("%s has no effect (%s): %s", key, where, _NO_EFFECT[key])
    return cfg


def dump(cfg: CfgNode) -> str:
    """The settings as YAML that load_config reads back to the same tree."""
    return str(yaml.safe_dump(as_plain_dict(cfg), sort_keys=False, width=120))


def as_plain_dict(cfg: CfgNode) -> dict[str, Any]:
    """The settings as nested dicts, lists, texts and numbers."""
    return {
        name: as_plain_dict(value)
        if isinstance(value, CfgNode)
        else list(value)
        if isinstance(value, tuple | list)
        else value
        for name, value in cfg.items()
    }


def by_full_key(cfg: CfgNode) -> dict[str, Any]:
    """The settings without nesting: SOLVER.BASE_LR -> its value."""
    return {key: reduce(getitem, key.split("."), cfg) for key in SETTINGS}


# ---- checks of one setting ----


def _checked(given: Given) -> Any:
    key, value, where = given
    if key in _SECTIONS:
        first = next(known for known in SETTINGS if known.startswith(f"{key}."))
        raise SettingsError(
            f"{key} is a section and takes no value itself, got {shown(value)} {where}; "
            f"set one of its keys, as {first}",
            key=key,
        )
    if key not in SETTINGS:
        meant = " or ".join(nearest(key, [*SETTINGS, *_SECTIONS]))
        remedy = f"did you mean {meant}?" if meant else "the keys are in reid/config.py"
        raise UnknownKeyError(f"every setting must be one of the known keys, got {key} {where}; {remedy}", key=key)
    default, check = SETTINGS[key]
    try:
        return check(value)
    except Refused as refused:
        remedy = refused.remedy or f"use for example {example(default)}"
        raise SettingsError(f"{key} must be {refused.wanted}, got {shown(value)} {where}; {remedy}", key=key) from None


def _settle_backbone(values: dict[str, Any], places: dict[str, str]) -> None:
    """Gives the settings that not every backbone leaves open the value that they have there."""
    name = values["MODEL.NAME"]
    if name in _RESNETS:
        return
    if "MODEL.STEM_RELU" in places and not values["MODEL.STEM_RELU"]:
        log.warning(
            "MODEL.STEM_RELU no has no effect (%s): the stem of %s always has its activation",
            *(places["MODEL.STEM_RELU"], name),
        )
    values["MODEL.STEM_RELU"] = True
    if name.startswith("timm/"):
        values |= {key: None for key in ("INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD") if key not in places}


def _tree(values: dict[str, Any]) -> CfgNode:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    cfg = CfgNode(nested)
    cfg.freeze()
    return cfg
