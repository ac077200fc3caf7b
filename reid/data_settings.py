"""The settings that name benchmarks: their checks, and what they come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reid.checks import Check, Refused, distinct, integer, one_of, sequence, text
from reid.data.names import NAMES, VEHICLEID_TESTS, BenchmarkOptions, is_table

if TYPE_CHECKING:
    from yacs.config import CfgNode

_name, _path, _number = one_of(*NAMES), text(), integer(0)


def benchmark_options(cfg: CfgNode) -> BenchmarkOptions:
    """The forms that DATASETS asks for."""
    return BenchmarkOptions(
        market1501_distractors=cfg.DATASETS.MARKET1501.DISTRACTORS,
        msmt17_train=cfg.DATASETS.MSMT17.TRAIN,
        cuhk03_protocol=cfg.DATASETS.CUHK03.PROTOCOL,
        cuhk03_boxes=cfg.DATASETS.CUHK03.BOXES,
        cuhk03_split=cfg.DATASETS.CUHK03.SPLIT,
        vehicleid_test=cfg.DATASETS.VEHICLEID.TEST,
    )


def vehicleid_test(value: Any) -> int:
    """A check: the size of one of VehicleID's test lists."""
    wanted = f"one of {', '.join(map(str, VEHICLEID_TESTS))}"
    try:
        number = int(_number(value))
    except Refused as refused:
        raise Refused(wanted, refused.remedy) from None
    if number not in VEHICLEID_TESTS:
        raise Refused(wanted)
    return number


def _benchmark(value: Any) -> str:
    if isinstance(value, str) and is_table(path := str(_path(value))):
        return path
    return str(_name(value))


_WANTED = f"a list of {', '.join(NAMES)} or paths of .csv or .parquet tables"
benchmarks: Check = distinct(sequence(_benchmark, _WANTED, least=1))
benchmarks_or_none: Check = distinct(sequence(_benchmark, _WANTED))
