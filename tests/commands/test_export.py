"""Models are exported for other programs, from the command line to what those programs compute.

Also covers reid.commands.export_parity.
"""

import json
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from program import REPOSITORY, TIMEOUT, untrained
from refusals import refused
from torch import nn

from reid.checkpoints.state_dicts import state_dict_of
from reid.checkpoints.weights import load_state, read_file
from reid.commands.export import FromPixels
from reid.commands.export_parity import Comparison, random_pass
from reid.config.load import load_config
from reid.data.augment import normalize
from reid.errors import WorldError
from reid.models.reid_model import build_model

SIZE = (32, 16)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def folder(place):
    """Return a folder with a checkpoint `w.pt` whose settings name an existing benchmark."""
    made = place.folder / "export"
    made.mkdir()
    untrained(
        made / "w.pt", f"DATASETS.ROOT_DIR={place.folder / 'data'}", f"DATASETS.CACHE_DIR={place.folder / 'cache'}"
    )
    return made


def run(place, folder, *arguments):
    (ended,) = place.run("export", *arguments, bare=True, folder=folder)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


@pytest.fixture(scope="module")
def output(place, folder):
    return run(place, folder, "TEST.WEIGHT", "w.pt")


@pytest.fixture(scope="module")
def model(folder):
    made = build_model(load_config(None, ["MODEL.NAME=resnet18", "MODEL.STEM_RELU=yes"]), 8)
    load_state(made, state_dict_of(read_file(folder / "w.pt", "TEST.WEIGHT")), "FILE")
    return made.eval()


def pixels(num, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num, *SIZE, 3), dtype=np.uint8))


def images(num):
    return normalize(pixels(num), MEAN, STD).contiguous()


def test_export_reports_comparison_on_evaluation_for_each_file(output, folder):
    result = r"MB, .*difference [\d.e+-]+ .*synthetic mAP ([\d.]+) % .*torch .*\1 % .*"
    assert re.search(rf"^w.pt2: [\d.]+ {result}torch.export$", output, re.MULTILINE)
    assert re.search(rf"^w.onnx: [\d.]+ {result}onnxruntime$", output, re.MULTILINE)
    assert re.search(r"^w.safetensors: [\d.]+ MB, checksum \w{16}\b", output, re.MULTILINE)
    assert sorted(file.name for file in folder.glob("*w.*")) == ["w.onnx", "w.pt", "w.pt2", "w.safetensors"]


def test_output_of_the_exporter_is_suppressed(output):
    assert not re.search(r"\[torch|warning|✅|W\d{4}", output)


@pytest.mark.parametrize("num", [1, 3, 8])
def test_onnx_embedding_equals_model_for_any_batch_size(output, folder, model, num):
    session = onnxruntime.InferenceSession(folder / "w.onnx", providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("images", ["batch", 3, *SIZE], "tensor(float)")
    assert (made.name, made.shape, made.type) == ("embedding", ["batch", 512], "tensor(float)")
    (embedding,) = session.run(None, {"images": images(num).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(embedding), model(images(num)), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11
@pytest.mark.parametrize("num", [1, 3])
def test_the_program_computes_what_the_model_does(output, folder, model, num):
    extra_files = {"metadata.json": ""}
    program = torch.export.load(folder / "w.pt2", extra_files=extra_files)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(num)), model(images(num)), atol=1e-5, rtol=1e-5)
    assert json.loads(extra_files["metadata.json"])["model_name"] == "resnet18"
    assert not [name for name in program.state_dict if "classifier" in name]


def test_onnx_metadata_describes_preprocessing_and_output(output, folder):
    session = onnxruntime.InferenceSession(folder / "w.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["pixel_mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["pixel_std"]) == [0.229, 0.224, 0.225]
    assert json.loads(metadata["size"]) == [*SIZE]
    assert json.loads(metadata["num_pids"]) == 8
    assert json.loads(metadata["feat_norm"]) is True
    assert metadata["neck_feat"] == "after"
    assert metadata["input"].startswith("float32 [B, 3, H, W]: RGB")


def test_safetensors_are_a_checkpoint_of_the_same_model(output, place, folder):
    content = read_file(folder / "w.safetensors", "TEST.WEIGHT")
    assert content["epoch"] == 3
    metadata = content["metadata"]
    assert (metadata["model_name"], metadata["neck"], metadata["last_stride"], metadata["stem_relu"]) == (
        "resnet18",
        "bnneck",
        "1",
        "true",
    )
    assert "classifier.weight" in content["model"]
    out = run(place, folder, "TEST.WEIGHT", "w.safetensors", "--to", "torch", "--check", "none", "--output", "again")
    assert "again/w.pt2: " in out
    assert "not checked" in out


@pytest.mark.slow
def test_exported_model_can_take_uint8_pixels(place, folder, model):
    arguments = ("--uint8", "--to", "onnx", "--check", "random", "--output", "u8", "TEST.NECK_FEAT=before")
    assert "largest difference" in run(place, folder, "TEST.WEIGHT", "w.pt", *arguments)
    session = onnxruntime.InferenceSession(folder / "u8" / "w.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", *SIZE, 3]
    (embedding,) = session.run(None, {"images": pixels(5).numpy()})
    with torch.no_grad():
        expected = model.base(images(5)).mean((2, 3))
    torch.testing.assert_close(torch.from_numpy(embedding), expected, atol=1e-4, rtol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["neck_feat"] == "before"


def test_export_without_benchmark_compares_random_images(place, folder):
    settings = ("DATASETS.NAMES", "market1501", "DATASETS.ROOT_DIR", "nowhere")
    out = run(place, folder, "TEST.WEIGHT", "w.pt", "--to", "torch", "--output", "random", *settings)
    assert re.search(r"^warning: .*DATASETS\.ROOT_DIR.*nowhere", out, re.MULTILINE)
    (line,) = re.findall(r"\bw\.pt2: [\d.]+ MB, .*difference [\d.e+-]+ .*$", out, re.MULTILINE)
    assert "mAP" not in line


# ---- errors ----


def test_the_weights_themselves_are_never_overwritten(output, place, folder):
    before = (folder / "w.safetensors").read_bytes()
    message = place.refusal(
        "export", "TEST.WEIGHT", "w.safetensors", "--to", "safetensors", bare=True, folder=folder, code=2
    )
    assert all(keyword in message for keyword in ("w.safetensors", "TEST.WEIGHT", "--output")), message
    assert (folder / "w.safetensors").read_bytes() == before


def onnx_is_missing():
    import reid.commands.export

    reid.commands.export.find_spec = lambda name: None if name == "onnxscript" else True


def test_a_missing_package_is_named_with_its_extra(place, folder):
    arguments = ("TEST.WEIGHT", "w.pt", "--output", "none")
    message = place.refusal("export", *arguments, bare=True, folder=folder, before=onnx_is_missing, code=1)
    assert "--to onnx" in message
    assert re.search(r"onnxscript\b[^,]* missing", message), message
    assert "uv sync --extra export" in message


def export_fails():
    def fail(*_: object, **__: object) -> None:
        raise TypeError("this operator\nis unknown")

    torch.export.export = fail


def test_a_model_that_torch_cannot_export_is_named(place, folder):
    arguments = ("TEST.WEIGHT", "w.pt", "--to", "torch", "--check", "none", "--output", "none")
    message = place.refusal("export", *arguments, bare=True, folder=folder, before=export_fails, code=1)
    assert all(keyword in message for keyword in ("MODEL.NAME resnet18", f"torch {torch.__version__}", "--to")), message
    assert "this operator" in message
    assert "is unknown" not in message


def exported_model_is_another():
    import reid.commands.export

    class Another(reid.commands.export.FromPixels):
        def forward(self, images):
            return super().forward(images) * 1.01

    reid.commands.export.FromPixels = Another


@pytest.mark.slow
def test_an_export_that_computes_something_else_is_removed(place, folder):
    arguments = ("TEST.WEIGHT", "w.pt", "--uint8", "--to", "torch", "--check", "random", "--output", "wrong")
    message = place.refusal("export", *arguments, bare=True, folder=folder, before=exported_model_is_another, code=1)
    assert all(keyword in message for keyword in ("w.pt2", "0.001", "difference")), message
    assert list((folder / "wrong").iterdir()) == []


def test_export_runs_in_one_process_only(place, folder):
    message = place.refusal("export", "TEST.WEIGHT", "w.pt", bare=True, folder=folder, num_ranks=2, code=2)
    assert all(keyword in message for keyword in ("export must", "got 2", "torchrun")), message


# ---- the comparison ----


class Scaled(nn.Module):
    num_features = 3

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return self.factor * batch.mean((2, 3))


def test_a_comparison_allows_rounding_but_neither_more_nor_nan():
    cfg = load_config(None, ["INPUT.SIZE_TEST=[32,16]"])
    comparison = Comparison(Scaled(), random_pass(cfg))
    assert "difference" in comparison.check("F", "L", lambda batch: batch.mean((2, 3)) * (1 + 1e-5))
    with refused(WorldError, "--to", "F ", "difference"):
        comparison.check("F", "L", lambda batch: batch.mean((2, 3)) * 1.002)
    with refused(WorldError, "--to", "F ", "difference nan"):
        comparison.check("F", "L", lambda batch: batch.mean((2, 3)) * torch.nan)


def test_a_comparison_fails_if_the_map_differs():
    calls = iter([{"market1501": 0.5}, {"market1501": 0.5008}, {"market1501": 0.4985}])

    def embed_one(embed):
        embed(torch.ones(1, 3, 2, 2))
        return next(calls)

    comparison = Comparison(Scaled(), embed_one)
    model = Scaled()
    assert re.search(r"market1501 mAP 50\.00 % .*torch .*50\.08 % .*L", comparison.check("F", "L", model))
    with refused(WorldError, "--to", "market1501", "50.00 %", "49.85 %"):
        comparison.check("F", "L", model)


def test_pixels_are_normalized_as_in_evaluation():
    normalized = FromPixels(nn.Identity(), MEAN, STD)(pixels(2))
    assert torch.equal(normalized, images(2))


@pytest.mark.parametrize("command", ["export", "embed", "search"])
def test_the_real_commands_have_help(command):
    script = REPOSITORY / "launch" / f"{command}.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    assert f"{command}.py" in done.stdout
    assert "settings over those of the file" in done.stdout
