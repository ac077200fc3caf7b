"""The command `check` reports the figures of healthy ranks, and problems.

Also covers reid.commands.preflight.report and reid.commands.preflight.trial.
"""

import os
import re

import pytest
from program import Place, names

from reid.commands.preflight.report import Report, _duration, _links, _node, _size
from reid.distributed.link_speed import Link
from reid.errors import WorldError, shared

# Problems that depend on the present load of this machine.
SPEED = re.compile(r"problem \d+: .*(DATALOADER\.NUM_WORKERS|GB/s)")


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


def problems(ended):
    lines = [line for line in ended.out.splitlines() if line.startswith("problem ")]
    return [line for line in lines if not SPEED.match(line)]


@pytest.fixture(scope="module")
def healthy(place):
    return place.run("check", "OUTPUT_DIR", "checked/run", "TEST.IMS_PER_BATCH", 4, num_ranks=2)


def test_healthy_ranks_have_no_problems(healthy):
    first, second = healthy
    assert problems(first) == []
    assert first.code in (0, 1)
    assert ("no problems" in first.out) == (first.code == 0)
    assert (second.out, second.err) == ("", "")


@pytest.mark.parametrize(
    "line",
    [
        r"ranks        2 on \S+ \(2\)",
        r"device       CPU, \w+ \(all ranks\)",
        r"versions     torch \S+, torchvision \S+, accelerate \S+, numpy \S+, Python \S+ \(all ranks\)",
        r"batch        16 images, 4 identities of 4; on each rank 8",
        r"all-reduce   all ranks: \d+\.\d\d ms for 8 bytes, \d+\.\d\d GB/s for 32 MiB",
        r"train        synthetic: train 51 images",
        r"test         synthetic: query 14 images, gallery 29 images",
        r"step         \d+\.\d\d\d s, \d+ images/s over all ranks, \d+ % waiting for data",
        r"             \S+ \w+ for an epoch of 2 steps, \S+ \w+ for 2 epochs, without evaluations",
        r"memory       [\d.]+ [MG]iB of the process at most, of [\d.]+ GiB",
        r"OUTPUT_DIR   checked/run: [\d.]+ GiB free, about [\d.]+ MiB needed, 16 MiB written in \d+\.\d\d s",
        r"             a training would start at epoch 1",
    ],
)
def test_ranks_data_speed_and_disk_are_reported(healthy, line):
    assert re.search(f"^{line}$", healthy[0].out, re.MULTILINE), healthy[0].out


def test_nothing_is_left_in_output_dir(healthy, place):
    assert "checked" not in names(place.folder)
    assert not [name for name in names(place.folder) if "write_test" in name]


def other_torchvision_on_rank_1():
    """Run before the program starts."""
    import reid.commands.preflight.report

    if os.environ.get("RANK") == "1":
        original = reid.commands.preflight.report.version
        reid.commands.preflight.report.version = lambda name: "0.1" if name == "torchvision" else original(name)


def another_seed_on_rank_1():
    """Run before the program starts."""
    import sys

    if os.environ.get("RANK") == "1":
        sys.argv += ["SEED", "7"]


def test_differing_ranks_are_reported_first_and_other_checks_run(place):
    first, _ = place.run("check", "OUTPUT_DIR", "d", num_ranks=2, before=other_torchvision_on_rank_1)
    assert first.code == 1
    (problem,) = problems(first)
    assert re.search(r"versions.*torchvision 0\.1, .*ranks 1\b", problem)
    assert "step " in first.out
    assert re.fullmatch(r"error: [^\n]* \d problems?\. [^\n]*\n", first.err)
    report = first.out[first.out.index("problem 1") :]
    assert report.index("problem 1") < report.index("ranks   ")


def test_errors_of_a_training_are_problems(place):
    (place.folder / "a_file").touch()
    settings = ("OUTPUT_DIR", "a_file/run", "DATASETS.SYNTHETIC.NUM_TRAIN_PIDS", 9)
    first, _ = place.run("check", *settings, num_ranks=2, before=another_seed_on_rank_1)
    assert first.code == 1
    settings_differ, other_data, folder = problems(first)
    assert re.search(r"rank 1 .*SEED\b.*\b7\b.*\b0\b", settings_differ)
    assert "must hold" in other_data
    assert re.search("OUTPUT_DIR=.*/a_file/run", folder)
    assert "ranks        2 on" in first.out


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_output_dir_that_cannot_be_written_to_is_a_problem(place, num_ranks):
    (place.folder / "b_file").touch()
    first, *_ = place.run("check", "OUTPUT_DIR", "b_file/run", num_ranks=num_ranks)
    assert first.code == 1
    (problem,) = problems(first)
    assert re.search("OUTPUT_DIR=.*/b_file/run", problem)


def test_all_problems_are_reported_at_once(place):
    """Two problems, of batch and folder, do not keep the rest from being measured."""
    (place.folder / "c_file").touch()
    first, _ = place.run("check", "SOLVER.IMS_PER_BATCH", 12, "OUTPUT_DIR", "c_file/run", num_ranks=2)
    assert first.code == 1
    batch, folder = problems(first)
    assert "SOLVER.IMS_PER_BATCH=12" in batch
    assert "DATALOADER.NUM_INSTANCE=4" in batch
    assert re.search("OUTPUT_DIR=.*/c_file/run", folder)
    for title in ("ranks", "all-reduce", "train", "test"):
        assert f"\n{title} " in first.out


# ---- problems ----

NODE = {"host": "n1", "num_gpus": 4, "num_cpus": 16, "num_threads": 4, "gpu_used": 0.0}


@pytest.mark.parametrize(
    ("change", "keywords"),
    [
        ({}, ()),
        ({"num_gpus": 8}, ("n1", "8 GPUs", "4 ranks")),
        ({"num_threads": 5}, ("n1", "4 x 5 threads", "16 CPUs")),
        ({"gpu_used": 0.25}, ("n1", "GPU", "25 %")),
    ],
)
def test_problems_of_a_node(change, keywords):
    report = Report()
    _node(report, {**NODE, **change}, num_ranks=4)
    assert len(report.problems) == bool(keywords)
    assert all(keyword in problem for problem in report.problems for keyword in keywords), report.problems


def test_a_link_slower_than_half_of_the_others_is_named():
    links = [Link("all ranks", 3, 1e-4, 1.0), *(Link(f"{pair}", 2, 1e-4, 1.0) for pair in ("a - b", "b - c"))]
    report = Report()
    _links(report, [*links, Link("c - a", 2, 1e-4, 1.9)])
    assert report.problems == []
    _links(report, [*links, Link("c - a", 2, 1e-4, 2.1)])
    (problem,) = report.problems
    assert re.search(r"0\.02 GB/s for c - a .*0\.03 GB/s", problem)


def test_an_error_of_one_rank_alone_is_raised(monkeypatch):
    monkeypatch.setattr("reid.distributed.collectives.num_ranks", lambda: 2)
    with pytest.raises(WorldError, match="mine"):
        Report().attempt(lambda: raise_(WorldError("mine")))
    report = Report()
    report.attempt(lambda: raise_(shared(WorldError("everybody's"))))
    assert report.problems == ["everybody's"]


def raise_(error):
    raise error


def test_size_and_duration_formatting():
    assert [_size(n) for n in (2**20, 2**30 - 1, 2**30)] == ["1 MiB", "1024 MiB", "1.0 GiB"]
    assert [_duration(s) for s in (119, 120, 7199, 7200)] == ["119 s", "2 min", "120 min", "2.0 h"]
