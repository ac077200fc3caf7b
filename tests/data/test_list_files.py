import random
from collections import Counter
from pathlib import Path

import pytest
from refusals import refused

from reid.config.benchmark_names import BenchmarkOptions
from reid.data.benchmarks.list_files import msmt17, vehicleid
from reid.errors import DataError

TRAIN = ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_000_12_0303noon_0001_0.jpg 1"]
VAL = ["0000/0000_005_15_0303morning_0099_0.jpg 0", "0002/0002_005_03_0303noon_0001_0.jpg 2"]
QUERY = ["0000/0000_007_02_0303morning_0015_0.jpg 0"]
GALLERY = ["0000/0000_008_15_0303morning_0016_0.jpg 0", "0003/0003_008_01_0303morning_0016_0.jpg 3"]
V1, V2 = ("train", "test"), ("mask_train_v2", "mask_test_v2")


def write_msmt17(root: Path, folders=V1, train=TRAIN, val=VAL, query=QUERY, gallery=GALLERY, end="\n") -> Path:
    lists = {"train": (0, train), "val": (0, val), "query": (1, query), "gallery": (1, gallery)}
    for name, (index, lines) in lists.items():
        for line in lines:
            file = root / folders[index] / line.split(" ")[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        (root / f"list_{name}.txt").write_bytes(end.join([*lines, ""]).encode())
    return root


def assert_refused(reader, arguments: tuple, *keywords: str) -> None:
    """Assert that the error is about the folder of the data sets and is one line."""
    with refused(DataError, "DATASETS.ROOT_DIR", "DATASETS.ROOT_DIR", *keywords):
        reader(*arguments)


# ---- MSMT17 ----


@pytest.mark.parametrize(
    "folder", ["msmt17/MSMT17_V1", "MSMT17_V1", "msmt17/MSMT17_V2", "MSMT17_V2", "msmt17", "MSMT17", "."]
)
@pytest.mark.parametrize("folders", [V1, V2])
def test_both_versions_are_recognized_by_their_folders(tmp_path, folder, folders):
    root = write_msmt17(tmp_path / folder, folders)
    benchmark = msmt17(tmp_path)
    assert (benchmark.name, benchmark.root) == ("msmt17", root)
    assert benchmark.train.paths == tuple(root / folders[0] / line.split()[0] for line in TRAIN)
    assert benchmark.train.pids.tolist() == [0, 1]
    assert benchmark.train.camids.tolist() == [0, 11]
    assert benchmark.query.pids.tolist() == [0]  # a person as any other
    assert benchmark.query.camids.tolist() == [1]
    assert benchmark.gallery.pids.tolist() == [0, 3]
    assert benchmark.gallery.camids.tolist() == [14, 0]
    assert all(path.exists() for split in benchmark.splits.values() for path in split.paths)


def test_the_second_version_is_preferred(tmp_path):
    write_msmt17(tmp_path / "MSMT17_V1")
    root = write_msmt17(tmp_path / "MSMT17_V2", V2)
    assert msmt17(tmp_path).root == root
    write_msmt17(tmp_path / "both", V1)
    write_msmt17(tmp_path / "both", V2)
    assert msmt17(tmp_path / "both").train.paths[0].parts[-3] == "mask_train_v2"


def test_validation_images_are_trained_on_by_a_setting(tmp_path):
    write_msmt17(tmp_path)
    train = msmt17(tmp_path, BenchmarkOptions(msmt17_train="train+val")).train
    assert train.pids.tolist() == [0, 0, 1, 2]
    assert train.camids.tolist() == [0, 14, 11, 2]
    (tmp_path / "list_val.txt").unlink()
    assert len(msmt17(tmp_path).train) == 2
    assert_refused(msmt17, (tmp_path, BenchmarkOptions(msmt17_train="train+val")), "lacks list_val.txt ")


def test_labels_of_pids_that_are_not_dense(tmp_path):
    write_msmt17(tmp_path, train=[f"x/{pid:04d}_000_01_a.jpg {pid}" for pid in (900, 7, 31)])
    assert msmt17(tmp_path).train.pids.tolist() == [0, 1, 2]  # of 7, 31, 900


def test_camera_is_read_from_the_file_name_only(tmp_path):
    root = write_msmt17(tmp_path / "a_b_07_c" / "MSMT17_V1", train=["x_y_09_z/0000_000_02_a.jpg 0", TRAIN[1]])
    assert msmt17(root.parent).train.camids.tolist() == [11, 1]


def test_the_order_of_a_list_does_not_matter(tmp_path):
    one = msmt17(write_msmt17(tmp_path / "one"))
    other = msmt17(write_msmt17(tmp_path / "other", train=TRAIN[::-1], gallery=GALLERY[::-1]))
    assert one.train.pids.tolist() == other.train.pids.tolist()
    assert one.gallery.camids.tolist() == other.gallery.camids.tolist()


def test_lists_from_windows_with_empty_lines(tmp_path):
    write_msmt17(tmp_path, end="\r\n\r\n")
    lines = (tmp_path / "list_train.txt").read_bytes()
    (tmp_path / "list_train.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace(b" ", b"\t"))
    assert len(msmt17(tmp_path).train) == 2


def test_parts_of_msmt17(tmp_path):
    root = write_msmt17(tmp_path)
    (root / "list_query.txt").unlink()
    assert len(msmt17(tmp_path, parts=["train"]).train) == 2
    assert_refused(msmt17, (tmp_path,), "lacks list_query.txt ")
    write_msmt17(root)
    (root / "train").rename(root / "away")
    benchmark = msmt17(tmp_path, parts=["test"])
    assert (len(benchmark.train), len(benchmark.gallery)) == (0, 2)


def test_duplicate_line_counts_once_and_contradiction_is_error(tmp_path):
    write_msmt17(tmp_path, train=[*TRAIN, TRAIN[0]])
    assert len(msmt17(tmp_path).train) == 2
    write_msmt17(tmp_path / "b", train=[*TRAIN, TRAIN[0].replace(" 0", " 5")])
    location = f"{tmp_path / 'b' / 'list_train.txt'}, line 3"
    assert_refused(msmt17, (tmp_path / "b",), "0000_000_01_0303morning_0015_0.jpg", "0 and 5", location)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("0000/0000_000_01_a.jpg", "NAME PID"),
        ("0000/0000_000_01_a.jpg x", "NAME PID"),
        ("0000/0000_000_01_a.jpg 1.0", "NAME PID"),
        ("0000/0000_000_01_a.jpg -2", "NAME PID"),
        (f"0000/0000_000_01_a.jpg {2**63}", "NAME PID"),
        ("0000/0000_000_00_a.jpg 0", "cameras counted from 1"),
        ("0000/0000_000_x_a.jpg 0", "cameras counted from 1"),
        ("0000/0000_000.jpg 0", "cameras counted from 1"),
        ("a_b_01_c/0000.jpg 0", "cameras counted from 1"),
    ],
)
def test_a_line_of_another_form(tmp_path, line, part):
    write_msmt17(tmp_path, query=[*QUERY, line])
    assert_refused(msmt17, (tmp_path,), part, line.split()[0], "list_query.txt", "line 2")


def test_listed_images_that_are_missing(tmp_path):
    root = write_msmt17(tmp_path)
    (root / "test" / GALLERY[1].split()[0]).unlink()
    assert_refused(msmt17, (tmp_path,), "list_gallery.txt", "1 of 2", GALLERY[1].split()[0])


def test_an_empty_list_and_one_that_is_no_text(tmp_path):
    root = write_msmt17(tmp_path)
    (root / "list_gallery.txt").write_text("\n \n")
    assert_refused(msmt17, (tmp_path,), "list_gallery.txt", "empty")
    (root / "list_gallery.txt").write_bytes(b"\xff\xfe0")
    assert_refused(msmt17, (tmp_path,), "list_gallery.txt", "UTF-8")


def test_nothing_of_msmt17(tmp_path):
    lacking = "lacks mask_train_v2, mask_test_v2, list_train.txt, list_query.txt, list_gallery.txt"
    assert_refused(msmt17, (tmp_path,), lacking)


# ---- VehicleID ----

SIZES = {11: 3, 12: 1, 500: 4, 13: 2}  # images of each test vehicle


def write_vehicleid(root: Path, num_vehicles=800, shuffle=0) -> Path:
    train = [f"{number:07d} {pid}" for number, pid in ((5, 7), (6, 7), (1, 2), (2, 900))]
    test = [f"{100 * pid + number:07d} {pid}" for pid, size in SIZES.items() for number in range(size)]
    random.Random(shuffle).shuffle(test)
    for name in ("image", "train_test_split"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for line in train + test:
        (root / "image" / f"{line.split()[0]}.jpg").touch()
    (root / "train_test_split" / "train_list.txt").write_text("\n".join(train))
    (root / "train_test_split" / f"test_list_{num_vehicles}.txt").write_text("\n".join(test) + "\n")
    return root


@pytest.mark.parametrize("folder", ["VehicleID_V1.0", "vehicleid", "."])
def test_vehicleid(tmp_path, folder):
    root = write_vehicleid(tmp_path / folder)
    benchmark = vehicleid(tmp_path)
    assert (benchmark.name, benchmark.root) == ("vehicleid", root)
    assert [path.name for path in benchmark.train.paths] == [f"{number:07d}.jpg" for number in (1, 2, 5, 6)]
    assert benchmark.train.pids.tolist() == [0, 2, 1, 1]  # of 2, 900, 7, 7
    assert sorted(benchmark.gallery.pids.tolist()) == sorted(SIZES)
    assert Counter(benchmark.query.pids.tolist()) == {pid: size - 1 for pid, size in SIZES.items() if size > 1}
    assert not set(benchmark.query.paths) & set(benchmark.gallery.paths)
    assert set(benchmark.query.camids.tolist()) == {0}
    assert set(benchmark.gallery.camids.tolist()) == {1}


def test_the_gallery_of_vehicleid_is_drawn_from_the_names_alone(tmp_path):
    galleries = {vehicleid(write_vehicleid(tmp_path / "data", shuffle=seed)).gallery.paths for seed in range(4)}
    assert len(galleries) == 1
    # Neither the first nor the last image of each.
    root = write_vehicleid(tmp_path / "many")
    lines = [f"{1000 * pid + number:07d} {pid}" for pid in range(40) for number in range(10)]
    for line in lines:
        (root / "image" / f"{line.split()[0]}.jpg").touch()
    (root / "train_test_split" / "test_list_800.txt").write_text("\n".join(lines))
    drawn = Counter(int(path.stem) % 1000 for path in vehicleid(root).gallery.paths)
    assert len(drawn) == 10
    assert max(drawn.values()) < 12


def test_the_test_list_is_chosen_by_a_setting(tmp_path):
    write_vehicleid(tmp_path, num_vehicles=2400)
    assert len(vehicleid(tmp_path, BenchmarkOptions(vehicleid_test=2400)).gallery) == 4
    assert_refused(vehicleid, (tmp_path,), "lacks train_test_split/test_list_800.txt ")
    assert len(vehicleid(tmp_path, parts=["train"]).train) == 4


def test_vehicleid_names_may_have_a_suffix_and_must_exist(tmp_path):
    root = write_vehicleid(tmp_path)
    lists = root / "train_test_split"
    (lists / "train_list.txt").write_text("0000001.jpg 2\n0000002 900\n")
    assert len(vehicleid(tmp_path).train) == 2
    (lists / "train_list.txt").write_text("0000001 2\n0000009 900\n")
    assert_refused(vehicleid, (tmp_path,), "train_list.txt", "1 of 2", "0000009.jpg")
    (lists / "test_list_800.txt").write_text("0000001 2\n0000002 900\n")
    assert_refused(vehicleid, (tmp_path, BenchmarkOptions(), ["test"]), "test_list_800.txt", "two images")
