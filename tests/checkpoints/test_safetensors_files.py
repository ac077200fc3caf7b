"""Safetensors files: what comes back, and what a damaged one is answered by."""

import pytest
import safetensors.torch
import torch
from refusals import refused

from reid.checkpoints.safetensors_files import read_safetensors, write_safetensors
from reid.checkpoints.state_dicts import checksum_of, num_pids_of
from reid.checkpoints.weights import read_file
from reid.errors import WorldError

STATE = {
    "base.weight": torch.arange(12.0).reshape(3, 4),
    "bn.num_batches_tracked": torch.tensor(7),
    "classifier.weight": torch.ones(5, 4, dtype=torch.float64),
}


@pytest.fixture
def file(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", STATE, {"config": "SEED: 1\n", "epoch": "12", "neck": "bnneck"})
    return tmp_path / "w.safetensors"


def test_a_file_comes_back_as_one_of_our_checkpoints(file):
    content = read_file(file, "TEST.WEIGHT")
    assert content["config"] == "SEED: 1\n"
    assert content["epoch"] == 12
    assert content["metadata"]["neck"] == "bnneck"
    assert checksum_of(content) == checksum_of({"model": STATE})
    assert num_pids_of(content) == 5


def test_other_libraries_read_it_too(file):
    assert torch.equal(safetensors.torch.load_file(file)["base.weight"], STATE["base.weight"])


def test_tensors_that_share_memory_or_lie_across_it_are_written(tmp_path):
    across = torch.arange(6.0).reshape(2, 3).T
    write_safetensors(tmp_path / "w.safetensors", {"a": across, "b": across[:2]}, {})
    model = read_safetensors(tmp_path / "w.safetensors")["model"]
    assert torch.equal(model["a"], across)
    assert torch.equal(model["b"], across[:2])


def test_a_file_of_others_is_a_state_dict(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors")
    content = read_file(tmp_path / "w.safetensors", "TEST.WEIGHT")
    assert "config" not in content
    assert checksum_of(content) == checksum_of(STATE)


def test_a_flipped_bit_anywhere_in_the_data_is_detected(file):
    intact = file.read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little")
    for byte in (start, (start + len(intact)) // 2, len(intact) - 1):
        file.write_bytes(intact[:byte] + bytes([intact[byte] ^ 4]) + intact[byte + 1 :])
        with refused(WorldError, "TEST.WEIGHT", f"TEST.WEIGHT={file}", "checksum"):
            read_file(file, "TEST.WEIGHT")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_a_file_that_is_cut_off_is_rejected(file, share):
    intact = file.read_bytes()
    file.write_bytes(intact[: int(share * len(intact))])
    with refused(WorldError, "TEST.WEIGHT", f"TEST.WEIGHT={file}"):
        read_file(file, "TEST.WEIGHT")
