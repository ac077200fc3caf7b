"""Benchmarks by their names, in each of the folders that may hold them.

Also covers reid.config.benchmark_names, reid.data.benchmarks.sources.
"""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refused

from reid.config.benchmark_names import DEFAULTS, NAMES, VEHICLEID_TESTS, BenchmarkOptions
from reid.config.load import load_config
from reid.config.rules import benchmark_options
from reid.data.benchmarks.catalogue import BENCHMARKS, differences, load_benchmark, prepare_benchmark
from reid.data.benchmarks.market_layout import MARKET_FOLDERS, VERI_FOLDERS
from reid.data.benchmarks.sources import SOURCES, Count, documented
from reid.data.benchmarks.splits import Split, make_split
from reid.errors import DataError, SettingsError

IMAGES = {"train": ["1_c1.jpg", "2_c1.jpg"], "query": ["3_c1.jpg"], "gallery": ["3_c2.jpg", "0_c1.jpg"]}


def write(root: Path, folders=MARKET_FOLDERS) -> Path:
    for split, folder in folders.items():
        (root / folder).mkdir(parents=True)
        for name in IMAGES[split]:
            (root / folder / name).touch()
    return root


def split_of(num_pids: int, num_images: int) -> Split:
    return make_split((Path(f"{number}.jpg"), number % num_pids, 0) for number in range(num_images))


def test_every_name_has_a_reader_and_a_source():
    assert set(NAMES) == BENCHMARKS.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", ["market1501", "dukemtmc", "occluded_duke", "veri", "synthetic"])
def test_benchmark_is_located_in_each_of_its_folders(tmp_path, name):
    for number, home in enumerate(SOURCES[name].homes):
        root = write(tmp_path / str(number) / home, VERI_FOLDERS if name == "veri" else MARKET_FOLDERS)
        benchmark = load_benchmark(name, tmp_path / str(number))
        assert (benchmark.name, benchmark.root) == (name, root)
        assert benchmark.gallery.pids.tolist() == [0, 3]


def test_an_unknown_name(tmp_path):
    with refused(SettingsError, "DATASETS.NAMES", "market1501, dukemtmc, ", "'market'"):
        load_benchmark("market", tmp_path)


def test_a_table_by_its_path(tmp_path):
    table = tmp_path / "mine.csv"
    rows = ["a.jpg,1,0,train", "b.jpg,2,0,train", "c.jpg,3,0,query", "d.jpg,3,1,gallery"]
    table.write_text("\n".join(["path,pid,camid,split", *rows]))
    for row in rows:
        (tmp_path / row.split(",")[0]).touch()
    assert load_benchmark(str(table), Path("nowhere")).num_train_pids == 2
    assert load_benchmark("mine.csv", tmp_path, parts=["test"]).num_train_pids == 0
    with refused(DataError, "DATASETS.NAMES", "yours.parquet"):
        load_benchmark("yours.parquet", tmp_path)


def test_there_is_nothing_to_prepare_but_for_cuhk03(tmp_path):
    for name in NAMES:
        if name != "cuhk03":
            prepare_benchmark(name, tmp_path)
    with refused(DataError, "DATASETS.ROOT_DIR", "cuhk03"):
        prepare_benchmark("cuhk03", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- documented numbers ----


def test_incomplete_benchmark_is_reported_in_one_warning(tmp_path, caplog):
    root = write(tmp_path / "market1501")
    with caplog.at_level(logging.WARNING, logger="reid"):
        load_benchmark("market1501", tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (message,) = caplog.messages
    assert f"market1501 in {root} is not as documented" in message
    assert "train has 2 of 12,936 images and 2 of 751 identities; query has 1 of 3,368 images" in message
    assert "gallery has 2 of 15,913 images and 2 of 751 identities" in message
    assert "reid data check market1501" in message


def test_only_what_was_read_is_compared(tmp_path, caplog):
    write(tmp_path / "market1501")
    load_benchmark("market1501", tmp_path, parts=["test"])
    assert "train" not in caplog.text
    assert "query has 1 of 3,368" in caplog.text


def test_what_has_no_documented_numbers_is_not_compared(tmp_path, caplog):
    write(tmp_path / "synthetic")
    load_benchmark("synthetic", tmp_path)
    assert not caplog.records


def test_complete_benchmark_passes_and_missing_image_is_counted(tmp_path):
    benchmark = load_benchmark("market1501", write(tmp_path / "market1501").parent)
    complete = {"train": split_of(751, 12936), "query": split_of(750, 3368), "gallery": split_of(751, 15913)}
    assert differences(replace(benchmark, **complete), DEFAULTS) == []
    lacking = replace(benchmark, **{**complete, "train": split_of(751, 12935)})
    assert differences(lacking, DEFAULTS) == ["train has 12,935 of 12,936 images and 751 of 751 identities"]
    lacking = replace(benchmark, **{**complete, "train": split_of(750, 12936)})
    assert differences(lacking, DEFAULTS) == ["train has 12,936 of 12,936 images and 750 of 751 identities"]


def test_documented_numbers_follow_the_form():
    def counts(name, **options):
        return documented(name, BenchmarkOptions(**options))

    assert counts("msmt17")["train"] == Count(1041, 30248)
    assert counts("msmt17", msmt17_train="train+val")["train"] == Count(1041, 32621)
    assert counts("cuhk03") == {"train": Count(767, 7365), "query": Count(700, 1400), "gallery": Count(700, 5332)}
    labeled = counts("cuhk03", cuhk03_boxes="labeled")
    assert (labeled["train"], labeled["gallery"]) == (Count(767, 7368), Count(700, 5328))
    assert counts("cuhk03", cuhk03_protocol="classic")["train"] == Count(1367, None)
    assert "gallery" not in counts("market1501", market1501_distractors=True)
    assert counts("vehicleid")["query"] == Count(800, 5693)
    for size in VEHICLEID_TESTS:
        assert counts("vehicleid", vehicleid_test=size)["gallery"] == Count(size, size)
    assert counts("some_table") == {}


# ---- settings ----


def test_options_are_the_settings():
    assert benchmark_options(load_config(None, [])) == DEFAULTS
    given = {
        "MARKET1501.DISTRACTORS": "yes",
        "MSMT17.TRAIN": "train+val",
        "CUHK03.PROTOCOL": "classic",
        "CUHK03.BOXES": "labeled",
        "CUHK03.SPLIT": "19",
        "VEHICLEID.TEST": "13164",
    }
    options = benchmark_options(load_config(None, [f"DATASETS.{key}={value}" for key, value in given.items()]))
    assert options == BenchmarkOptions(
        market1501_distractors=True,
        msmt17_train="train+val",
        cuhk03_protocol="classic",
        cuhk03_boxes="labeled",
        cuhk03_split=19,
        vehicleid_test=13164,
    )
