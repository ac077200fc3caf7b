"""Command lines of the commands with arguments of their own."""

import pytest

from reid.commands import Words, read_words
from reid.errors import SettingsError


def test_settings_and_options_of_an_embedding_mix_in_any_order():
    words = ["TEST.WEIGHT", "w.pt", "--output", "out", "SEED=1"]
    own = {"folder": "photos", "output": "out", "strict": False}
    assert read_words("embed", "", ["photos", *words]) == Words(None, ["TEST.WEIGHT", "w.pt", "SEED=1"], own)
    words = ["--strict", "photos", "--config_file", "a.yml", "SEED=1"]
    own = {"folder": "photos", "output": None, "strict": True}
    assert read_words("embed", "", words) == Words("a.yml", ["SEED=1"], own)


def test_any_number_of_images_stands_before_the_settings():
    words = ["a.jpg", "--gallery", "g", "./TEST.JPG", "TEST.WEIGHT", "w.pt", "MODEL.DEVICE=cpu"]
    own = {"images": ["a.jpg", "./TEST.JPG"], "gallery": "g", "top": 10, "output": "search.jpg", "json": None}
    assert read_words("search", "", words) == Words(None, ["TEST.WEIGHT", "w.pt", "MODEL.DEVICE=cpu"], own)


def test_formats_are_a_list():
    assert read_words("export", "", ["--to", "onnx, torch"]).own["to"] == ("onnx", "torch")
    assert read_words("export", "", []).own == {
        "to": ("onnx", "torch", "safetensors"),
        "output": None,
        "check": "evaluation",
        "uint8": False,
    }


def test_training_has_settings_only():
    assert read_words("train", "", ["--config-file", "a.yml", "SEED", "1"]) == Words("a.yml", ["SEED", "1"], {})


@pytest.mark.parametrize(
    ("story", "words", "told"),
    [
        ("embed", [], "no FOLDER"),
        ("embed", ["TEST.WEIGHT", "w.pt"], "no FOLDER"),
        ("search", ["--gallery", "g"], "no IMAGE"),
        ("search", ["TEST.WEIGHT=x", "--gallery", "g"], "no IMAGE"),
        ("search", ["a.jpg"], "required: --gallery"),
        ("search", ["a.jpg", "--gallery", "g", "--top", "0"], "--top: '0'"),
        ("search", ["a.jpg", "--gallery", "g", "--output", "a.gif"], "--output: 'a.gif'"),
        ("search", ["a.jpg", "--gallery", "g", "--config_file", "a.yml"], "arguments: --config_file"),
        ("export", ["--to", "onnx,tensorrt"], "--to: 'onnx,tensorrt'"),
        ("export", ["--to", ","], "--to: ','"),
        ("export", ["--check", "some"], "--check: .*'some'"),
        ("train", ["--output", "x"], "arguments: --output"),
    ],
)
def test_another_form_is_answered_by_the_right_one(story, words, told):
    with pytest.raises(SettingsError, match=told):
        read_words(story, "", words)
