"""A misspelt setting is detected in code and in text, without running either."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from setting_names import Schema, faults_in_code, faults_in_text

from reid.config.schema import NO_EFFECT, SETTINGS

REPOSITORY = Path(__file__).parent.parent
CODE = ("reid", "launch", "benchmarks", "tests")
SCHEMA = Schema(SETTINGS)
IN_TEXT = Schema([*SETTINGS, *NO_EFFECT])  # messages name the keys of reid-strong-baseline too
# Deliberately wrong names: file and part of the line.
MISSPELT_ON_PURPOSE = {("benchmarks/startup.py", "SOLVER.BASELR")}  # measures how fast a typo is refused


def files(*patterns: str) -> dict[str, str]:
    paths = [path for pattern in patterns for path in sorted(REPOSITORY.glob(pattern))]
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in paths}


def test_every_setting_that_code_uses_exists():
    sources = files(*(f"{folder}/**/*.py" for folder in CODE))
    assert {name.partition("/")[0] for name in sources} == set(CODE)
    assert [str(fault) for fault in faults_in_code(sources, SCHEMA)] == []


def test_every_setting_that_a_text_names_exists():
    """Messages, comments and docstrings of code, scripts, documentation, and the headers of configurations."""
    scripts = ("slurm/*.sh", "slurm/*.sbatch", "configs/**/*.y*ml", "benchmarks/*.yml")
    texts = files("reid/**/*.py", "launch/*.py", "benchmarks/*.py", "README.md", "docs/*.md", *scripts)
    faults = [fault for name, text in texts.items() for fault in faults_in_text(name, text, IN_TEXT)]
    unexpected = [
        fault
        for fault in faults
        if not any(fault.file == file and key in fault.message for file, key in MISSPELT_ON_PURPOSE)
    ]
    assert [str(fault) for fault in unexpected] == []
    assert len(faults) == len(MISSPELT_ON_PURPOSE)


# ---- that the check sees what it should ----

# Each with one use of a setting, written as NAME.
USES = {
    "direct": "def f(cfg): return cfg.SOLVER.NAME",
    "attribute": "class A:\n    def f(self): return self._cfg.SOLVER.NAME",
    "of another object": "def f(ours): return ours.cfg.SOLVER.NAME",
    "of a call": "def f(): return load_config(None, []).SOLVER.NAME",
    "in an f-string": "def f(cfg): return f'{cfg.SOLVER.NAME:.3f}'",
    "with a method": "def f(cfg): return cfg.SOLVER.NAME.split('+')",
    "argument": "def f(cfg): g(cfg.SOLVER.NAME + 1)",
    "stored": "def f(cfg): cfg.SOLVER.NAME = 1",
    "alias": "def f(cfg):\n    rates = cfg.SOLVER\n    return rates.NAME",
    "alias of an alias": "def f(cfg):\n    a = cfg\n    b = a.SOLVER\n    return b.NAME",
    "alias of one of two": "def f(cfg):\n    a, b = cfg.SOLVER, cfg.MODEL\n    return a.NAME",
    "alias with a type": "def f(cfg):\n    a: CfgNode = cfg.SOLVER\n    return a.NAME",
    "walrus": "def f(cfg): return (a := cfg.SOLVER) and a.NAME",
    "with": "def f(cfg):\n    with cfg.SOLVER as a:\n        return a.NAME",
    "loop": "def f(cfg):\n    for a in (cfg.SOLVER,):\n        return a.NAME",
    "comprehension": "def f(cfg): return [a.NAME for a in [cfg.SOLVER]]",
    "copy": "def f(cfg):\n    a = cfg.clone()\n    return a.SOLVER.NAME",
    "either": "def f(cfg, other):\n    a = cfg.SOLVER if other else other\n    return a.NAME",
    "closure": "def f(cfg):\n    a = cfg.SOLVER\n    def g(): return a.NAME",
    "lambda": "def f(cfg):\n    a = cfg.SOLVER\n    return lambda: a.NAME",
    "parameter named as a section": "def f(solver): return solver.NAME",
    "parameter": "def f(a): return a.NAME\ndef g(cfg): return f(cfg.SOLVER)",
    "parameter by keyword": "def f(*, a): return a.NAME\ndef g(cfg): return f(a=cfg.SOLVER)",
    "parameter of a class": "class A:\n    def __init__(self, a): self.b = a.NAME\ndef g(cfg): return A(cfg.SOLVER)",
    "attribute that holds a section": (
        "class A:\n    def __init__(self, cfg): self._a = cfg.SOLVER\n    def f(self): return self._a.NAME"
    ),
    "returned": "def f(cfg): return cfg.SOLVER\ndef g(cfg): return f(cfg).NAME",
}


def messages(source: str) -> list[str]:
    return [fault.message for fault in faults_in_code({"a.py": dedent(source)}, SCHEMA)]


@pytest.mark.parametrize("source", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("typo", ["BASE_LRX", "BASELR", "IF_WITH_CENTER", "SOLVER"])
def test_a_misspelt_setting_is_reported(source, typo):
    assert messages(source.replace("NAME", "BASE_LR")) == []
    (message,) = messages(source.replace("NAME", typo))
    assert message.endswith(f".{typo}: SOLVER has no {typo}")


BY_ITS_NAME = "parameter named as a section"  # whose lower-case attributes may be those of a model or a test


@pytest.mark.parametrize("source", [source for name, source in USES.items() if name != BY_ITS_NAME])
@pytest.mark.parametrize("typo", ["Base_LR", "base_lr"])
def test_a_setting_in_another_case_is_reported(source, typo):
    (message,) = messages(source.replace("NAME", typo))
    assert message.endswith(f".{typo}: SOLVER has no {typo}")


@pytest.mark.parametrize("source", [source for name, source in USES.items() if name != BY_ITS_NAME])
def test_a_misspelt_section_is_reported(source):
    assert messages(source.replace("NAME", "BASE_LR").replace(".SOLVER", ".SOLVR"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(cfg): return cfg.SEEDS", "the configuration has no SEEDS"),
        ("def f(cfg): return cfg.DATASETS.SYNTHETIC.SEEDS", "DATASETS.SYNTHETIC has no SEEDS"),
        ("def f(cfg): return cfg.DATASETS.SYNTETIC.SEED", "DATASETS has no SYNTETIC"),
        ("def f(cfg): return cfg.SOLVER.STEPS.BASE_LR", "SOLVER.STEPS is a setting, not a section, and has no BASE_LR"),
        ("def f(x): return x.BASE_LR", "x is known neither as a configuration nor as a module or class"),
    ],
)
def test_the_report_names_what_does_not_exist(source, expected):
    (message,) = messages(source)
    assert message.endswith(f": {expected}")


def test_attributes_of_modules_classes_and_self_are_no_settings():
    source = """
    import signal
    from enum import Enum
    class Kind(Enum):
        FIRST = 1
        OTHER: int
        def is_first(self): return self is Kind.FIRST or self.OTHER
    class A:
        def __init__(self): self.BN = signal.SIGTERM
        def f(self, x): return self.BN, x.T
    """
    assert messages(source) == []


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ('f"SOLVER.BASE_LR must be > 0, got {value}"', []),
        ('f"SOLVER.BASE_LRS must be > 0, got {value}"', ["SOLVER.BASE_LRS is no setting"]),
        ('f"{name}: SOLVER.BASELR={value}; lower it"', ["SOLVER.BASELR is no setting"]),
        ('f"use SOLVR.BASE_LR {value}"', ["SOLVR.BASE_LR is no setting"]),
        ("# lower SOLVER.Base_LR", ["SOLVER.Base_LR is no setting"]),
        ("`DATASETS.SYNTHETIC.SEED`, DATASETS.CUHK03.*, `DATASETS.SYNTHETIC`", []),
        ("DATASETS.SYNTHETIC.SEEDS", ["DATASETS.SYNTHETIC.SEEDS is no setting"]),
        ("TEST.WEIGHT.", []),
        ('key.startswith(("MODEL.PRETRAIN_", "TEST."))', []),
        ("MODEL.PRETRAINED_", ["MODEL.PRETRAINED_ is no setting"]),
        ("train.sbatch, U.S.A, README.md, A.B", []),
        ("cfg.SOLVER.BASE_LRS is for the other check", []),
    ],
)
def test_misspelt_settings_in_text_are_reported(text, reported):
    assert [fault.message for fault in faults_in_text("a.md", text, SCHEMA)] == reported
