"""The scripts in benchmarks/: each runs, and its tables say what they must; run.py puts them where they belong."""

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
    """Their folder is the first to import from, as when they are started; nothing of them stays."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(SCRIPTS)):
            del sys.modules[name]


def printed(script, monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    importlib.import_module(script).main()
    return capsys.readouterr().out


def tables(text: str) -> list[tuple[str, list[dict[str, str]]]]:
    """Title and rows of every table in the text."""
    found = []
    for title, lines in re.findall(r"^(\S.*)\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines())
        found.append((title, [dict(zip(header, row, strict=True)) for row in rows]))
    return found


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_evaluation(monkeypatch, capsys):
    (title, speed), (_, law) = tables(printed("evaluation", monkeypatch, capsys, "--quick", "--rounds", "1"))
    assert "Q = 337, G = 1,591, D = 2,048" in title
    assert "0.0022 TFLOP in 2 blocks, each of which reads the gallery's 0.013 GB" in title
    assert [row["way"] for row in speed] == [
        *("product (limit)", "cosine", "Euclidean", "Euclidean, untrained", "Euclidean, untrained, ties"),
    ]
    assert all(number(row["CPU s"]) > 0 for row in speed)
    assert number(law[1]["G"]) == 100_000
    assert number(law[1]["GB above"]) < 1


def test_input(monkeypatch, capsys):
    (_, store), (_, parts), (_, cores) = tables(printed("input", monkeypatch, capsys, "--quick"))
    assert [row["what"] for row in store] == ["decoding alone (limit)", "store"]
    speeds = {row["what"]: number(row["images per CPU s"]) for row in parts}
    assert speeds["gather"] > speeds["batch: gather, draw, augment"]
    assert {row["what"]: row["target"] for row in parts}["gather"] == "50,000"
    assert [number(row["cores"]) > 0 for row in cores] == [True] * 5


def test_both_pipelines_give_images_alike(tmp_path):
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


def test_step(monkeypatch, capsys):
    (title, ways), (_, parts) = tables(printed("step", monkeypatch, capsys, "--quick", "--rounds", "1"))
    assert title.startswith("resnet18, batch 16, 64 x 32, fp32, on cpu")
    assert [row["way"] for row in ways][:3] == ["backbone alone (limit)", "bare loop", "training, defaults"]
    assert {"training, no fused optimiser", "training, other memory format"} <= {row["way"] for row in ways}
    assert number(parts[0]["GFLOP"]) == pytest.approx(3 * 16 * 0.19, rel=0.3)  # forward; twice backward
    assert parts[-1]["part"] == "all but the backbone"


def test_sampler(monkeypatch, capsys):
    text = printed("sampler", monkeypatch, capsys, "--quick")
    (_, plans), (_, parts) = tables(text)
    assert [row["data"] for row in plans] == ["Market-1501", "MSMT17"]
    assert [row["ranks"] for row in parts] == ["1", "8", "64"]
    assert [row["images a rank"] for row in parts] == ["2,048", "256", "32"]
    assert "16,384 ranks with 4 images each, a batch of 65,536" in text


def test_startup(monkeypatch, capsys):
    ((_, answers),) = tables(printed("startup", monkeypatch, capsys, "--quick"))
    assert len(answers) == 4
    assert all(number(row["s"]) > 0 for row in answers)


def test_scaling_on_paper(monkeypatch, capsys):
    text = printed("scaling", monkeypatch, capsys, "--quick")
    assert "GFLOP forward, three times that to train an image" in text
    _, (_, weak), (_, strong), (_, evaluation) = tables(text)
    assert [row["GPUs"] for row in weak] == ["1", "8", "16", "64", "256", "1,024"]
    assert weak[0]["of the ideal"] == "100 %"
    assert [number(row["batch"]) for row in strong] == [512] * len(strong)
    assert number(evaluation[0]["all"]) > number(evaluation[1]["all"])


# ---- run.py ----


def test_a_part_is_replaced_and_all_else_stays():
    run = importlib.import_module("run")
    text = run.with_section("# Results\n\nWords.\n", "step", "one")
    text = run.with_section(text, "sampler", "two")
    assert text.startswith("# Results\n\nWords.\n\n## Training step\n\n<!-- begin step -->\none\n<!-- end step -->\n")
    text = text.replace("<!-- end step -->", "<!-- end step -->\n\nWhat it means.")
    again = run.with_section(text, "step", "three")
    assert again == text.replace("one", "three")


def test_every_script_is_a_part():
    run = importlib.import_module("run")
    helpers = {"tables", "measuring", "embeddings", "communication_measured", "continuity_restarts", "run"}
    elsewhere = {"wandb_outages"}  # whose table stands in docs/wandb.md
    assert {file.stem for file in SCRIPTS.glob("*.py")} - helpers - elsewhere == set(run.PARTS)


def test_the_file_of_results_has_every_part():
    run, text = importlib.import_module("run"), (SCRIPTS / "RESULTS.md").read_text()
    for part in run.PARTS:
        begin, end = run.marks(part)
        assert re.search(f"{begin}\n`uv run python benchmarks/{part}.py.*`, commit .*{end}", text, flags=re.DOTALL), (
            part
        )


@pytest.mark.parametrize(
    "parts",
    [
        ["sampler"],
        pytest.param(["reranking", "communication", "continuity", "scaling"], marks=pytest.mark.slow),
    ],
)
def test_it_runs_parts_and_writes_them_down(tmp_path, monkeypatch, capsys, parts):
    run = importlib.import_module("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--output", str(tmp_path / "results.md"), *parts])
    assert run.main() == 0
    text = (tmp_path / "results.md").read_text()
    for part in parts:
        begin, end = run.marks(part)
        content = text.partition(begin)[2].partition(end)[0]
        assert content.startswith(f"\n`uv run python benchmarks/{part}.py --quick`, commit ")
        assert len(tables(content)) >= 1
        assert content.strip() in capsys.readouterr().out or len(parts) > 1


def test_a_part_that_fails_stays_as_it_was(tmp_path, monkeypatch, capsys):
    run = importlib.import_module("run")
    (tmp_path / "sampler.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "results.md").write_text("before\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path / "results.md"), "sampler"])
    assert run.main() == 1
    assert (tmp_path / "results.md").read_text() == "before\n"
    assert "sampler.py ended with 3; its part stays as it was" in capsys.readouterr().out
