"""Names of the benchmarks and their published forms, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

NAMES = ("market1501", "dukemtmc", "msmt17", "cuhk03", "veri", "occluded_duke", "vehicleid", "synthetic")
TABLE_SUFFIXES = (".csv", ".parquet")
VEHICLEID_TESTS = (800, 1600, 2400, 3200, 6000, 13164)  # vehicles in each test list
NUM_CLASSIC_SPLITS = 20  # of CUHK03

Part = Literal["train", "test"]  # test is query and gallery
PARTS: tuple[Part, ...] = ("train", "test")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Published forms that benchmarks are read in; each field is a setting of DATASETS.

    Attributes:
        market1501_distractors: Whether the 500,000 distractors join the gallery of Market-1501.
        msmt17_train: Images of MSMT17 to train on, with or without the validation images.
        cuhk03_protocol: "new", 767 identities to train on; or "classic", 1,367 in 20 splits.
        cuhk03_boxes: Boxes by a pedestrian detector or by hand.
        cuhk03_split: Number of the classic split, 0..19.
        vehicleid_test: Vehicles in VehicleID's test list.
    """

    market1501_distractors: bool = False
    msmt17_train: Literal["train", "train+val"] = "train"
    cuhk03_protocol: Literal["new", "classic"] = "new"
    cuhk03_boxes: Literal["detected", "labeled"] = "detected"
    cuhk03_split: int = 0
    vehicleid_test: int = 800


DEFAULTS = BenchmarkOptions()


def is_table(name: str) -> bool:
    """Return whether the name of a benchmark is the path of a table of images."""
    return PurePath(name).suffix.lower() in TABLE_SUFFIXES
