"""Rules that `lint-imports` does not check: sizes, owners of torch's submodules, settings, tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import reid
from reid.config.schema import SETTINGS

PACKAGE = Path(reid.__file__).parent
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
MODULES = {name: tree for name, tree in TREES.items() if not name.endswith("__init__.py")}
PACKAGES = sorted({Path(name).parent.as_posix() for name in MODULES} - {"."})


def imported_by(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("library", ["torch.distributed", "ignite.distributed"])
def test_only_the_package_distributed_imports(library):
    """import-linter does not distinguish the submodules of a library."""
    prefix = f"{library}."
    users = {name for name, tree in MODULES.items() if any(f"{n}.".startswith(prefix) for n in imported_by(tree))}
    assert {name.split("/")[0] for name in users} == {"distributed"}


def test_only_few_modules_read_rank_environment_variables():
    variables = re.compile(r"\b(LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|SLURM_\w+)\b")
    readers = {name for name, tree in MODULES.items() for text in _strings(tree) if variables.search(text)}
    # main.py asks which process reports for a node before the ranks are known.
    assert {name for name in readers if not name.startswith("distributed/")} <= {"commands/main.py"}


def _strings(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_no_package_has_too_many_files():
    assert sum("/" not in name for name in MODULES) <= 5
    sizes = {package: sum(Path(name).parent.as_posix() == package for name in MODULES) for package in PACKAGES}
    assert {package: size for package, size in sizes.items() if size > 15} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_describes_itself_and_exports_nothing(package):
    docstring, *others = TREES[f"{package}/__init__.py"].body
    assert ast.get_docstring(TREES[f"{package}/__init__.py"])
    assert isinstance(docstring, ast.Expr)
    assert others == []


def test_the_map_names_every_package():
    assert reid.__doc__ is not None
    named = re.findall(r"^    (\w+)/ ", reid.__doc__, flags=re.MULTILINE)
    assert sorted(named) == [package for package in PACKAGES if "/" not in package]
    assert len(reid.__doc__.splitlines()) <= 30


def test_no_file_is_too_long():
    lengths = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 340} == {}


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_read(key):
    *_, name = key.split(".")
    assert any(re.search(rf"\.{name}\b", file.read_text()) for name_, file in FILES.items() if "schema" not in name_)


# ---- English ----

NO_SENTENCE = re.compile(r"(Of|As|What|Whether|Where|Rather|For|From|How|The same|Its?|Who|When|If)\b")
PRIVATE = re.compile(
    r"\b(stor(y|ies)|told|trunks?|settled?|begun|optimiser\w*|initialis\w+|synchronis\w+|colours?)\b", re.I
)


@pytest.mark.parametrize("name", FILES)
def test_docstrings_begin_as_sentences(name):
    nodes = (node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module))
    first_lines = [(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes]
    assert [line for line in first_lines if NO_SENTENCE.match(line)] == []


@pytest.mark.parametrize("name", FILES)
def test_words_are_those_of_the_field(name):
    assert [word[0] for word in PRIVATE.finditer(FILES[name].read_text())] == []


# ---- the tests ----

TESTS = {file: ast.parse(file.read_text()) for file in sorted(Path(__file__).parent.rglob("test_*.py"))}


def test_every_module_has_its_tests():
    """Each in a test file of the same name, or in one whose docstring names the module."""
    tested = {file.stem.removeprefix("test_") for file in TESTS}
    covered = " ".join(ast.get_docstring(tree) or "" for tree in TESTS.values())
    dotted = {name: "reid." + name.removesuffix(".py").replace("/", ".") for name in MODULES}
    missing = [
        name
        for name in MODULES
        if Path(name).stem not in tested and not re.search(rf"{dotted[name]}\b(?!\.\w)", covered)
    ]
    assert missing == []


def test_test_names_have_at_most_60_characters():
    names = [node.name for tree in TESTS.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith("test_") and len(name) > 60] == []
