"""The installed package: its command, its configuration files, and what its wheel holds.

Also covers reid.__main__, reid.commands.train and reid.config.bundled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from program import REPOSITORY, TIMEOUT

import reid
from reid.config.bundled import find_config_file

REID = Path(sys.executable).with_name("reid")
STARTS = {
    "launch/train.py": [sys.executable, REPOSITORY / "launch" / "train.py"],
    "reid train": [REID, "train"],
    "-m reid train": [sys.executable, "-m", "reid", "train"],
    "-m reid.commands.train": [sys.executable, "-m", "reid.commands.train"],
}


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize("start", STARTS)
def test_a_training_can_be_started_in_four_ways(tmp_path, start):
    done = run(*STARTS[start], "--config_file", "demo.yml", "SOLVER.MAX_EPOCHS=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: SOLVER.MAX_EPOCHS must be")


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0)])
def test_the_command_lists_all_others(tmp_path, arguments, code):
    done = run(REID, *arguments, cwd=tmp_path)
    assert done.returncode == code
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")}
    assert listed == {file.stem for file in (REPOSITORY / "launch").glob("*.py")}


@pytest.mark.parametrize("name", sorted(file.stem for file in (REPOSITORY / "launch").glob("*.py")))
def test_each_command_explains_itself(tmp_path, name):
    done = run(REID, name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done
    assert done.stdout.startswith(f"usage: reid {name} ")


def test_the_version_is_that_of_the_distribution(tmp_path):
    done = run(REID, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"reid-strong {reid.__version__}\n")


def test_an_unknown_command_is_refused_with_the_nearest(tmp_path):
    done = run(REID, "trian", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: COMMAND must be one of those that reid --help lists, got trian. Fix: use train.\n"


@pytest.mark.parametrize("name", ["demo.yml", "configs/demo.yml", "legacy/baseline.yml"])
def test_bundled_files_are_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config_file(name) == REPOSITORY / "configs" / name.removeprefix("configs/")


def test_a_file_of_the_user_comes_before_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yml").touch()
    assert find_config_file("demo.yml") == Path("demo.yml")
    assert find_config_file("missing.yml") == Path("missing.yml")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_the_wheel_runs_without_the_repository(tmp_path):
    built = run("uv", "build", "--wheel", "--out-dir", tmp_path, cwd=REPOSITORY)
    assert built.returncode == 0, built
    (wheel,) = tmp_path.glob("reid_strong-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    modules = {f"reid/{file.relative_to(REPOSITORY / 'reid')}" for file in (REPOSITORY / "reid").rglob("*.py")}
    configs = {f"reid/{file.relative_to(REPOSITORY)}" for file in (REPOSITORY / "configs").rglob("*.y*ml")}
    assert names >= modules | configs | {"reid/py.typed"}
    site = str(tmp_path / "site")
    shown = run(sys.executable, "-c", "import reid; print(reid.__file__)", cwd=tmp_path, PYTHONPATH=site)
    assert shown.stdout.startswith(site)
    planned = run(
        sys.executable, "-m", "reid", "plan", "--config_file", "softmax_triplet.yml", cwd=tmp_path, PYTHONPATH=site
    )
    assert (planned.returncode, planned.stdout) == (0, "1\nruns/softmax_triplet\n"), planned
