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
COUNTS = {"train": Count(2, 2), "query": Count(1, 1), "gallery": Count(2, 2)}


def write(root: Path) -> Path:
    for folder, names in IMAGES.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 8)).save(root / folder / name)
    return root


@pytest.fixture
def root_dir(tmp_path, monkeypatch) -> Path:
    """Return a folder of benchmarks in which Market-1501 has the documented numbers, made small."""
    monkeypatch.setitem(DOCUMENTED, "market1501", COUNTS)
    write(tmp_path / "market1501")
    return tmp_path


def check(capsys, *arguments) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    return code, capsys.readouterr().out


def section(out: str, name: str) -> list[str]:
    """Return the lines on one benchmark without their indentation."""
    lines = out.splitlines()
    start = lines.index(name)
    return [line.strip() for line in lines[start + 1 : lines.index("", start)]]


def test_all_benchmarks_are_described_and_present_ones_checked(root_dir, capsys):
    code, out = check(capsys, "--root", root_dir)
    assert code == 0
    for name in NAMES:
        lines = section(out, name)
        assert lines[0] == f"paper: {SOURCES[name].paper}"
        assert lines[1] == f"get it: {SOURCES[name].get}"
        assert all(line.strip() in lines for line in SOURCES[name].tree.splitlines())
        assert lines[-1] == ("fine" if name == "market1501" else "yours: absent")


def test_numbers_of_a_complete_benchmark(root_dir, capsys):
    code, out = check(capsys, "market1501", f"DATASETS.ROOT_DIR={root_dir}")
    assert code == 0
    lines = section(out, "market1501")
    rows = lines[lines.index(f"yours: {root_dir / 'market1501'}") :]
    assert [line.split() for line in rows[1:-1]] == [
        ["ids", "images", "cameras", "documented"],
        ["train", "2", "2", "2", "2", "ids,", "2", "images"],
        ["query", "1", "1", "1", "1", "ids,", "1", "images"],
        ["gallery", "2", "2", "2", "2", "ids,", "2", "images"],
    ]
    assert "veri" not in out.splitlines()


def test_missing_images_are_reported(root_dir, capsys):
    (root_dir / "market1501" / "bounding_box_train" / "0001_c1.jpg").rename(
        root_dir / "market1501" / "bounding_box_train" / "0002_c1.jpg"
    )
    (root_dir / "market1501" / "bounding_box_train" / "0004_c1.jpg").touch()
    (root_dir / "market1501" / "bounding_box_test" / "0000_c1.jpg").unlink()
    code, out = check(capsys, "market1501", "--root", root_dir)
    assert code == 2
    assert section(out, "market1501")[-2:] == [
        "wrong: train has 3 of 2 images and 2 of 2 identities",
        "wrong: gallery has 1 of 2 images and 1 of 2 identities",
    ]


def test_a_named_benchmark_must_exist(root_dir, capsys):
    code, out = check(capsys, "market1501", "veri", "--root", root_dir)
    assert code == 2
    assert section(out, "market1501")[-1] == "fine"
    wrong = section(out, "veri")[-1]
    assert wrong.startswith(f"wrong: {root_dir} ")
    assert "image_train, image_query, image_test" in wrong
    assert "DATASETS.ROOT_DIR" in wrong


def test_complete_part_of_incomplete_benchmark_is_reported(root_dir, capsys):
    (root_dir / "market1501" / "query").rename(root_dir / "away")
    code, out = check(capsys, "--root", root_dir)  # verified without being named
    assert code == 2
    lines = section(out, "market1501")
    wrong = next(index for index, line in enumerate(lines) if line.startswith("wrong:"))
    assert "lacks query " in lines[wrong]
    assert lines[wrong + 1] == f"but complete for train: {root_dir / 'market1501'}"
    assert lines[-1].split()[:3] == ["train", "2", "2"]


def test_images_are_opened_only_when_asked(root_dir, capsys):
    bad = root_dir / "market1501" / "query" / "0003_c1.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    assert check(capsys, "market1501", "--root", root_dir)[0] == 0
    code, out = check(capsys, "market1501", "--root", root_dir, "--images")
    assert code == 2
    (fault,) = [line for line in section(out, "market1501") if line.startswith("wrong:")]
    assert "1 of 5" in fault
    assert f"{bad} (" in fault
    Image.new("RGB", (4, 8)).save(bad)
    assert check(capsys, "market1501", "--images", "--root", root_dir)[0] == 0


def test_a_table(tmp_path, capsys):
    table = tmp_path / "my, table.csv"
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


def test_the_program_does_not_import_torch(root_dir):
    # The fixture's numbers do not reach the other process, which compares with the real ones.
    code = f"""
import runpy, sys
sys.argv = [{str(LAUNCHER)!r}, "check", "market1501", "--root", {str(root_dir)!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 2, end.code
assert not {{"torch", "ignite", "accelerate", "h5py", "scipy", "pyarrow"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert "wrong: train has 2 of 12,936 images and 2 of 751 identities" in done.stdout
