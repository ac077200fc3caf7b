"""Settings of the INPUT, DATASETS and DATALOADER sections."""

from __future__ import annotations

from typing import Any

from reid.config.benchmark_names import NAMES, NUM_CLASSIC_SPLITS, VEHICLEID_TESTS, is_table
from reid.config.validators import (
    Setting,
    Validator,
    distinct,
    flag,
    integer,
    one_number_of,
    one_of,
    optional,
    real,
    sequence,
    text,
)

_SIZE = sequence(integer(8), "height and width, two whole numbers >= 8", length=2)
_MEAN = sequence(real(), "three numbers (red, green, blue)", length=3)
_STD = sequence(real(above=0), "three numbers > 0 (red, green, blue)", length=3)
_PROBABILITY = real(minimum=0, maximum=1)
_name, _path = one_of(*NAMES), text()


def _to_benchmark(value: Any) -> Any:
    if isinstance(value, str) and is_table(path := _path(value)):
        return path
    return _name(value)


_benchmark = Validator(f"{_name.allowed}, or the path of a .csv or .parquet table", _to_benchmark)
_BENCHMARKS = f"a list of {', '.join(NAMES)} or paths of .csv or .parquet tables"
benchmarks = distinct(sequence(_benchmark, _BENCHMARKS, least=1))
benchmarks_or_none = distinct(sequence(_benchmark, _BENCHMARKS))

INPUT = {
    "INPUT.SIZE_TRAIN": Setting(
        default=(256, 128),
        validate=_SIZE,
        unit="pixels",
        doc="Height and width that training images are resized to. The published recipe uses 256 x 128; other sizes "
        "such as 384 x 128 cost time and memory in proportion to their area. For vehicles square images are "
        "usual.",
    ),
    "INPUT.SIZE_TEST": Setting(
        default=(256, 128),
        validate=_SIZE,
        unit="pixels",
        doc="Height and width that query and gallery images are resized to; normally equal to INPUT.SIZE_TRAIN.",
    ),
    "INPUT.PROB": Setting(
        default=0.5,
        validate=_PROBABILITY,
        doc="Probability of a horizontal flip of a training image.",
    ),
    "INPUT.RE_PROB": Setting(
        default=0.5,
        validate=_PROBABILITY,
        doc="Probability of random erasing of a training image; 0 turns it off. It gave 4.1 points of mAP on "
        "Market-1501 in the published ablation.",
    ),
    "INPUT.PIXEL_MEAN": Setting(
        default=(0.485, 0.456, 0.406),
        validate=optional(_MEAN),
        doc="Mean of each channel, subtracted from pixels in 0..1; the default is ImageNet's. Random erasing fills "
        "with the same numbers, after normalization, as in reid-strong-baseline. None: the mean of the backbone's "
        "pretrained weights, which is also the default for MODEL.NAME timm/NAME.",
    ),
    "INPUT.PIXEL_STD": Setting(
        default=(0.229, 0.224, 0.225),
        validate=optional(_STD),
        doc="Standard deviation of each channel, which pixels in 0..1 are divided by; the default is ImageNet's. "
        "None: as for INPUT.PIXEL_MEAN.",
    ),
    "INPUT.PADDING": Setting(
        default=10,
        validate=integer(0),
        unit="pixels",
        doc="Width of the black border that is added on each side of a training image before the random crop back to "
        "INPUT.SIZE_TRAIN. It must not exceed the smaller side of the image; 0 turns the crop off.",
    ),
}

DATASETS = {
    "DATASETS.NAMES": Setting(
        default=("market1501",),
        validate=benchmarks,
        doc="Benchmarks to train on, joined to one training set, and to test on unless TEST.DATASETS names others. "
        "Each is a name or the path of a table with the columns path, pid, camid and split.",
    ),
    "DATASETS.ROOT_DIR": Setting(
        default="./data",
        validate=text(),
        doc="Folder that holds the folders of the benchmarks; the known layouts are listed in docs/data.md.",
    ),
    "DATASETS.CACHE_DIR": Setting(
        default="./cache",
        validate=text(),
        doc="Folder for the image stores: every image is decoded and resized once, and read from there afterwards. A "
        "store takes height x width x 3 bytes for each image. Put it on a fast disk.",
    ),
    "DATASETS.DEVICE_CACHE": Setting(
        default="auto",
        validate=one_of("auto", "on", "off"),
        doc="Keeps all training images in the memory of each GPU, so that no images are loaded during an epoch. auto: "
        "where they take a fifth of the GPU's memory at most. On a CPU only with on.",
    ),
    "DATASETS.MARKET1501.DISTRACTORS": Setting(
        default=False,
        validate=flag,
        doc="Adds the 500,000 distractor images to the gallery of Market-1501, for evaluations at scale.",
    ),
    "DATASETS.MSMT17.TRAIN": Setting(
        default="train",
        validate=one_of("train", "train+val"),
        doc="Images of MSMT17 to train on. train+val adds the validation images, as most publications do; "
        "reid-strong-baseline uses train.",
    ),
    "DATASETS.CUHK03.PROTOCOL": Setting(
        default="new",
        validate=one_of("new", "classic"),
        doc="Protocol of CUHK03. new: 767 identities to train on, scored as Market-1501. classic: 1,367 identities in "
        "20 splits, CMC over one random gallery image of each identity.",
    ),
    "DATASETS.CUHK03.BOXES": Setting(
        default="detected",
        validate=one_of("detected", "labeled"),
        doc="Bounding boxes of CUHK03: from a pedestrian detector, or labeled by hand. Publications report both.",
    ),
    "DATASETS.CUHK03.SPLIT": Setting(
        default=0,
        validate=integer(0, NUM_CLASSIC_SPLITS - 1),
        doc="Number of the split with DATASETS.CUHK03.PROTOCOL classic. Published figures are means over all 20.",
    ),
    "DATASETS.VEHICLEID.TEST": Setting(
        default=800,
        validate=one_number_of(*VEHICLEID_TESTS),
        unit="vehicles",
        doc="Number of vehicles in the test list of VehicleID. Publications report 800 (small), 1600 (medium) and "
        "2400 (large).",
    ),
    "DATASETS.NODE_LOCAL_DIR": Setting(
        default="",
        validate=text(),
        doc="Folder on each node's own disk that image stores are copied to for as long as a run lasts. It may hold "
        "names of environment variables ($TMPDIR/images); where one of them is not set, nothing is copied. Useful "
        "where DATASETS.CACHE_DIR is on a slow network file system. Empty: no copies.",
    ),
    "DATASETS.SYNTHETIC.NUM_TRAIN_PIDS": Setting(
        default=64,
        validate=integer(2),
        doc="Identities in the training set of the generated benchmark (DATASETS.NAMES synthetic).",
    ),
    "DATASETS.SYNTHETIC.NUM_TEST_PIDS": Setting(
        default=48,
        validate=integer(2),
        doc="Identities in the query and gallery sets of the generated benchmark.",
    ),
    "DATASETS.SYNTHETIC.IMAGES_PER_PID": Setting(
        default=12,
        validate=integer(4),
        unit="images",
        doc="Mean number of images of each identity of the generated benchmark, over all cameras.",
    ),
    "DATASETS.SYNTHETIC.NUM_CAMERAS": Setting(
        default=4,
        validate=integer(2),
        doc="Cameras of the generated benchmark. At least 2, since matches of a query are images of other cameras.",
    ),
    "DATASETS.SYNTHETIC.SEED": Setting(
        default=0,
        validate=integer(0, 2**32 - 1),
        doc="Seed of the generated benchmark. It is separate from SEED, so that runs with different seeds see the "
        "same people.",
    ),
}

DATALOADER = {
    "DATALOADER.NUM_WORKERS": Setting(
        default=2,
        validate=integer(0),
        doc="Any value above 0: one thread of each rank loads the next batches while a step computes. 0: each batch is "
        "loaded between two steps. Values of older configurations, which meant processes, are accepted. The command "
        "embed decodes images in as many threads.",
    ),
    "DATALOADER.SAMPLER": Setting(
        default="softmax_triplet",
        validate=one_of("softmax", "triplet", "softmax_triplet"),
        doc="Batches and losses at once, as in reid-strong-baseline. softmax: any images, identity loss; triplet: P "
        "identities x K images, triplet loss; softmax_triplet: P x K, both losses. With MODEL.IF_WITH_CENTER yes "
        "it decides only the batches.",
    ),
    "DATALOADER.NUM_INSTANCE": Setting(
        default=4,
        validate=integer(1),
        unit="images",
        doc="K, the images of each identity in a P x K batch; P is SOLVER.IMS_PER_BATCH / K. At least 2 with a "
        "triplet loss.",
    ),
}
