"""Sweep files, checked before W&B sees them; that agents run them is in test_wandb_online.py."""

from pathlib import Path

import pytest
import yaml

from reid.errors import SettingsError, UnknownKeyError
from reid.sweeps import read_sweep

SWEEPS = sorted((Path(__file__).parent.parent / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_the_shipped_sweeps_are_good(file):
    sweep = read_sweep(file)
    assert sweep["metric"] == {"name": "val/mAP_best", "goal": "maximize"}
    (config,) = (word.removeprefix("--config_file=") for word in sweep["command"] if "config_file" in word)
    assert (file.parent.parent.parent / config).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command": ["torchrun", "${args}"]}, "lacks ${args_no_hyphens}; add it"),
        ({"method": ""}, "must be a W&B sweep, but lacks method; see"),
        ({"parameters": ["SOLVER.BASE_LR"]}, "lacks parameters as KEY: {values: [...]}"),
        ({"parameters": {"base_lr": {"values": [1]}}}, "got base_lr; use SOLVER.BASE_LR"),
        ({"parameters": {"SOLVER.BASE_LR": {"values": [0.1, -1]}}}, "must be a number > 0, got -1; correct it"),
        ({"parameters": {"SOLVER.IMS_PER_BATCH": {"min": 1.5, "max": 64}}}, "a whole number >= 1, got 1.5"),
        ({"parameters": {"SOLVER.BASE_LR": {}}}, "must say what to try, got nothing"),
    ],
)
def test_a_bad_sweep_is_refused_in_a_sentence(tmp_path, changes, words):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(SWEEPS[0].read_text()) | changes))
    with pytest.raises((SettingsError, UnknownKeyError)) as error:
        read_sweep(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", [None, "a: [", "\xff", "", "- a\n"])
def test_what_is_no_sweep_is_refused(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(SettingsError, match="must be a"):
        read_sweep(file)
