"""Sweep files, checked before W&B sees them; that agents run them is in test_wandb_online.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from program import REPOSITORY

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


# ---- the command ----

KEY = "0123456789abcdef" * 3


def sweep_refusal(folder: Path, *words: object, code: int, **variables: str) -> str:
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launch" / "sweep.py", *map(str, words)],
        cwd=folder,
        env=foreign | {"HOME": str(folder), **variables},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, ""), done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done
    return done.stderr.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of --sweep-config and --sweep-id must be given, got neither; add one of them"),
        (["--sweep-config", SWEEPS[0], "--count", 0], "the command line must be --sweep-config FILE | --sweep-id ID"),
        (["--sweep-config", "nothing.yaml"], "--sweep-config must be a YAML file, got nothing.yaml: "),
    ],
)
def test_a_wrong_command_is_one_sentence(tmp_path, words, said):
    assert sweep_refusal(tmp_path, *words, code=2).startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "W&B has no sweep for those without a key; set WANDB_API_KEY, or run: wandb login"),
        ({"WANDB_API_KEY": "short"}, "W&B takes part in no sweep: WANDB_API_KEY invalid: "),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "W&B does not make the sweep: "),
    ],
)
def test_a_sweep_that_cannot_be_made_is_one_sentence(tmp_path, variables, said):
    assert sweep_refusal(tmp_path, "--sweep-config", SWEEPS[0], code=1, **variables).startswith(said)
