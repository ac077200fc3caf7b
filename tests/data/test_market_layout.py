import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from reid.config.benchmark_names import BenchmarkOptions
from reid.data.benchmarks.market_layout import FOLDERS, parse_name, read_market_layout
from reid.data.benchmarks.splits import fingerprint
from reid.errors import DataError

market1501, dukemtmc, veri, synthetic = (
    partial(read_market_layout, name) for name in ("market1501", "dukemtmc", "veri", "synthetic")
)

TRAIN_NAMES = ("0007_c1s1_000001_00.jpg", "0007_c2s1_000001_00.jpg", "0002_c3s1_000001_00.jpg")
QUERY_NAMES = ("0010_c1s1_000001_00.jpg", "0011_c2s1_000001_00.jpg")
GALLERY_NAMES = ("0010_c2s1_000001_00.jpg", "0000_c1s1_000001_00.jpg", "-1_c1s1_000001_00.jpg")


def write(root: Path, train=TRAIN_NAMES, query=QUERY_NAMES, gallery=GALLERY_NAMES) -> Path:
    """Write a data set of empty files; the readers open no image."""
    for folder, names in zip(FOLDERS, (train, query, gallery), strict=True):
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()
    return root


def names_of(split) -> list[str]:
    return [path.name for path in split.paths]


def assert_refused(root_dir: Path, *keywords: str) -> None:
    """Assert that the error is about the folder of the data sets, names it, and is one line."""
    with refused(DataError, "DATASETS.ROOT_DIR", "DATASETS.ROOT_DIR", str(root_dir), *keywords):
        market1501(root_dir)


def test_splits(tmp_path):
    root = write(tmp_path / "market1501")
    benchmark = market1501(tmp_path)
    assert (benchmark.name, benchmark.root, benchmark.num_train_pids) == ("market1501", root, 2)

    assert names_of(benchmark.train) == sorted(TRAIN_NAMES)
    assert benchmark.train.pids.tolist() == [0, 1, 1]  # raw 2, 7, 7
    assert benchmark.train.camids.tolist() == [2, 0, 1]
    assert benchmark.query.pids.tolist() == [10, 11]
    assert benchmark.query.camids.tolist() == [0, 1]
    # The distractor stays, the junk goes.
    assert benchmark.gallery.pids.tolist() == [0, 10]
    assert benchmark.gallery.paths == tuple(root / "bounding_box_test" / name for name in sorted(GALLERY_NAMES[:2]))
    for split in (benchmark.train, benchmark.query, benchmark.gallery):
        assert split.pids.dtype == split.camids.dtype == np.int64
        assert len(split) == len(split.paths) == len(split.pids) == len(split.camids)


def test_labels_follow_the_sorted_pids(tmp_path):
    # 702 pids out of 1..7140: the labels that reid-strong-baseline makes of a set depend on the order of the listing.
    raw = np.random.default_rng(0).choice(np.arange(1, 7141), 702, replace=False).tolist()
    write(tmp_path, train=[f"{pid}_c1.jpg" for pid in raw])
    train = market1501(tmp_path).train
    label_of = {int(path.name.split("_")[0]): label for path, label in zip(train.paths, train.pids, strict=True)}
    assert label_of == {pid: label for label, pid in enumerate(sorted(raw))}


def test_the_order_of_creation_does_not_matter(tmp_path):
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", TRAIN_NAMES[::-1], QUERY_NAMES[::-1], GALLERY_NAMES[::-1])
    for a, b in ((market1501(one).train, market1501(other).train), (market1501(one).query, market1501(other).query)):
        assert names_of(a) == names_of(b) == sorted(names_of(a))
        assert a.pids.tolist() == b.pids.tolist()


def test_only_the_file_name_counts(tmp_path):
    write(tmp_path / "run-2_c3" / "0099_c4" / "market1501")
    benchmark = market1501(tmp_path / "run-2_c3" / "0099_c4")
    assert benchmark.query.pids.tolist() == [10, 11]
    assert benchmark.query.camids.tolist() == [0, 1]


def test_cameras_of_several_digits(tmp_path):
    write(tmp_path, query=["0010_c1.jpg", "0010_c10.jpg", "0010_c123s1.jpg"])
    assert market1501(tmp_path).query.camids.tolist() == [0, 9, 122]


@pytest.mark.parametrize("folder", ["market1501", "Market-1501-v15.09.15", "."])
def test_folder_is_located(tmp_path, folder):
    root = write(tmp_path / folder)
    assert market1501(tmp_path).root == root


def test_complete_folder_is_preferred_to_incomplete_one(tmp_path):
    (tmp_path / "market1501" / "query").mkdir(parents=True)
    root = write(tmp_path / "Market-1501-v15.09.15")
    assert market1501(tmp_path).root == root


def test_image_suffixes_and_other_files(tmp_path):
    root = write(tmp_path, train=["1_c1.jpg", "2_c1.JPG", "3_c1.Jpeg", "4_c1.png", "5_c1.BMP", "Thumbs.db", "info.txt"])
    for other in ("._1_c1.jpg", ".hidden.jpg", "9_c1.gif", "jpg"):
        (root / "bounding_box_train" / other).touch()
    (root / "bounding_box_train" / "8_c1.jpg").mkdir()
    (root / "bounding_box_train" / "8_c1.jpg" / "7_c1.jpg").touch()
    assert names_of(market1501(tmp_path).train) == ["1_c1.jpg", "2_c1.JPG", "3_c1.Jpeg", "4_c1.png", "5_c1.BMP"]


def test_a_broken_link_is_not_passed_over(tmp_path):
    root = write(tmp_path)
    (root / "query" / "0012_c1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert market1501(tmp_path).query.pids.tolist() == [10, 11, 12]


def test_distractors_are_not_trained_on(tmp_path, caplog):
    root = write(tmp_path, train=[*TRAIN_NAMES, "0000_c1.jpg", "0000_c2.jpg", "-1_c1.jpg"])
    with caplog.at_level(logging.WARNING, logger="reid"):
        train = market1501(tmp_path).train
    assert names_of(train) == sorted(TRAIN_NAMES)
    assert train.pids.tolist() == [0, 1, 1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{root / 'bounding_box_train'}: the 2 images of pid 0" in caplog.text


def test_no_warning_without_distractors_in_training(tmp_path, caplog):
    write(tmp_path)
    market1501(tmp_path)
    assert not caplog.records


def test_missing_root(tmp_path):
    assert_refused(tmp_path / "nowhere", "folder")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "folder")


def test_nothing_there(tmp_path):
    (tmp_path / "dukemtmc").mkdir()
    assert_refused(tmp_path, "dukemtmc", str(tmp_path / "market1501"))


@pytest.mark.parametrize("missing", FOLDERS)
def test_missing_folder(tmp_path, missing):
    root = write(tmp_path / "market1501")
    shutil.rmtree(root / missing)
    present = ", ".join(sorted(set(FOLDERS) - {missing}))
    assert_refused(tmp_path, str(root), f"lacks {missing} ", present)


@pytest.mark.parametrize("empty", FOLDERS)
@pytest.mark.parametrize("others", [(), ("Thumbs.db",), tuple(f"{i:02d}.txt" for i in range(12))])
def test_folder_without_an_image(tmp_path, empty, others):
    root = write(tmp_path)
    shutil.rmtree(root / empty)
    (root / empty).mkdir()
    for name in others:
        (root / empty / name).touch()
    first = {0: "nothing", 1: "Thumbs.db", 12: ", ".join(others[:8]) + " and 4 more"}[len(others)]
    assert_refused(tmp_path, str(root / empty), first)


def test_misnamed_images(tmp_path):
    write(tmp_path, query=[*QUERY_NAMES, *(f"person{i:02d}.jpg" for i in range(10))])
    assert_refused(
        tmp_path, str(tmp_path / "query"), "PID_cCAMERA", "10 of 12", "person00.jpg, person01.jpg, ", "and 2 more"
    )


def test_misnamed_image_whose_name_is_no_text(tmp_path):
    root = write(tmp_path)
    (root / "query" / "caf\udce9.jpg").touch()
    assert_refused(tmp_path, "caf\\udce9.jpg")


def test_no_match_at_all(tmp_path):
    # The same camera only, and another identity.
    write(tmp_path, query=["0010_c2.jpg", "0044_c1.jpg"])
    assert_refused(tmp_path, "2 queries")


def test_a_query_without_a_match_is_accepted_among_others(tmp_path):
    write(tmp_path, query=["0010_c2.jpg", "0044_c1.jpg", "0010_c1.jpg"])
    assert len(market1501(tmp_path).query) == 3


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_junk(tmp_path, folder):
    key = dict(zip(FOLDERS, ("train", "query", "gallery"), strict=True))[folder]
    write(tmp_path, **{key: ["-1_c1.jpg", "-1_c2.jpg"]})
    assert_refused(tmp_path, str(tmp_path / folder), "pid -1")


def test_only_one_identity_to_train(tmp_path):
    write(tmp_path, train=["0007_c1.jpg", "0007_c2.jpg", "-1_c1.jpg"])
    assert_refused(tmp_path, "2 identities", "got 1")


def test_identities_may_be_both_trained_and_tested(tmp_path):
    write(tmp_path, train=["0010_c1.jpg", "0011_c1.jpg"])
    assert market1501(tmp_path).num_train_pids == 2


def test_other_dataset_is_not_accepted_as_synthetic(tmp_path):
    write(tmp_path)
    with refused(DataError, "DATASETS.ROOT_DIR", "DATASETS.ROOT_DIR", "holds synthetic"):
        synthetic(tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("market1501", "market1501/Market-1501-v15.09.15"),
        ("dukemtmc", "dukemtmc-reid/DukeMTMC-reID"),
        ("dukemtmc", "DukeMTMC-reID"),
        ("dukemtmc", "dukemtmc"),
        ("dukemtmc", "."),
        ("occluded_duke", "Occluded_Duke"),
        ("occluded_duke", "."),
        ("synthetic", "synthetic"),
    ],
)
def test_each_benchmark_is_located_in_its_folders(tmp_path, name, folder):
    root = write(tmp_path / folder)
    benchmark = read_market_layout(name, tmp_path)
    assert (benchmark.name, benchmark.root) == (name, root)
    assert benchmark.gallery.pids.tolist() == [0, 10]


def test_names_of_dukemtmc(tmp_path):
    write(
        tmp_path / "dukemtmc",
        train=["0001_c2_f0046182.jpg", "0005_c8_f0046182.jpg", "7140_c1_f0000001.jpg"],
        query=["0002_c1_f0046182.jpg"],
        gallery=["0002_c8_f0046302.jpg", "0039_c4_f0000001.jpg"],
    )
    benchmark = dukemtmc(tmp_path)
    assert benchmark.train.pids.tolist() == [0, 1, 2]
    assert benchmark.train.camids.tolist() == [1, 7, 0]
    assert benchmark.gallery.pids.tolist() == [2, 39]
    assert not benchmark.single_gallery_shot


@pytest.mark.parametrize("folder", ["veri", "VeRi", "."])
def test_veri(tmp_path, folder):
    names = {
        "image_train": ["0001_c001_00016450_0.jpg", "0776_c020_00000001_0.jpg", "-1_c003_00000002_0.jpg"],
        "image_query": ["0002_c002_00030600_0.jpg"],
        "image_test": ["0002_c010_00030640_0.jpg", "-1_c010_00030640_1.jpg"],
    }
    for split, images in names.items():
        (tmp_path / folder / split).mkdir(parents=True)
        for name in images:
            (tmp_path / folder / split / name).touch()
    benchmark = veri(tmp_path)
    assert benchmark.train.pids.tolist() == [0, 1]
    assert benchmark.train.camids.tolist() == [0, 19]
    assert benchmark.gallery.pids.tolist() == [2]
    assert benchmark.gallery.camids.tolist() == [9]
    with refused(DataError, "DATASETS.ROOT_DIR", "lacks bounding_box_train, query, bounding_box_test"):
        market1501(tmp_path)


# ---- parts ----


def test_a_part_that_is_not_asked_for_need_not_be_there(tmp_path):
    root = write(tmp_path / "market1501")
    shutil.rmtree(root / "query")
    (root / "bounding_box_test" / "nonsense.jpg").touch()
    benchmark = market1501(tmp_path, parts=["train"])
    assert benchmark.num_train_pids == 2
    assert (len(benchmark.query), len(benchmark.gallery)) == (0, 0)
    assert [line.split()[0] for line in benchmark.statistics().splitlines()] == ["market1501", "train"]
    with refused(DataError, "DATASETS.ROOT_DIR", "hold query, bounding_box_test", "lacks query "):
        market1501(tmp_path, parts=["test"])


def test_a_benchmark_to_test_needs_no_training_folder(tmp_path):
    root = write(tmp_path / "market1501")
    shutil.rmtree(root / "bounding_box_train")
    benchmark = market1501(tmp_path, parts=["test"])
    assert (len(benchmark.train), benchmark.num_train_pids) == (0, 0)
    assert benchmark.train.pids.dtype == np.int64
    assert benchmark.query.pids.tolist() == [10, 11]
    with refused(DataError, "DATASETS.ROOT_DIR", "lacks bounding_box_train "):
        market1501(tmp_path)


def test_folder_that_has_the_requested_part_is_used(tmp_path):
    shutil.rmtree(write(tmp_path / "market1501") / "bounding_box_train")
    complete = write(tmp_path / "Market-1501-v15.09.15")
    assert market1501(tmp_path, parts=["train"]).root == complete
    assert market1501(tmp_path, parts=["test"]).root == tmp_path / "market1501"


# ---- the 500,000 distractors ----

WITH_DISTRACTORS = BenchmarkOptions(market1501_distractors=True)


@pytest.mark.parametrize("folder", ["images", "distractors_500k", "distractors"])
def test_distractors_join_the_gallery_as_pid_0(tmp_path, folder):
    root = write(tmp_path / "market1501")
    (root / folder).mkdir()
    for name in ("0000_c3s1_000001_00.jpg", "0010_c1s1_000002_00.jpg", "-1_c2s1_000003_00.jpg", "anything.jpg"):
        (root / folder / name).touch()
    gallery = market1501(tmp_path, WITH_DISTRACTORS).gallery
    assert names_of(gallery)[:2] == names_of(market1501(tmp_path).gallery)
    assert gallery.pids.tolist() == [0, 10, 0, 0, 0, 0]
    assert gallery.camids.tolist()[2:] == [1, 2, 0, 0]  # of -1, 0000, 0010, anything
    assert len(gallery.paths) == len(set(gallery.paths))


def test_distractors_that_are_not_there(tmp_path):
    write(tmp_path / "market1501")
    with refused(DataError, "DATASETS.MARKET1501.DISTRACTORS", "images, distractors_500k, distractors", "500,000"):
        market1501(tmp_path, WITH_DISTRACTORS)
    assert len(market1501(tmp_path, WITH_DISTRACTORS, ["train"]).train) == 3


def test_statistics(tmp_path):
    write(tmp_path)
    assert [line.split() for line in market1501(tmp_path).statistics().splitlines()] == [
        ["market1501", "ids", "images", "cameras"],
        ["train", "2", "3", "3"],
        ["query", "2", "2", "2"],
        ["gallery", "2", "2", "2"],
    ]


def test_fingerprint_depends_on_content_not_on_location(tmp_path):
    first = market1501(write(tmp_path / "a"))
    second = market1501(write(tmp_path / "b" / "c" / "market1501"))
    assert fingerprint(first) == fingerprint(second)
    assert len(fingerprint(first)) == 64
    assert fingerprint(first.train) == fingerprint(second.train)
    assert fingerprint(first.train) != fingerprint(first.query)


@pytest.mark.parametrize("change", ["train", "query", "gallery"])
def test_fingerprint_changes_with_any_file_name(tmp_path, change):
    names = {"train": TRAIN_NAMES, "query": QUERY_NAMES, "gallery": GALLERY_NAMES}
    first = market1501(write(tmp_path / "a", **names))
    changes = ([*names[change], "0013_c1.jpg"], [names[change][0], "0014_c1.jpg"], [*names[change][:-1], "0009_c9.jpg"])
    prints = {fingerprint(first)}
    for i, changed in enumerate(changes):
        prints.add(fingerprint(market1501(write(tmp_path / str(i), **{**names, change: changed}))))
    assert len(prints) == 4


def test_unreadable_folder_is_reported_in_one_sentence(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("reid.data.benchmarks.folders.os.scandir", refuse)  # root may read everything
    assert_refused(tmp_path, "Permission denied")


@given(
    pid=st.integers(-1, 2**63 - 1),
    camera=st.integers(1, 2**63 - 1),
    zeros=st.integers(0, 6),
    rest=st.sampled_from(["", ".jpg"]) | st.text().map(lambda text: f"_{text}") | st.just("s1_000451_03.jpg"),
)
def test_well_formed_names(pid, camera, zeros, rest):
    text = "-1" if pid == -1 else "0" * zeros + str(pid)
    assert parse_name(f"{text}_c{camera}{rest}") == (pid, camera - 1)


@given(st.text(max_size=30) | st.from_regex(r"-?\w{0,20}_c?\w{0,20}", fullmatch=True))
def test_any_name_is_parsed_from_its_own_start_or_rejected(name):
    parsed = parse_name(name)
    if parsed is not None:
        pid, camid = parsed
        head, _, tail = name.partition("_c")
        assert pid >= -1
        assert camid >= 0
        assert int(head) == pid
        assert tail.startswith(("0", str(camid + 1)))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "jpg",
        "x0001_c1.jpg",
        " 1_c1.jpg",
        "-2_c1.jpg",
        "-01_c1.jpg",
        "--1_c1.jpg",
        "+1_c1.jpg",
        "_c1.jpg",
        "1_c.jpg",
        "1_C1.jpg",
        "1c1.jpg",
        "1_cx1.jpg",
        "1_c0.jpg",  # cameras are counted from 1
        "1_c-1.jpg",
        "\u0661_c1.jpg",  # a digit, but not an ASCII one
        f"{2**63}_c1.jpg",
        f"1_c{2**63}.jpg",
    ],
)
def test_other_names_are_rejected(name):
    assert parse_name(name) is None
