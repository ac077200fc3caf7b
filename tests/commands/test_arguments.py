"""Command lines of the commands with arguments of their own."""

import pytest

from reid.commands.arguments import ParsedArguments, parse_arguments
from reid.errors import SettingsError


def test_settings_and_options_of_an_embedding_mix_in_any_order():
    arguments = ["TEST.WEIGHT", "w.pt", "--output", "out", "SEED=1"]
    command_args = {"folder": "photos", "output": "out", "strict": False}
    assert parse_arguments("embed", ["photos", *arguments]) == ParsedArguments(
        None, ["TEST.WEIGHT", "w.pt", "SEED=1"], command_args
    )
    arguments = ["--strict", "photos", "--config_file", "a.yml", "SEED=1"]
    command_args = {"folder": "photos", "output": None, "strict": True}
    assert parse_arguments("embed", arguments) == ParsedArguments("a.yml", ["SEED=1"], command_args)


def test_any_number_of_images_stands_before_the_settings():
    arguments = ["a.jpg", "--gallery", "g", "./TEST.JPG", "TEST.WEIGHT", "w.pt", "MODEL.DEVICE=cpu"]
    command_args = {"images": ["a.jpg", "./TEST.JPG"], "gallery": "g", "top": 10, "output": "search.jpg", "json": None}
    assert parse_arguments("search", arguments) == ParsedArguments(
        None, ["TEST.WEIGHT", "w.pt", "MODEL.DEVICE=cpu"], command_args
    )


def test_formats_are_a_list():
    assert parse_arguments("export", ["--to", "onnx, torch"]).command_args["to"] == ("onnx", "torch")
    assert parse_arguments("export", []).command_args == {
        "to": ("onnx", "torch", "safetensors"),
        "output": None,
        "check": "evaluation",
        "uint8": False,
    }


def test_training_has_settings_only():
    assert parse_arguments("train", ["--config-file", "a.yml", "SEED", "1"]) == ParsedArguments(
        "a.yml", ["SEED", "1"], {}
    )


@pytest.mark.parametrize(
    ("command", "arguments", "keyword"),
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
def test_another_form_is_answered_by_the_right_one(command, arguments, keyword):
    with pytest.raises(SettingsError, match=keyword):
        parse_arguments(command, arguments)
