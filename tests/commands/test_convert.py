"""The weights of pickled models are extracted without running code of the file."""

import importlib
import pickle
import random
import sys
import zipfile

import pytest
import torch
from program import REPOSITORY, TRAIN
from refusals import refused
from torch import nn

from reid.checkpoints.state_dicts import state_dict_of
from reid.checkpoints.weights import read_file
from reid.commands.convert import convert, extract_weights
from reid.config.load import load_config
from reid.errors import WorldError
from reid.models.reid_model import build_model

CONVERT = REPOSITORY / "launch" / "convert.py"
FORMATS = {"since PyTorch 1.6": True, "before PyTorch 1.6": False}

# As in reid-strong-baseline: classes of a package that is missing when the file is read.
PACKAGE = """
import torch
from torch import nn

print("imported")

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.absent = None
        self.register_parameter("nothing", None)
        self.register_buffer("scratch", torch.ones(3), persistent=False)

class Baseline(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(Block(), nn.ReLU(), Block())
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.bottleneck = nn.BatchNorm1d(4)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(4, 7, bias=False)
        self.neck, self.history = "bnneck", {1: {2, 3}, "loss": torch.zeros(2)}
"""


@pytest.fixture
def baseline(tmp_path, monkeypatch):
    """Yield a model of a package that can be imported until `forget` is called."""
    (tmp_path / "package" / "modeling").mkdir(parents=True)
    (tmp_path / "package" / "modeling" / "__init__.py").touch()
    (tmp_path / "package" / "modeling" / "baseline.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    model = importlib.import_module("modeling.baseline").Baseline()
    for value in model.state_dict().values():
        if value.dtype.is_floating_point:
            nn.init.normal_(value)
    yield model
    forget()


def forget():
    sys.path[:] = [path for path in sys.path if not path.endswith("/package")]
    for name in [name for name in sys.modules if name.startswith("modeling")]:
        del sys.modules[name]


def saved(file, content, *, in_zip):
    torch.save(content, file, _use_new_zipfile_serialization=in_zip)
    return file


@pytest.mark.parametrize("in_zip", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("wrapped", ["alone", "by DataParallel", "in a dict"])
def test_extracted_weights_equal_the_state_dict(tmp_path, capfd, baseline, in_zip, wrapped):
    expected = {name: value.clone() for name, value in baseline.state_dict().items()}
    content = {"alone": baseline, "by DataParallel": nn.DataParallel(baseline), "in a dict": {"model": baseline}}[
        wrapped
    ]
    file = saved(tmp_path / "resnet50_model_2.pth", content, in_zip=in_zip)
    forget()
    capfd.readouterr()
    convert(file, tmp_path / "out" / "resnet50_model_2.pth")
    assert "modeling" not in sys.modules
    assert "imported" not in capfd.readouterr().out
    state = state_dict_of(read_file(tmp_path / "out" / "resnet50_model_2.pth", "TEST.WEIGHT"))
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious():
    return {
        "exec": Malicious(exec, "open('executed', 'w').close()"),
        "eval of an import": Malicious(eval, "__import__('pathlib').Path('executed').touch()"),
        "an import": Malicious(importlib.import_module, "antigravity"),
        "a method": Malicious(getattr, "text", "join"),
        "the loader of torch": Malicious(torch.load, "other.pth"),
    }


@pytest.mark.parametrize("in_zip", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", malicious())
def test_malicious_pickle_yields_weights_and_runs_no_code(tmp_path, monkeypatch, baseline, in_zip, kind):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "other.pth", Malicious(exec, "open('executed', 'w').close()"), in_zip=in_zip)
    expected = {name: value.clone() for name, value in baseline.state_dict().items()}
    baseline.trap = malicious()[kind]
    baseline.base[0].__dict__["trap"] = [malicious()[kind]]
    file = saved(tmp_path / "w.pth", baseline, in_zip=in_zip)
    forget()
    what, state = extract_weights(file)
    assert what == "modeling.baseline.Baseline"
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not (tmp_path / "executed").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", malicious())
def test_pickle_of_only_a_malicious_call_is_rejected(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps(malicious()[kind]))
    with refused(WorldError, "IN", "w.pth"):
        extract_weights(tmp_path / "w.pth")
    saved(tmp_path / "z.pth", malicious()[kind], in_zip=True)
    with refused(WorldError, "IN", "z.pth", "model"):
        extract_weights(tmp_path / "z.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("in_zip", FORMATS.values(), ids=FORMATS)
def test_an_optimizer_is_rejected(tmp_path, in_zip):
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    for content in (optimizer, optimizer.state_dict()):
        file = saved(tmp_path / "resnet50_optimizer_2.pth", content, in_zip=in_zip)
        with refused(WorldError, "IN", str(file), "NAME_model_N.pth"):
            extract_weights(file)


def test_a_plain_state_dict_comes_out_as_it_is(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    what, extracted = extract_weights(saved(tmp_path / "w.pth", {"state_dict": state, "best": 0.5}, in_zip=True))
    assert what == "state dict"
    assert all(torch.equal(extracted[name], state[name]) for name in state)


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2], {"a": 1}, {}, random.Random(0), None])
def test_content_without_a_model_is_rejected(tmp_path, content):
    with refused(WorldError, "IN", "w.pth", type(content).__name__):
        extract_weights(saved(tmp_path / "w.pth", content, in_zip=True))


def test_archives_for_another_unpickler_are_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:
        archive.writestr("scripted/constants.pkl", b"")
    with refused(WorldError, "IN", "scripted.pt", "TorchScript"):
        extract_weights(tmp_path / "scripted.pt")


@pytest.mark.parametrize("in_zip", FORMATS.values(), ids=FORMATS)
def test_damaged_file_is_reported_in_one_sentence(tmp_path, baseline, in_zip):
    content = saved(tmp_path / "w.pth", baseline, in_zip=in_zip).read_bytes()
    forget()
    draw = random.Random(0)
    for _ in range(30):
        (tmp_path / "w.pth").write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(WorldError, match=r"\A[^\n]*w\.pth[^\n]*\Z") as error:
            extract_weights(tmp_path / "w.pth")
        assert error.value.key == "IN"


def test_a_file_is_never_overwritten(tmp_path, baseline):
    file = saved(tmp_path / "w.pth", baseline, in_zip=True)
    with refused(WorldError, "OUT", "w.pth"):
        convert(file, file)
    with refused(WorldError, "IN", "gone.pth"):
        convert(tmp_path / "gone.pth", tmp_path / "new.pth")


@pytest.mark.slow
def test_error_names_convert_command_whose_output_can_be_loaded(place):
    model = build_model(load_config(str(place.folder / "tiny.yml"), []), 8)
    torch.save(model, place.folder / "resnet18_model_120.pth", _use_new_zipfile_serialization=False)
    message = place.refusal("evaluate", "OUTPUT_DIR", "old", "TEST.WEIGHT", "resnet18_model_120.pth", code=1)
    assert "TEST.WEIGHT" in message
    assert "reid convert resnet18_model_120.pth OUT.pth" in message
    done = place.command(sys.executable, CONVERT, "resnet18_model_120.pth", "plain.pth")
    assert (done.code, done.err) == (0, "")
    keywords = ("plain.pth", "126 entries", "reid.models.reid_model.ReIDModel", "MODEL.NAME resnet18", "8 identities")
    assert all(keyword in done.out for keyword in keywords), done.out
    assert done.out.count("\n") == 1
    (evaluated,) = place.run("evaluate", "OUTPUT_DIR", "old", "TEST.WEIGHT", "plain.pth")
    assert evaluated.code == 0, evaluated
    no_model = place.command(sys.executable, CONVERT, TRAIN, "other.pth")
    assert no_model.code == 1
    assert no_model.err.startswith("error: ")
    assert f"got {TRAIN}" in no_model.err
    assert no_model.err.count("\n") == 1
