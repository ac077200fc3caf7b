"""Several training sets as one, and several test sets: by themselves and in the real program."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import SMALL, TINY, Place, names, newest, records
from refusals import refused

from reid.config.load import load_config
from reid.data.benchmarks.splits import Benchmark, Split
from reid.data.datasets import DataSets, join_training, open_data_sets
from reid.errors import SettingsError

NOTHING = Split((), np.zeros(0, np.int64), np.zeros(0, np.int64))


def benchmark_of(name: str, pids: list[int], camids: list[int]) -> Benchmark:
    paths = tuple(Path(f"{name}/{i}.jpg") for i in range(len(pids)))
    return Benchmark(name, Path(name), Split(paths, np.array(pids), np.array(camids)), NOTHING, NOTHING)


# ---- joining ----


@given(
    st.lists(
        st.integers(1, 5).flatmap(
            lambda num_pids: st.lists(st.integers(0, 3), min_size=num_pids, max_size=12).map(
                lambda camids: ([i % num_pids for i in range(len(camids))], camids)
            )
        ),
        min_size=1,
        max_size=4,
    )
)
def test_people_and_cameras_of_different_benchmarks_stay_apart(parts):
    benchmarks = [benchmark_of(str(i), *part) for i, part in enumerate(parts)]
    joined = join_training(benchmarks)
    assert joined.paths == tuple(path for benchmark in benchmarks for path in benchmark.train.paths)
    whose = [int(path.parent.name) for path in joined.paths]
    all_pids = [pid for pids, _ in parts for pid in pids]
    all_camids = [camid for _, camids in parts for camid in camids]
    for joined_ids, ids in ((joined.pids, all_pids), (joined.camids, all_camids)):
        meant = list(zip(whose, ids, strict=True))
        assert len(set(zip(joined_ids.tolist(), meant, strict=True))) == len(set(meant)) == len(set(joined_ids))
    assert sorted(set(joined.pids.tolist())) == list(range(sum(b.num_train_pids for b in benchmarks)))


def test_one_benchmark_stays_as_it_is():
    benchmark = benchmark_of("a", [0, 1, 1], [0, 4, 2])
    joined = join_training([benchmark])
    assert (joined.pids.tolist(), joined.camids.tolist()) == ([0, 1, 1], [0, 4, 2])


def test_training_fingerprint_depends_on_train_sets_and_order():
    a, b = benchmark_of("a", [0, 1], [0, 1]), benchmark_of("b", [0, 1], [0, 1])
    prints = {DataSets(train, ()).fingerprint_of_training() for train in ((a,), (b,), (a, b), (b, a))}
    assert len(prints) == 4
    assert DataSets((a,), (b,)).fingerprint_of_training() == DataSets((a,), ()).fingerprint_of_training()
    assert DataSets((), (b,)).fingerprint_of_tests() == DataSets((a,), (b,)).fingerprint_of_tests()


# ---- in the program ----


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """Return a place with the generated benchmark and another one in Market-1501's layout."""
    small = TINY.replace("resnet18", SMALL)
    place = Place(tmp_path_factory.mktemp("sets"), small)
    (place.folder / "two.yml").write_text(small.replace("NAMES: synthetic", "NAMES: [synthetic, market1501]"))
    other = ["DATASETS.ROOT_DIR=other", "DATASETS.SYNTHETIC.SEED=7", "DATASETS.SYNTHETIC.NUM_TRAIN_PIDS=5"]
    (place.folder / "data").mkdir()
    open_data_sets(
        load_config(str(place.folder / "tiny.yml"), [*other, f"DATASETS.ROOT_DIR={place.folder}/other"]), train=True
    )
    shutil.move(place.folder / "other" / "synthetic", place.folder / "data" / "market1501")
    return place


def two(place: Place, command: str, *settings: object, **options: object):
    ended = place.run(command, "--config_file", "two.yml", *settings, bare=True, **options)
    assert [rank.code for rank in ended] == [0] * len(ended), ended
    return ended[0]


@pytest.fixture(scope="module")
def trained(place) -> tuple[str, Path]:
    return two(place, "train", "OUTPUT_DIR", "two", num_ranks=2).out, place.folder / "two"


def test_training_on_two_sets_has_the_people_of_both(trained):
    output, folder = trained
    assert "13 identities, " in output
    assert len(newest(folder)["model"]["classifier.weight"]) == 8 + 5


def test_every_test_set_is_evaluated_and_listed_in_one_table(trained):
    output, folder = trained
    result = json.loads((folder / "result.json").read_text())
    assert list(result["datasets"]) == ["synthetic", "market1501"]
    assert result["mAP"] == result["datasets"]["synthetic"]["mAP"] != result["datasets"]["market1501"]["mAP"]
    assert [record["datasets"] for record in records(folder, "val")][-1] == result["datasets"]
    table = output[output.index("test set ") :].splitlines()
    assert table[0].split() == ["test", "set", "mAP", "mINP", "rank-1", "rank-5", "rank-10", "queries"]
    best = max(records(folder, "val"), key=lambda record: record["mAP"])["datasets"]
    for line, (name, scores) in zip(table[1:3], best.items(), strict=True):
        shown_name, *shown = line.split()
        percentages = [100 * scores[key] for key in ("mAP", "mINP", "rank-1", "rank-5", "rank-10")]
        assert shown_name == name
        assert [float(value) for value in shown] == pytest.approx(
            [*percentages, scores["num_valid_queries"]], abs=0.0501
        )


def test_one_process_gets_the_same(place, trained):
    two(place, "train", "OUTPUT_DIR", "two_alone")
    (first, *_), (other, *_) = (records(folder, "train") for folder in (trained[1], place.folder / "two_alone"))
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_checkpoint_can_be_evaluated_on_other_datasets(place, trained):
    folder = trained[1]
    (best,) = (folder / "checkpoints").glob("best_*.pt")
    settings = ("TEST.WEIGHT", best, "TEST.DATASETS", "market1501", "OUTPUT_DIR", "cross")
    ended = place.run("evaluate", *settings)  # the file names synthetic alone
    assert ended[0].code == 0, ended
    result = json.loads((place.folder / "cross" / "result.json").read_text())
    expected = next(r for r in records(folder, "val") if r["epoch"] == result["epoch"])["datasets"]["market1501"]
    assert {key: result[key] for key in expected} == expected
    assert "datasets" not in result
    assert not [name for name in names(place.folder / "cache") if name.startswith("market1501-train-8x")]


def test_resume_allows_other_test_sets_but_not_other_train_sets(place, trained):
    settings = ("OUTPUT_DIR", "two", "SOLVER.MAX_EPOCHS", 3)
    ended = place.run("train", *settings)
    assert ended[0].code == 1
    for keyword in ("DATASETS.NAMES", "['synthetic', 'market1501']", " ['synthetic']"):
        assert keyword in ended[0].err
    two(place, "train", *settings, "TEST.DATASETS", "market1501")
    assert "datasets" not in json.loads((trained[1] / "result.json").read_text())


def test_two_tables_with_the_same_name_are_rejected(monkeypatch):
    monkeypatch.setattr("reid.data.datasets.load_benchmark", lambda *_, **__: benchmark_of("same", [0, 1], [0, 1]))
    cfg = load_config(None, ["DATASETS.NAMES=market1501", "TEST.DATASETS=synthetic", "MODEL.PRETRAIN_CHOICE=none"])
    monkeypatch.setattr("reid.data.datasets.generate.generate", lambda *_, **__: None)
    with refused(SettingsError, "DATASETS.NAMES", "market1501 and synthetic", "same"):
        open_data_sets(cfg, train=True)
