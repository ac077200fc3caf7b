"""The rules of the house: who may import whom, the map, and that every setting is read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import reid
from reid.config.schema import SETTINGS

PACKAGE = Path(reid.__file__).parent
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: ast.parse(file.read_text()) for name, file in FILES.items() if not name.endswith("__init__.py")}

# Library -> the only files that may import it.
OWNERS = {
    "torch.distributed": {"distributed.py", "link_speed.py", "wrapping.py"},  # the last for sharded tensors
    "ignite.distributed": {"distributed.py"},
    "accelerate": {"wrapping.py"},
    "torch.utils.tensorboard": {"handlers/tensorboard.py"},
    "safetensors": {"safetensors_files.py", "timm_models.py"},
    "onnxruntime": {"export.py"},
    "matplotlib": {"pictures.py"},
    "wandb": {
        "handlers/tracking.py",
        "handlers/wandb_session.py",
        "handlers/wandb_process.py",
        "handlers/artifacts.py",
        "sweeps.py",
    },
    "psutil": {"handlers/wandb_process.py"},
    "yacs": {"config/load.py"},
}
# Pure functions on tensors and arrays: they may import each other and nothing else of ours but the errors.
MATHEMATICS = {
    "config/benchmark_names.py",
    "layouts.py",
    "losses.py",
    "metrics.py",
    "distances.py",
    "per_query.py",
    "ranking.py",
    "single_shot.py",
    "verification.py",
    "neighbours.py",
    "reranking.py",
    "tables_text.py",
    "examples.py",
    "pictures.py",
    "data/augment.py",
    "data/benchmarks.py",
    "data/cuhk03.py",
    "data/folders.py",
    "data/lists.py",
    "data/people.py",
    "data/photographs.py",
    "data/randomness.py",
    "data/samplers.py",
    "data/sources.py",
    "data/splits.py",
    "data/store.py",
    "data/synthetic.py",
    "data/large_files.py",
    "data/tables.py",
}
# Answer before torch is imported.
LIGHT = {
    "summarize.py",
    "tables_text.py",
    "errors.py",
    "environment_file.py",
    "world.py",
    "config/benchmark_names.py",
    "config/load.py",
    "config/parsing.py",
    "config/rules.py",
    "config/schema.py",
    "config/schema_data.py",
    "config/schema_model.py",
    "config/schema_output.py",
    "config/schema_solver.py",
    "config/validators.py",
    "launcher.py",
    "settings_command.py",
    "logs.py",
    "preemption.py",
    "commands.py",
}


def imports(name: str, *, only_at_run_time: bool = True) -> set[str]:
    """Full names of what a file imports; what stands under TYPE_CHECKING costs nothing and is left out."""
    found = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(MODULES[name]):
        if only_at_run_time and node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def top_level_imports(name: str) -> set[str]:
    tree = ast.Module(
        body=[node for node in MODULES[name].body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[]
    )
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own_files(imported: set[str]) -> set[str]:
    """The files of ours among the imported names."""
    files = set()
    for full_name in imported:
        parts = full_name.split(".")
        if parts[0] == "reid":
            candidates = ("/".join(parts[1:end]) + ".py" for end in (len(parts), len(parts) - 1))
            files.update(candidate for candidate in candidates if candidate in MODULES)
    return files


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_with_an_owner_is_imported_nowhere_else(library):
    users = {name for name in MODULES if any(f"{used}.".startswith(f"{library}.") for used in imports(name))}
    assert users == OWNERS[library]


@pytest.mark.parametrize("name", sorted(MATHEMATICS))
def test_mathematics_knows_nothing_of_assembly(name):
    assert own_files(imports(name, only_at_run_time=False)) <= MATHEMATICS | {"errors.py"}


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_settings_errors_come_before_torch(name):
    assert own_files(top_level_imports(name)) <= LIGHT
    assert not {used.split(".")[0] for used in top_level_imports(name)} & {"torch", "torchvision", "ignite", "numpy"}


def test_only_few_modules_read_rank_environment_variables():
    variables = re.compile(r"\b(LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|SLURM_\w+)\b")
    readers = {name for name, tree in MODULES.items() for text in _strings(tree) if variables.search(text)}
    # launcher.py asks who speaks for a node before the world is known; distributed.py takes Slurm's away from Ignite.
    assert readers <= {"world.py", "launcher.py", "distributed.py"}


def _strings(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_there_are_no_import_cycles():
    left = {name: own_files(top_level_imports(name)) for name in MODULES}
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"import cycle among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_the_map_names_every_file_once_and_no_other():
    assert reid.__doc__ is not None
    named = re.findall(r"^    (\S+\.py) ", reid.__doc__, flags=re.MULTILINE)
    assert sorted(named) == sorted(MODULES)


def test_packages_export_nothing_by_themselves():
    for name, file in FILES.items():
        if name.endswith("/__init__.py"):
            assert not ast.parse(file.read_text()).body[1:], "only a docstring"


def test_files_stay_readable():
    too_long = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert {name: lines for name, lines in too_long.items() if lines > 340} == {}


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_read(key):
    *_, name = key.split(".")
    sources = [text for file, text in _sources() if not file.startswith("config/schema")]
    assert any(re.search(rf"\.{name}\b", source) for source in sources)


def _sources() -> list[tuple[str, str]]:
    return [(name, file.read_text()) for name, file in FILES.items()]


# ---- the tests ----

TESTS = {file: ast.parse(file.read_text()) for file in sorted(Path(__file__).parent.rglob("test_*.py"))}


def test_every_module_has_its_tests():
    """In a file of its own name, or in one whose docstring says that it covers the module."""
    own = {file.stem.removeprefix("test_") for file in TESTS}
    covered = " ".join(ast.get_docstring(tree) or "" for tree in TESTS.values())
    dotted = {name: "reid." + name.removesuffix(".py").replace("/", ".") for name in MODULES}
    missing = [
        name for name in MODULES if Path(name).stem not in own and not re.search(rf"{dotted[name]}\b(?!\.\w)", covered)
    ]
    assert missing == []


def test_test_names_have_at_most_60_characters():
    names = [node.name for tree in TESTS.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith("test_") and len(name) > 60] == []
