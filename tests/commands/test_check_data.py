import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from program import TIMEOUT

from reid.commands.check_data import main
from reid.config.benchmark_names import NAMES
from reid.data.benchmarks.sources import DOCUMENTED, SOURCES, Count

LAUNCHER = Path(__file__).parents[2] / "launch" / "data.py"
IMAGES = {
    "bounding_box_train": ["0001_c1.jpg", "0002_c2.jpg"],
    "query": ["0003_c1.jpg"],
    "bounding_box_test": ["0003_c2.jpg", "0000_c1.jpg", "-1_c1.jpg"],
}
WHOLE = {"train": Count(2, 2), "query": Count(1, 1), "gallery": Count(2, 2)}


def write(root: Path) -> Path:
    for folder, names in IMAGES.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 8)).save(root / folder / name)
    return root


@pytest.fixture
def whole(tmp_path, monkeypatch) -> Path:
    """A folder of benchmarks with Market-1501 as documented, for which the documented numbers are made small."""
    monkeypatch.setitem(DOCUMENTED, "market1501", WHOLE)
    write(tmp_path / "market1501")
    return tmp_path


def check(capsys, *arguments) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    return code, capsys.readouterr().out


def section(out: str, name: str) -> list[str]:
    """What is said about one benchmark, without the indentation."""
    lines = out.splitlines()
    start = lines.index(name)
    return [line.strip() for line in lines[start + 1 : lines.index("", start)]]


def test_all_benchmarks_are_described_and_present_ones_checked(whole, capsys):
    code, out = check(capsys, "--root", whole)
    assert code == 0
    for name in NAMES:
        said = section(out, name)
        assert said[0] == f"paper: {SOURCES[name].paper}"
        assert said[1] == f"get it: {SOURCES[name].get}"
        assert all(line.strip() in said for line in SOURCES[name].tree.splitlines())
        assert said[-1] == ("fine" if name == "market1501" else "yours: absent")


def test_what_is_found(whole, capsys):
    code, out = check(capsys, "market1501", f"DATASETS.ROOT_DIR={whole}")
    assert code == 0
    said = section(out, "market1501")
    found = said[said.index(f"yours: {whole / 'market1501'}") :]
    assert [line.split() for line in found[1:-1]] == [
        ["ids", "images", "cameras", "documented"],
        ["train", "2", "2", "2", "2", "ids,", "2", "images"],
        ["query", "1", "1", "1", "1", "ids,", "1", "images"],
        ["gallery", "2", "2", "2", "2", "ids,", "2", "images"],
    ]
    assert "veri" not in out.splitlines()


def test_what_is_missing(whole, capsys):
    (whole / "market1501" / "bounding_box_train" / "0001_c1.jpg").rename(
        whole / "market1501" / "bounding_box_train" / "0002_c1.jpg"
    )
    (whole / "market1501" / "bounding_box_train" / "0004_c1.jpg").touch()
    (whole / "market1501" / "bounding_box_test" / "0000_c1.jpg").unlink()
    code, out = check(capsys, "market1501", "--root", whole)
    assert code == 2
    assert section(out, "market1501")[-2:] == [
        "wrong: train has 3 of 2 images and 2 of 2 identities",
        "wrong: gallery has 1 of 2 images and 1 of 2 identities",
    ]


def test_a_benchmark_that_is_asked_for_must_be_there(whole, capsys):
    code, out = check(capsys, "market1501", "veri", "--root", whole)
    assert code == 2
    assert section(out, "market1501")[-1] == "fine"
    wrong = section(out, "veri")[-1]
    assert wrong.startswith(f"wrong: {whole} ")
    assert "image_train, image_query, image_test" in wrong
    assert "DATASETS.ROOT_DIR" in wrong


def test_complete_part_of_incomplete_benchmark_is_reported(whole, capsys):
    (whole / "market1501" / "query").rename(whole / "away")
    code, out = check(capsys, "--root", whole)  # found without being asked for
    assert code == 2
    said = section(out, "market1501")
    wrong = next(place for place, line in enumerate(said) if line.startswith("wrong:"))
    assert "lacks query " in said[wrong]
    assert said[wrong + 1] == f"but what train needs is in {whole / 'market1501'}:"
    assert said[-1].split()[:3] == ["train", "2", "2"]


def test_images_are_opened_only_when_asked(whole, capsys):
    bad = whole / "market1501" / "query" / "0003_c1.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    assert check(capsys, "market1501", "--root", whole)[0] == 0
    code, out = check(capsys, "market1501", "--root", whole, "--images")
    assert code == 2
    (fault,) = [line for line in section(out, "market1501") if line.startswith("wrong:")]
    assert "1 of 5" in fault
    assert f"{bad} (" in fault
    Image.new("RGB", (4, 8)).save(bad)
    assert check(capsys, "market1501", "--images", "--root", whole)[0] == 0


def test_a_table(tmp_path, capsys):
    table = tmp_path / "my, own.csv"
    rows = ["path,pid,camid,split", "a.png,x,1,train", "b.png,y,1,train", "c.png,z,1,query", "d.png,z,2,gallery"]
    table.write_text("\n".join(rows))
    for name in "abcd":
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    code, out = check(capsys, table, "--images")
    assert code == 0
    assert section(out, str(table))[-1] == "fine"
    (tmp_path / "d.png").unlink()
    code, out = check(capsys, table)
    assert code == 2
    assert "1 of 1" in out
    assert str(tmp_path / "d.png") in out


def test_settings_choose_the_form(tmp_path, capsys):
    code, out = check(capsys, "vehicleid", "DATASETS.VEHICLEID.TEST=2400", "--root", tmp_path)
    assert code == 2
    assert "train_test_split/test_list_2400.txt" in out
    config = tmp_path / "x.yml"
    config.write_text("DATASETS: {VEHICLEID: {TEST: 1600}}")
    _, out = check(capsys, "vehicleid", "--config_file", config, "--root", tmp_path)
    assert "train_test_split/test_list_1600.txt" in out


@pytest.mark.parametrize(
    ("arguments", "key", "part"),
    [
        (["market"], "DATASETS.NAMES", "market1501?"),
        (["market1501", "veri", "market1501"], "DATASETS.NAMES", "[market1501,veri]"),
        (["market1501", "DATASETS.VEHICLEID.TEST=7"], "DATASETS.VEHICLEID.TEST", "800, "),
        (["DATASETS.ROOT=x"], "DATASETS.ROOT ", "?"),
    ],
)
def test_invalid_command_line_is_reported_in_one_sentence(capsys, arguments, key, part):
    assert main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert key in captured.err
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_the_program_needs_no_torch(whole):
    # Neither the program nor what it imports; and the numbers are the true ones again.
    code = f"""
import runpy, sys
sys.argv = [{str(LAUNCHER)!r}, "check", "market1501", "--root", {str(whole)!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 2, end.code
assert not {{"torch", "ignite", "accelerate", "h5py", "scipy", "pyarrow"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert "wrong: train has 2 of 12,936 images and 2 of 751 identities" in done.stdout
