"""Tables of images: CSV and Parquet.

Also covers reid.data.benchmarks.splits, reid.data.benchmarks.folders.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from refusals import refused

from reid.data.benchmarks.splits import fingerprint
from reid.data.benchmarks.tables import read_table
from reid.errors import DataError, WorldError

ROWS = [
    ("train/7_a.jpg", "7", "1", "train"),
    ("train/2_a.jpg", "2", "12", "train"),
    ("train/30.jpg", "30", "2", "train"),
    ("q.jpg", "10", "0", "query"),
    ("test/g.jpg", "10", "3", "gallery"),
    ("test/junk.jpg", "-1", "3", "gallery"),
    ("test/stranger.jpg", "0", "3", "gallery"),
]
HEADER = ("path", "pid", "camid", "split")


def touch(folder: Path, rows=ROWS) -> Path:
    for path, *_ in rows:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def write(folder: Path, rows=ROWS, header=HEADER, name="people.csv", separator=",", end="\n", start="") -> Path:
    """Write the table and its images, which are empty files."""
    touch(folder, rows)
    lines = [separator.join(cells) for cells in (header, *rows)]
    (folder / name).write_bytes((start + end.join([*lines, ""])).encode("utf-8"))
    return folder / name


def write_parquet(folder: Path, columns: dict, name="people.parquet") -> Path:
    parquet.write_table(pa.table(columns), folder / name)
    return folder / name


def assert_refused(table: Path, *keywords: str, kind=DataError) -> None:
    """Assert that the error is about the setting that names tables, names this one, and is one line."""
    with refused(kind, "DATASETS.NAMES", str(table), *keywords):
        read_table(str(table), Path("nowhere"))


def names_of(split) -> list[str]:
    return [path.name for path in split.paths]


def test_a_table(tmp_path):
    table = write(tmp_path)
    benchmark = read_table(str(table), Path("nowhere"))
    assert (benchmark.name, benchmark.root, benchmark.single_gallery_shot) == ("people", table, False)
    assert benchmark.train.paths == tuple(tmp_path / "train" / name for name in ("2_a.jpg", "30.jpg", "7_a.jpg"))
    assert benchmark.train.pids.tolist() == [0, 2, 1]  # of 2, 30, 7
    assert benchmark.train.camids.tolist() == [12, 2, 1]
    assert benchmark.query.pids.tolist() == [10]
    assert benchmark.gallery.pids.tolist() == [10, 0]  # junk is gone
    assert benchmark.gallery.camids.tolist() == [3, 3]
    assert benchmark.gallery.pids.dtype == np.int64


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_dialects(tmp_path, separator, end, start):
    same = write(tmp_path / "a"), write(tmp_path / "b", separator=separator, end=end, start=start)
    one, other = (fingerprint(read_table(str(table), tmp_path)) for table in same)
    assert one == other


def test_quoted_cells_spaces_further_columns_and_their_order(tmp_path):
    rows = [(split, f" {pid} ", "note, with comma", path, camid) for path, pid, camid, split in ROWS]
    touch(tmp_path)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("Split", "PID", "note", " path ", "camid"), *rows])
    read, plain = read_table(str(tmp_path / "t.csv"), tmp_path), read_table(str(write(tmp_path)), tmp_path)
    assert fingerprint(read) == fingerprint(plain)


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    one = read_table(str(write(tmp_path, name="a.csv")), tmp_path)
    other = read_table(str(write(tmp_path, ROWS[::-1], name="b.csv")), tmp_path)
    assert fingerprint(one) == fingerprint(other)


def test_fingerprint_ignores_moved_folder_but_not_changed_path(tmp_path, monkeypatch):
    one = read_table(str(write(tmp_path / "a")), tmp_path)
    other = read_table(str(write(tmp_path / "b" / "c")), tmp_path)
    assert fingerprint(one) == fingerprint(other)
    monkeypatch.chdir(tmp_path / "a")
    assert fingerprint(read_table("people.csv", tmp_path)) == fingerprint(one)
    changed = [("test/q.jpg", *ROWS[3][1:]) if row[0] == "q.jpg" else row for row in ROWS]
    assert fingerprint(read_table(str(write(tmp_path / "c", changed)), tmp_path)) != fingerprint(one)


def test_where_a_table_is_looked_for(tmp_path, monkeypatch):
    table = write(tmp_path / "data" / "sets")
    monkeypatch.chdir(tmp_path)
    for name, root_dir in (("data/sets/people.csv", "data"), ("sets/people.csv", "data"), (str(table), "nowhere")):
        assert read_table(name, Path(root_dir)).root == table
    with refused(DataError, "DATASETS.NAMES", "people.csv", str(tmp_path / "data" / "people.csv")):
        read_table("people.csv", Path("data"))


def test_names_of_tables_are_names_of_files(tmp_path):
    assert read_table(str(write(tmp_path, name="my people (v1).CSV")), tmp_path).name == "my_people__v1_"


def test_absolute_paths(tmp_path):
    rows = [(str(tmp_path / "far" / path), *rest) for path, *rest in ROWS]
    (tmp_path / "near").mkdir()
    write(tmp_path / "near", rows)
    benchmark = read_table(str(tmp_path / "near" / "people.csv"), tmp_path)
    assert benchmark.query.paths == (tmp_path / "far" / "q.jpg",)


# ---- who and where ----


def relabelled(pids: dict[str, str], camids=None) -> list[tuple[str, ...]]:
    camids = camids or {}
    return [(path, pids.get(pid, pid), camids.get(camid, camid), split) for path, pid, camid, split in ROWS]


def test_pids_and_cameras_of_any_text(tmp_path):
    names = {"7": "Zoë", "2": "anna", "30": "02", "10": "Bob", "0": "?"}
    rows = relabelled(names, {"0": "door", "3": "yard", "1": "yard", "12": "hall", "2": "door"})
    benchmark = read_table(str(write(tmp_path, rows)), tmp_path)
    assert names_of(benchmark.train) == ["2_a.jpg", "30.jpg", "7_a.jpg"]
    assert benchmark.train.pids.tolist() == [2, 0, 1]  # sorted: 02, Zoë, anna
    order = sorted(names.values())
    assert benchmark.query.pids.tolist() == [order.index("Bob")]
    assert benchmark.gallery.pids.tolist() == [order.index("Bob"), order.index("?")]
    assert benchmark.train.camids.tolist() == [1, 0, 2]  # door, hall, yard
    assert benchmark.query.camids.tolist() == [0]
    assert benchmark.gallery.camids.tolist() == [2, 2]


def test_pids_are_compared_as_text(tmp_path):
    benchmark = read_table(str(write(tmp_path, relabelled({"7": "2", "30": "02"}))), tmp_path)
    assert benchmark.train.pids.tolist() == [1, 0, 1]  # 2, 02, 2


def test_zero_padded_numbers_keep_their_value(tmp_path):
    benchmark = read_table(str(write(tmp_path, relabelled({"10": "0010", "7": "0007"}))), tmp_path)
    assert benchmark.query.pids.tolist() == [10]


@pytest.mark.parametrize("junk", ["-1", "-1.0"])
def test_junk_is_dropped_in_all_splits(tmp_path, junk):
    more = [(f"{split}/junk.png", junk, "5", split) for split in ("train", "query", "gallery")]
    plain = read_table(str(write(tmp_path)), tmp_path)
    benchmark = read_table(str(write(tmp_path, [*ROWS[:5], ROWS[6], *more], name="people.csv")), tmp_path)
    assert fingerprint(benchmark) == fingerprint(plain)


def test_too_large_and_other_negative_numbers_are_read_as_text(tmp_path):
    rows = relabelled({"10": str(10**30), "0": "-2"}, {"3": "-1"})
    benchmark = read_table(str(write(tmp_path, rows)), tmp_path)
    assert (benchmark.query.pids >= 0).all()
    assert benchmark.query.pids.tolist() == benchmark.gallery.pids.tolist()[:1]
    assert len(benchmark.gallery) == 2
    assert (benchmark.gallery.camids >= 0).all()


@given(st.lists(st.sampled_from(["-1", "0", "1", "01", "a", "b", "10", "9"]), min_size=4, max_size=12))
def test_pids_are_a_function_of_the_text_and_keep_people_apart(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    rows = [(f"{number}.jpg", text, str(number % 2), "train") for number, text in enumerate(texts)]
    people = sorted({text for text in texts if text != "-1"})
    table = write(folder, rows)
    if len(people) < 2:
        with refused(DataError, "DATASETS.NAMES", f"got {len(people)}" if people else "-1"):
            read_table(str(table), folder, ["train"])
        return
    train = read_table(str(table), folder, ["train"]).train
    text_of = {path.name: text for path, text, *_ in ((Path(row[0]), *row[1:]) for row in rows)}
    pairs = {(text_of[path.name], pid) for path, pid in zip(train.paths, train.pids.tolist(), strict=True)}
    assert {text for text, _ in pairs} == set(people)
    assert sorted(pid for _, pid in pairs) == list(range(len(people)))


# ---- parts ----


def test_a_table_of_one_part(tmp_path):
    table = write(tmp_path, [row for row in ROWS if row[3] == "train"])
    assert len(read_table(str(table), tmp_path, ["train"]).gallery) == 0
    assert_refused(table, "train, query, gallery", "none of query")
    table = write(tmp_path, [row for row in ROWS if row[3] != "train"])
    assert len(read_table(str(table), tmp_path, ["test"]).train) == 0


def test_images_of_another_part_need_not_be_there(tmp_path):
    table = write(tmp_path)
    (tmp_path / "q.jpg").unlink()
    assert len(read_table(str(table), tmp_path, ["train"]).train) == 3
    assert_refused(table, "1 of 1", "q.jpg")


def test_pids_do_not_depend_on_the_part(tmp_path):
    table = write(tmp_path, relabelled({"7": "Zoë", "10": "Bob"}))
    both, part = read_table(str(table), tmp_path), read_table(str(table), tmp_path, ["test"])
    assert both.query.pids.tolist() == part.query.pids.tolist()


# ---- what is wrong ----


def test_columns(tmp_path):
    table = write(tmp_path, header=("path", "id", "camid", "split"))
    assert_refused(table, "lacks pid ", "path, id, camid, split")
    table = write(tmp_path, header=("path", "pid", "camid", "PID"))
    assert_refused(table, "lacks split ")
    rows = [(*row, row[1]) for row in ROWS]
    assert_refused(write(tmp_path, rows, header=(*HEADER, "PID")), "repeats pid")
    assert_refused(write(tmp_path, header=("a", "b", "", "c"), separator="|"), "lacks path, pid, camid, split ")
    (tmp_path / "people.csv").write_text("")
    assert_refused(tmp_path / "people.csv", "lacks path, pid, camid, split ", "nothing")


@pytest.mark.parametrize("column", range(4))
def test_empty_cells(tmp_path, column):
    row = [*ROWS[2][:column], " ", *ROWS[2][column + 1 :]]
    table = write(tmp_path)
    table.write_text(table.read_text().replace(",".join(ROWS[2]), ",".join(row)))
    assert_refused(table, f"a {HEADER[column]}", "line 4")


def test_splits_of_another_name(tmp_path):
    rows = [*ROWS[:-1], (*ROWS[-1][:3], "val"), ("v.jpg", "1", "1", "Test")]
    assert_refused(write(tmp_path, rows), "train, query, gallery", "'val' in line 8", "'test' in line 9")


def test_rows_that_are_too_short_or_too_long(tmp_path):
    for extra in (("x.jpg", "1", "1", "train", "more"), ("x.jpg", "1", "1")):
        table = write(tmp_path, [*ROWS, extra])
        assert_refused(table, "4 cells", f"got {len(extra)}", "line 9")


def test_missing_images(tmp_path):
    table = write(tmp_path)
    (tmp_path / "train" / "7_a.jpg").unlink()
    assert_refused(table, "1 of 3", str(tmp_path / "train" / "7_a.jpg"))
    table = write(tmp_path / "b")
    for file in sorted((tmp_path / "b" / "test").iterdir()):
        file.unlink()
    (tmp_path / "b" / "test").rmdir()
    assert_refused(table, "3 of 3")


def test_an_image_that_is_named_twice_in_a_split(tmp_path):
    assert_refused(write(tmp_path, [*ROWS, (*ROWS[0][:1], "8", *ROWS[0][2:])]), "1 are repeated", "7_a.jpg")
    both = [*ROWS, ("q.jpg", "10", "0", "gallery")]  # in two splits it may be
    assert len(read_table(str(write(tmp_path, both)), tmp_path).gallery) == 3


def test_content_that_is_no_table(tmp_path):
    table = tmp_path / "people.csv"
    table.write_bytes("path,pid,camid,split\nä.jpg,1,1,train\n".encode("latin-1"))
    assert_refused(table, "UTF-8", "0xe4", "line 2")
    table.write_bytes("path,pid,camid,split\n".encode("utf-16"))
    assert_refused(table, "UTF-8")
    table.write_bytes(b"path,pid,camid,split\na\0.jpg,1,1,train\n")
    assert_refused(table, "zero byte")
    table.write_text('path,pid,camid,split\n"a.jpg,1,1,train\n')
    assert_refused(table, "CSV", "line 2")
    table.write_text("path,pid,camid,split\n\n")
    assert_refused(table, "row", "none")


def test_queries_that_have_no_match(tmp_path):
    assert_refused(write(tmp_path, relabelled({}, {"3": "0"})), "another camera", "1 queries")


# ---- Parquet ----


def columns(**changes) -> dict:
    return {**{name: [row[index] for row in ROWS] for index, name in enumerate(HEADER)}, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pid": [int(row[1]) for row in ROWS], "camid": [int(row[2]) for row in ROWS]},
        {"pid": [float(row[1]) for row in ROWS], "more": [None] * 7},
        {"pid": pa.array([row[1] for row in ROWS]).dictionary_encode()},
        {"path": pa.array([row[0] for row in ROWS], pa.large_string())},
    ],
)
def test_parquet_is_as_csv(tmp_path, changes):
    plain = read_table(str(write(tmp_path)), tmp_path)
    benchmark = read_table(str(write_parquet(tmp_path, columns(**changes))), tmp_path)
    assert benchmark.name == "people"
    assert fingerprint(benchmark) == fingerprint(plain)


def test_what_is_wrong_with_a_parquet_table(tmp_path):
    touch(tmp_path)
    without = {name: values for name, values in columns().items() if name != "camid"}
    assert_refused(write_parquet(tmp_path, without), "lacks camid ")
    gaps = [int(row[1]) if index else None for index, row in enumerate(ROWS)]
    assert_refused(write_parquet(tmp_path, columns(pid=gaps)), "a pid", "(row 1)")
    nan = [float("nan"), *range(6)]
    assert_refused(write_parquet(tmp_path, columns(pid=nan)), "a pid", "(row 1)")
    flags = columns(pid=[True] * 7)
    assert_refused(write_parquet(tmp_path, flags), "pid", "got True", "row 1")
    nested = columns(pid=[[1]] * 7)
    assert_refused(write_parquet(tmp_path, nested), "pid", "got [1]", "row 1")
    zero = columns(path=["a\0b.jpg", *[row[0] for row in ROWS[1:]]])
    assert_refused(write_parquet(tmp_path, zero), "1 of 3")
    (tmp_path / "people.parquet").write_bytes(b"PAR1 nonsense")
    assert_refused(tmp_path / "people.parquet", "Parquet")
    (tmp_path / "people.parquet").write_bytes(b"")
    assert_refused(tmp_path / "people.parquet", "Parquet")


def test_parquet_without_its_package(tmp_path, monkeypatch):
    table = write_parquet(tmp_path, columns())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(table, "pyarrow", "uv sync --extra parquet", kind=WorldError)
