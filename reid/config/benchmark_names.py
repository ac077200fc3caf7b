"""What a benchmark may be called and asked for; plain values, imported before numpy and torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

NAMES = ("market1501", "dukemtmc", "msmt17", "cuhk03", "veri", "occluded_duke", "vehicleid", "synthetic")
TABLE_SUFFIXES = (".csv", ".parquet")
VEHICLEID_TESTS = (800, 1600, 2400, 3200, 6000, 13164)  # vehicles in its test lists
NUM_CLASSIC_SPLITS = 20  # of CUHK03

Part = Literal["train", "test"]  # test is query and gallery
PARTS: tuple[Part, ...] = ("train", "test")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Which of its published forms a benchmark is read in; each field is a setting of DATASETS.

    Attributes:
        market1501_distractors: whether the 500,000 distractors join the gallery of Market-1501.
        msmt17_train: whether MSMT17's validation images are trained on too.
        cuhk03_protocol: new, 767 identities to train on; or classic, 1,367 in 20 splits.
        cuhk03_boxes: boxes by a pedestrian detector or by hand.
        cuhk03_split: which of the classic splits, 0..19.
        vehicleid_test: vehicles in VehicleID's test list.
    """

    market1501_distractors: bool = False
    msmt17_train: Literal["train", "train+val"] = "train"
    cuhk03_protocol: Literal["new", "classic"] = "new"
    cuhk03_boxes: Literal["detected", "labeled"] = "detected"
    cuhk03_split: int = 0
    vehicleid_test: int = 800


DEFAULTS = BenchmarkOptions()


def is_table(name: str) -> bool:
    """Whether a benchmark's name is the path of a table of images."""
    return PurePath(name).suffix.lower() in TABLE_SUFFIXES
