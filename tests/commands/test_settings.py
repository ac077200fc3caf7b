"""The command that prints settings, and docs/settings.md, which it writes."""

import subprocess
import sys

import pytest
from program import REPOSITORY

from reid.commands.settings import main, markdown, matching, plain
from reid.config.schema import SECTION_TITLES, SETTINGS


def test_the_page_of_settings_is_up_to_date():
    """Renew a stale page by: python launch/settings.py --markdown > docs/settings.md."""
    assert (REPOSITORY / "docs" / "settings.md").read_text() == markdown(SETTINGS)


def test_every_section_has_a_title():
    assert list(SECTION_TITLES) == list(dict.fromkeys(key.rpartition(".")[0].partition(".")[0] for key in SETTINGS))


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [
        ("", list(SETTINGS)),
        ("solver", [key for key in SETTINGS if key.startswith("SOLVER.")]),
        ("Solver.Warmup", ["SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_METHOD"]),
        ("datasets.msmt17", ["DATASETS.MSMT17.TRAIN"]),
        ("ims_per", ["SOLVER.IMS_PER_BATCH", "TEST.IMS_PER_BATCH"]),
        ("seed", ["SEED"]),
    ],
)
def test_a_prefix_selects_sections_and_keys(prefix, keys):
    assert matching(prefix) == keys


@pytest.mark.parametrize(
    ("prefix", "near"), [("SOLVERS", "SOLVER?"), ("MODEL.BASE_LR", "SOLVER.BASE_LR?"), ("qqq", "MODEL or INPUT")]
)
def test_an_unknown_prefix_gets_the_nearest(prefix, near, capsys):
    assert main([prefix]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: PREFIX must ")
    assert repr(prefix) in line
    assert near in line


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_into_the_console(width):
    text = plain(SETTINGS, width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for key, setting in SETTINGS.items():
        assert key in words
        assert " ".join(setting.doc.split()) in " ".join(words)


def test_the_command_prints_a_setting_without_torch():
    code = "import sys, reid.commands.settings as c; c.main(['base_lr']); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[:2] == ["SOLVER.BASE_LR", "    Default: 0.00035. Allowed: a number > 0."]
