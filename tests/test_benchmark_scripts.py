"""The scripts in benchmarks/: each runs and prints its tables, and run.py writes them into RESULTS.md."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Import from their folder first, as when they are started; undo everything afterwards."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(SCRIPTS)):
            del sys.modules[name]


def tables(text: str) -> list[tuple[str, list[dict[str, str]]]]:
    """Return title and rows of every table in the text."""
    result = []
    for title, lines in re.findall(r"^(\S.*)\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines())
        result.append((title, [dict(zip(header, row, strict=True)) for row in rows]))
    return result


def test_both_pipelines_give_equal_images(tmp_path):
    script = importlib.import_module("input")
    (path,) = script.write_files(tmp_path, 1)
    script.RECIPE = script.augment.Recipe(script.SIZE, 0.0, script.PADDING, 0.0, 0)
    script.build_store(tmp_path / "store.npy", [path], script.SIZE)
    stored = torch.from_numpy(script.open_store(tmp_path / "store.npy", 1, script.SIZE).copy())
    middle = torch.tensor([[0, script.PADDING, script.PADDING, 0, 0, 0, 0]], dtype=torch.int32)
    mean, std = torch.tensor(script.MEAN), torch.tensor(script.STD)
    ours = script.augment.augment(stored, middle, script.PADDING, mean, std)

    class Middle:
        random = staticmethod(lambda: 1.0)
        randrange = staticmethod(lambda stop: stop // 2)

    torch.testing.assert_close(script.pil_batch([path], Middle()), ours, rtol=0, atol=1e-6)


def test_scaling_on_paper(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick"])
    importlib.import_module("scaling").main()
    _, (_, weak), *_ = tables(capsys.readouterr().out)
    shares = [float(row["of the ideal"].removesuffix(" %")) for row in weak]
    assert shares[0] == 100
    assert shares == sorted(shares, reverse=True)


# ---- run.py ----


def test_only_the_named_part_is_replaced():
    run = importlib.import_module("run")
    text = run.with_section("# Results\n\nText.\n", "step", "one")
    text = run.with_section(text, "sampler", "two")
    assert text.startswith("# Results\n\nText.\n\n## Training step\n\n<!-- begin step -->\none\n<!-- end step -->\n")
    text = text.replace("<!-- end step -->", "<!-- end step -->\n\nIts meaning.")
    again = run.with_section(text, "step", "three")
    assert again == text.replace("one", "three")


def test_every_script_is_a_part():
    run = importlib.import_module("run")
    helpers = {"tables", "measuring", "embeddings", "communication_measured", "continuity_restarts", "run"}
    elsewhere = {"wandb_outages"}  # its table is in docs/wandb.md
    assert {file.stem for file in SCRIPTS.glob("*.py")} - helpers - elsewhere == set(run.PARTS)


def test_results_file_has_every_part():
    run, text = importlib.import_module("run"), (SCRIPTS / "RESULTS.md").read_text()
    for part in run.PARTS:
        begin, end = run.marks(part)
        assert re.search(f"{begin}\n`uv run python benchmarks/{part}.py.*`, commit .*{end}", text, flags=re.DOTALL), (
            part
        )


@pytest.mark.slow
def test_run_writes_the_tables_of_every_part(tmp_path, monkeypatch):
    run = importlib.import_module("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(tmp_path / "results.md")])
    assert run.main() == 0
    text = (tmp_path / "results.md").read_text()
    for part in run.PARTS:
        begin, end = run.marks(part)
        printed = tables(text.partition(begin)[2].partition(end)[0])
        assert printed, part
        assert all(rows for _, rows in printed), part


def test_a_part_that_fails_stays_as_it_was(tmp_path, monkeypatch, capsys):
    run = importlib.import_module("run")
    (tmp_path / "sampler.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "results.md").write_text("before\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path / "results.md"), "sampler"])
    assert run.main() == 1
    assert (tmp_path / "results.md").read_text() == "before\n"
    assert "sampler.py ended with 3; its part stays as it was" in capsys.readouterr().out
