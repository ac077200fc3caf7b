"""Sweep files are validated before W&B receives them; test_wandb_online.py runs agents.

Also covers reid.tracking.sweeps.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from program import REPOSITORY, TIMEOUT
from refusals import refused

from reid.commands.sweep import read_sweep
from reid.errors import SettingsError

SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_shipped_sweeps_are_valid(file):
    sweep = read_sweep(file)
    assert sweep["metric"] == {"name": "val/mAP_best", "goal": "maximize"}
    (config,) = (arg.removeprefix("--config_file=") for arg in sweep["command"] if "config_file" in arg)
    assert (file.parent.parent.parent / config).exists()


@pytest.mark.parametrize(
    ("changes", "key", "keyword"),
    [
        ({"command": ["torchrun", "${args}"]}, "--sweep-config", "${args_no_hyphens}"),
        ({"method": ""}, "--sweep-config", "without method."),
        ({"parameters": ["SOLVER.BASE_LR"]}, "--sweep-config", "{values: [...]}"),
        ({"parameters": {"base_lr": {"values": [1]}}}, "base_lr", "SOLVER.BASE_LR"),
        ({"parameters": {"SOLVER.BASE_LR": {"values": [0.1, -1]}}}, "SOLVER.BASE_LR", "got -1"),
        ({"parameters": {"SOLVER.IMS_PER_BATCH": {"min": 1.5, "max": 64}}}, "SOLVER.IMS_PER_BATCH", "got 1.5"),
        ({"parameters": {"SOLVER.BASE_LR": {}}}, "SOLVER.BASE_LR", "got nothing"),
    ],
)
def test_an_invalid_sweep_is_rejected(tmp_path, changes, key, keyword):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(SWEEPS[0].read_text()) | changes))
    with refused(SettingsError, key, keyword, str(file)):
        read_sweep(file)


@pytest.mark.parametrize("text", [None, "a: [", "\xff", "", "- a\n"])
def test_a_file_that_is_not_a_sweep_is_rejected(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with refused(SettingsError, "--sweep-config", str(file)):
        read_sweep(file)


# ---- the command ----

KEY = "0123456789abcdef" * 3


def sweep_refusal(folder: Path, *arguments: object, code: int, **variables: str) -> str:
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launch" / "sweep.py", *map(str, arguments)],
        cwd=folder,
        env=others | {"HOME": str(folder), **variables},
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, ""), done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done
    return done.stderr.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ([], ("--sweep-config", "--sweep-id", "neither")),
        (["--sweep-config", SWEEPS[0], "--count", 0], ("argument --count", "'0'")),
        (["--sweep-config", "nothing.yaml"], ("--sweep-config", "nothing.yaml")),
    ],
)
def test_invalid_command_is_reported_in_one_sentence(tmp_path, arguments, keywords):
    message = sweep_refusal(tmp_path, *arguments, code=2)
    assert all(keyword in message for keyword in keywords), message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "keyword"),
    [
        ({}, "set WANDB_API_KEY"),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "create the sweep"),
    ],
)
def test_failure_to_create_sweep_is_reported_in_one_sentence(tmp_path, variables, keyword):
    assert keyword in sweep_refusal(tmp_path, "--sweep-config", SWEEPS[0], code=1, **variables)
