"""The program on a device, compared with the same on a CPU: losses, figures, checkpoints, pictures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from device_checks import CUDA
from PIL import Image
from program import TRAIN, Place, names, newest, records

# In float64 only the order of sums differs, which a few steps of a ResNet-18 let grow by some orders of magnitude.
EXACT = ("SOLVER.PRECISION", "fp64")
TOLERANCE = 1e-6
PICTURES = ["cmc_synthetic.png", "random_queries_synthetic.png", "train_batch.png", "worst_queries_synthetic.png"]


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """On a CPU these are slow tests, as tests/test_run.py and tests/test_continuity.py have most of them."""
    return str(request.param)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("device_runs")
    yield Place(folder)
    for file in folder.rglob("*.pt"):
        file.unlink()


@pytest.fixture(scope="module")
def on_cpu(place: Place) -> Path:
    """Train three epochs on a CPU, without interruption."""
    place.train("OUTPUT_DIR", "on_cpu", "SOLVER.MAX_EPOCHS", 3, *EXACT)
    return place.folder / "on_cpu"


@pytest.fixture(scope="module")
def moved(place: Place, device: str) -> dict[str, str]:
    """Train the same by torchrun (NCCL on a GPU), on a CPU and on the device again; return the output by part."""
    folder = f"moved_{device}"
    common = ("OUTPUT_DIR", folder, *EXACT)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    settings = ("--config_file", "tiny.yml", "MODEL.DEVICE", device, "SOLVER.MAX_EPOCHS", 1)
    first = place.command(*launcher, TRAIN, *settings, *common)
    assert first.code == 0, first
    pictures = {file.name: file.read_bytes() for file in (place.folder / folder / "pictures").iterdir()}
    assert sorted(pictures) == PICTURES
    second = place.train(*common, "MODEL.DEVICE", "cpu", "SOLVER.MAX_EPOCHS", 2)
    third = place.train(*common, "MODEL.DEVICE", device, "SOLVER.MAX_EPOCHS", 3)
    return {"folder": folder, "first": first.out, "second": second.out, "third": third.out}


def assert_same_records(folder: Path, expected: Path, kind: str, tolerance: float) -> None:
    rows_here, others = (records(one, kind, speeds=False) for one in (folder, expected))
    assert [record["iteration"] for record in rows_here] == [record["iteration"] for record in others]
    for record, other in zip(rows_here, others, strict=True):
        assert record.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, int | float):
                assert record[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, record["iteration"])


def test_losses_equal_those_of_a_cpu_from_device_to_device(place, moved, on_cpu):
    assert_same_records(place.folder / moved["folder"], on_cpu, "train", TOLERANCE)
    assert [record["iteration"] for record in records(on_cpu, "train")] == [1, 2, 3, 4, 5, 6]


def test_validations_equal_those_of_a_cpu_from_device_to_device(place, moved, on_cpu):
    assert_same_records(place.folder / moved["folder"], on_cpu, "val", TOLERANCE)


def test_each_part_resumes_from_the_checkpoint_of_the_one_before(moved):
    assert "resuming from" not in moved["first"]
    assert "epoch 1, step 2 of 2 is done" in moved["second"]
    assert "epoch 2, step 2 of 2 is done" in moved["third"]


def test_the_run_is_on_the_device_with_its_images(place, moved, device):
    on_gpu = device == "cuda"
    assert f"on 1 x {device}" in moved["first"]
    assert ("training images (" in moved["first"]) == on_gpu  # DATASETS.DEVICE_CACHE auto
    assert "training images (" not in moved["second"]
    assert "warning" not in moved["first"] + moved["second"] + moved["third"]
    environment = json.loads((place.folder / moved["folder"] / "environment.json").read_text())
    assert environment["world_size"] == 1


def test_peak_gpu_memory_is_recorded_on_a_gpu_only(place, moved, device):
    memory = [record.get("gpu_mem_max_mb") for record in records(place.folder / moved["folder"], "train")]
    parts = [memory[:2], memory[2:4], memory[4:]]  # by process: device, CPU, device
    assert parts[1] == [None, None]
    for part in (parts[0], parts[2]):
        if device == "cuda":
            assert 100 < part[0] <= part[1] < 4000  # MiB: weights, gradients and momentum of float64 take 256
        else:
            assert part == [None, None]


def test_pictures_are_drawn_and_show_the_same_first_batch(place, moved, on_cpu):
    for folder in (place.folder / moved["folder"], on_cpu):
        assert set(names(folder / "pictures")) == set(PICTURES)
    batch, expected = (
        np.asarray(Image.open(folder / "pictures" / "train_batch.png")).astype(int)
        for folder in (place.folder / moved["folder"], on_cpu)
    )
    assert batch.shape == expected.shape
    assert np.abs(batch - expected).max() <= 1  # of 255


def test_an_evaluation_gives_the_figures_of_a_cpu(place, on_cpu, device):
    (weight,) = (on_cpu / "checkpoints").glob("best_*.pt")
    options = ["TEST.WEIGHT", weight, "TEST.RE_RANKING", "yes", "TEST.RE_RANKING_K1", 5, "TEST.RE_RANKING_K2", 2]
    options += ["TEST.FLIP", "yes", "TEST.FPR", "[0.01,0.1]", "TEST.SINGLE_GALLERY_SHOT", "yes", *EXACT]
    results, rows = {}, {}
    for kind in dict.fromkeys(("cpu", device)):
        folder = f"evaluated_{kind}_for_{device}"
        (ended,) = place.run("evaluate", *options, "MODEL.DEVICE", kind, "OUTPUT_DIR", folder)
        assert ended.code == 0, ended
        assert "warning" not in ended.out
        assert [name for name in names(place.folder / folder / "pictures") if name.startswith("cmc")]
        results[kind] = json.loads((place.folder / folder / "result.json").read_text())
        rows[kind] = (place.folder / folder / "per_query.csv").read_text()
    for name, value in results["cpu"].items():
        expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert results[device][name] == expected, name
    assert rows[device] == rows["cpu"]


# With AMX, oneDNN 3.13 (torch 2.15) reads uninitialized memory in bfloat16 convolutions of maps as small as these.
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


# Relative to the losses of float64. On a CPU, bfloat16 (7 bits of mantissa) differs by 3 % after four steps. TF32
# and float16 (10 bits) differ by less, but float16 also leaves out the steps that overflow.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("bf16", 0.1), ("fp16", 0.1)])
def test_each_precision_trains_evaluates_and_resumes(place, on_cpu, device, precision, tolerance):
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("SOLVER.PRECISION fp16 is refused on a CPU")
    folder = place.folder / f"{precision}_{device}"
    common = ("OUTPUT_DIR", folder.name, "MODEL.DEVICE", device, "SOLVER.PRECISION", precision)
    place.train(*common, "SOLVER.MAX_EPOCHS", 1, environment=WITHOUT_AMX)
    before = newest(folder)["scaler"]
    place.train(*common, "SOLVER.MAX_EPOCHS", 2, environment=WITHOUT_AMX)
    after = newest(folder)["scaler"]
    losses, expected = ([record["loss"] for record in records(of, "train")] for of in (folder, on_cpu))
    assert losses == pytest.approx(expected[:4], rel=tolerance)
    assert len(records(folder, "val")) == 2
    if precision != "fp16":
        assert before is None
        assert after is None
        return
    # The scale is that of the process before: it has grown by nothing, or fallen where a step overflowed.
    assert after["scale"] <= before["scale"]
    if after["scale"] == before["scale"]:
        assert after["_growth_tracker"] == before["_growth_tracker"] + 2


def test_the_preflight_reports_the_device(place, device):
    (ended,) = place.run("check", "OUTPUT_DIR", f"checked_{device}", "MODEL.DEVICE", device)
    assert ended.code in (0, 1), ended  # 1: of speeds of this machine and hour, tests/test_preflight.py
    whose = "GPU" if device == "cuda" else "process"
    assert re.search(rf"^memory       [\d.]+ [MG]iB of the {whose} at most, of [\d.]+ GiB$", ended.out, re.MULTILINE)


# ---- several GPUs ----


@pytest.fixture
def two_devices(device: str) -> str:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: torch.cuda.device_count() is below 2")
    return device


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_ranks_train_as_one(place, on_cpu, two_devices, sharding):
    """DistributedDataParallel, SyncBatchNorm and FSDP2 over NCCL; FSDP2 needs GPUs."""
    if (two_devices, sharding) == ("cpu", "fsdp"):
        pytest.skip("SOLVER.SHARDING fsdp is refused on CPUs")
    folder = place.folder / f"two_{sharding}_{two_devices}"
    common = ("OUTPUT_DIR", folder.name, "MODEL.DEVICE", two_devices, *EXACT)
    place.train(*common, "SOLVER.SHARDING", sharding, "SOLVER.MAX_EPOCHS", 2, num_ranks=2)
    place.train(*common, "SOLVER.MAX_EPOCHS", 3)  # one rank resumes what two have saved
    assert_same_records(folder, on_cpu, "train", TOLERANCE)
    assert_same_records(folder, on_cpu, "val", TOLERANCE)


def test_more_ranks_than_gpus_are_refused(place, device):
    if device == "cpu":
        pytest.skip("any number of ranks may share a CPU")
    num_ranks = torch.cuda.device_count() + 1
    settings = ("OUTPUT_DIR", "too_many", "MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", 4 * num_ranks)
    ended = place.run("train", *settings, num_ranks=num_ranks)
    assert ended[-1].code == 1
    assert sum("--nproc_per_node must be at most" in one.err for one in ended) == 1
