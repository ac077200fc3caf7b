"""Mean and spread of several runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from program import REPOSITORY

from reid.commands.summarize import main, read_result, table

SCORES = [{"epoch": 120, "mAP": 0.85, "rank-1": 0.94}, {"epoch": 120, "mAP": 0.86, "rank-1": 0.93}]


@pytest.fixture
def runs(tmp_path):
    """Return a function that makes run folders with the given results and returns their paths."""

    def make(*results):
        folders = [tmp_path / str(number) for number in range(len(results))]
        for folder, result in zip(folders, results, strict=True):
            folder.mkdir()
            if result is not None:
                (folder / "result.json").write_text(json.dumps(result))
        return [str(folder) for folder in folders]

    return make


def test_mean_and_spread_of_a_sample(runs, capsys):
    folders = runs(*SCORES)
    assert main(folders) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == ["run", "epoch", "mAP", "rank-1"]
    assert lines[1] == [folders[0], "120", "85.00", "94.00"]
    assert lines[2] == [folders[1], "120", "86.00", "93.00"]
    assert lines[3] == ["mean", "of", "2", "85.50", "93.50"]
    spread = f"{100 * np.std([0.85, 0.86], ddof=1):.2f}"
    assert lines[4] == ["standard", "deviation", spread, spread]
    assert captured.err == ""


def test_a_single_run_has_no_spread(runs, capsys):
    assert main(runs(SCORES[0])) == 0
    assert "deviation" not in capsys.readouterr().out


@pytest.mark.parametrize("broken", [None, {}, [], {"mAP": "high"}, "no"])
def test_runs_without_a_result_are_named_and_left_out(runs, capsys, broken):
    folders = runs(SCORES[0], broken)
    assert main(folders) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: ")
    assert f"{folders[1]}/result.json" in captured.err
    assert captured.err.count("\n") == 1
    assert "mean of 1" in captured.out


def test_without_any_result_there_is_no_table(runs, capsys):
    assert main(runs(None)) == 1
    assert capsys.readouterr().out == ""


def test_several_test_sets_have_a_table_each():
    both = [{**SCORES[0], "datasets": {"a": SCORES[0], "b": SCORES[1]}}, {**SCORES[1], "datasets": {"a": SCORES[1]}}]
    first, second = table({"x": both[0], "y": both[1]}).split("\n\n")
    assert first.startswith("a ")
    assert "mean of 2" in first
    assert second.startswith("b ")
    assert "mean of 1" in second


def test_the_command_needs_no_torch(runs, tmp_path):
    (folder,) = runs(SCORES[0])
    code = (
        "import sys, runpy; sys.argv[1:] = [sys.argv[1]]\n"
        f"try: runpy.run_path({str(REPOSITORY / 'launch' / 'summarize.py')!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert read_result(tmp_path / "none") is None
