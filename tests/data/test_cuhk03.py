import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from refusals import refused
from scipy.io import savemat

from reid.config.benchmark_names import DEFAULTS, BenchmarkOptions
from reid.data.benchmarks.cuhk03 import cuhk03, prepare_cuhk03
from reid.data.benchmarks.splits import fingerprint
from reid.errors import DataError, WorldError

# (camera pair, person) -> slots of its images, of ten; the first five are of view 1.
PEOPLE = {(1, 1): (0, 1, 5), (1, 2): (0, 5, 6), (1, 3): (4, 9), (2, 1): (0, 5), (2, 2): (1, 2, 3, 5, 9), (2, 3): (5,)}
TEST_SETS = [[(1, 2), (2, 2)], [(1, 1), (1, 3), (2, 1)]]
NEW_TEST = {(1, 3): 3, (2, 1): 4, (2, 2): 5}  # with the pids of the configuration
NEW_TRAIN = {(2, 3): 6, (1, 1): 1, (1, 2): 2}
CLASSIC = BenchmarkOptions(cuhk03_protocol="classic")


def name_of(pair: int, person: int, slot: int) -> str:
    return f"{pair}_{person:03d}_{1 if slot < 5 else 2}_{slot + 1:02d}.png"


def pixels_of(pair: int, person: int, slot: int) -> np.ndarray:
    """Return pixels that are not square and all different, so that a wrong order of axes is noticed."""
    rng = np.random.default_rng([pair, person, slot])
    return rng.integers(0, 256, (7 + person, 4 + slot % 3, 3), dtype=np.uint8)


def write_mat(file: Path, people: Mapping[tuple[int, int], tuple[int, ...]] = PEOPLE, test_sets=TEST_SETS) -> None:
    """Write as MATLAB's `save -v7.3` does: cells are references into #refs#, axes are in Fortran's order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as content:
        held = content.create_group("#refs#")

        def hold(array: np.ndarray) -> h5py.Reference:
            return held.create_dataset(f"r{len(held)}", data=array).ref

        def cell(references: list[list[h5py.Reference]]) -> np.ndarray:
            """Return the rows of a MATLAB cell, transposed."""
            array = np.empty((len(references), len(references[0])), dtype=h5py.ref_dtype)
            for i, row in enumerate(references):
                for j, reference in enumerate(row):
                    array[i, j] = reference
            return array.T

        def hold_cell(references: list[list[h5py.Reference]]) -> h5py.Reference:
            return held.create_dataset(f"r{len(held)}", data=cell(references), dtype=h5py.ref_dtype).ref

        empty = hold(np.zeros(2, dtype=np.uint64))  # how MATLAB writes []
        for boxes in ("detected", "labeled"):
            pairs = []
            for pair in sorted({pair for pair, _ in people}):
                numbers = sorted(person for of, person in people if of == pair)
                rows = [
                    [
                        hold(pixels_of(pair, person, slot).T) if slot in people[pair, person] else empty
                        for slot in range(10)
                    ]
                    for person in numbers
                ]
                pairs.append([hold_cell(rows)])
            content.create_dataset(boxes, data=cell(pairs), dtype=h5py.ref_dtype)
        sets = [[hold(np.array(test_set, dtype=np.float64).T)] for test_set in test_sets]
        content.create_dataset("testsets", data=cell(sets), dtype=h5py.ref_dtype)


def write_config(file: Path, **changes) -> None:
    images = [(person, slot) for person, slots in PEOPLE.items() for slot in slots]
    pids = {**NEW_TRAIN, **NEW_TEST}
    test = [i for i, (person, _) in enumerate(images) if person in NEW_TEST]
    first = {(images[i][0], images[i][1] < 5): i for i in reversed(test)}  # one query of each person and view
    filelist = np.empty((len(images), 1), dtype=object)
    filelist[:, 0] = [name_of(*person, slot) for person, slot in images]
    content = {
        "filelist": filelist,
        "labels": np.array([[pids[person]] for person, _ in images], dtype=np.uint16),
        "train_idx": np.array([[i + 1] for i, (person, _) in enumerate(images) if person in NEW_TRAIN], np.uint16),
        "query_idx": np.array([[i + 1] for i in sorted(first.values())], dtype=np.uint16),
        "gallery_idx": np.array([[i + 1] for i in test if i not in first.values()], dtype=np.uint16),
        **changes,
    }
    savemat(file, content)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """CUHK03 as it is released; tests work on copies."""
    root = tmp_path_factory.mktemp("release") / "cuhk03"
    write_mat(root / "cuhk03_release" / "cuhk-03.mat")
    for boxes in ("detected", "labeled"):
        write_config(root / f"cuhk03_new_protocol_config_{boxes}.mat")
    return root


@pytest.fixture
def root(tmp_path, release) -> Path:
    shutil.copytree(release, tmp_path / "cuhk03")
    return tmp_path / "cuhk03"


def images_of(people) -> list[tuple[tuple[int, int], int]]:
    return [(person, slot) for person in people for slot in PEOPLE[person]]


def assert_refused(
    root_dir: Path, *keywords: str, options=DEFAULTS, key: str = "DATASETS.ROOT_DIR", kind=DataError
) -> None:
    """Assert that the error is about this setting and is one line."""
    with refused(kind, key, *keywords):
        cuhk03(root_dir, options)


def test_images_are_extracted_once(root):
    benchmark = cuhk03(root.parent)
    folder = root / "images_detected"
    names = {name_of(*person, slot): pixels_of(*person, slot) for person, slot in images_of(PEOPLE)}
    assert sorted(file.name for file in folder.iterdir()) == sorted(names)
    for name, pixels in names.items():
        with Image.open(folder / name) as image:
            assert np.array_equal(np.asarray(image), pixels)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert fingerprint(cuhk03(root.parent)) == fingerprint(benchmark)
    assert times == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert not list(root.glob(".*"))


def test_the_new_protocol(root):
    benchmark = cuhk03(root.parent)
    assert (benchmark.name, benchmark.root, benchmark.single_gallery_shot) == ("cuhk03", root, False)
    train = [(name_of(*person, slot), person, slot) for person, slot in images_of(sorted(NEW_TRAIN))]
    labels = {(1, 1): 0, (1, 2): 1, (2, 3): 2}  # of the pids 1, 2, 6
    assert [path.name for path in benchmark.train.paths] == [name for name, _, _ in train]
    assert benchmark.train.pids.tolist() == [labels[person] for _, person, _ in train]
    assert benchmark.train.camids.tolist() == [0 if slot < 5 else 1 for _, _, slot in train]
    query = ["1_003_1_05.png", "1_003_2_10.png", "2_001_1_01.png", "2_001_2_06.png", "2_002_1_02.png", "2_002_2_06.png"]
    assert [path.name for path in benchmark.query.paths] == query
    assert benchmark.query.pids.tolist() == [3, 3, 4, 4, 5, 5]
    assert benchmark.query.camids.tolist() == [0, 1] * 3
    assert [path.name for path in benchmark.gallery.paths] == ["2_002_1_03.png", "2_002_1_04.png", "2_002_2_10.png"]
    assert benchmark.gallery.pids.tolist() == [5, 5, 5]


def test_the_labeled_boxes_are_another_folder(root):
    benchmark = cuhk03(root.parent, BenchmarkOptions(cuhk03_boxes="labeled"))
    assert {path.parent for path in benchmark.train.paths} == {root / "images_labeled"}
    assert not (root / "images_detected").exists()


@pytest.mark.parametrize("split", [0, 1])
def test_the_classic_protocol(root, split):
    benchmark = cuhk03(root.parent, BenchmarkOptions(cuhk03_protocol="classic", cuhk03_split=split))
    assert benchmark.single_gallery_shot
    test_set = set(TEST_SETS[split])
    everybody = sorted(PEOPLE)
    train_people = [person for person in everybody if person not in test_set]
    train = [(person, slot) for person in train_people for slot in PEOPLE[person]]
    assert [path.name for path in benchmark.train.paths] == [name_of(*person, slot) for person, slot in train]
    assert benchmark.train.pids.tolist() == [train_people.index(person) for person, _ in train]
    test = [(person, slot) for person in everybody if person in test_set for slot in PEOPLE[person]]
    for images in (benchmark.query, benchmark.gallery):
        assert [path.name for path in images.paths] == [name_of(*person, slot) for person, slot in test]
        assert images.pids.tolist() == [everybody.index(person) for person, _ in test]
        assert images.camids.tolist() == [0 if slot < 5 else 1 for _, slot in test]


def test_a_classic_split_that_is_not_there(root):
    options = BenchmarkOptions(cuhk03_protocol="classic", cuhk03_split=2)
    assert_refused(root.parent, "the 2 splits", "got 2", "0 to 1", options=options, key="DATASETS.CUHK03.SPLIT")


def test_extracted_images_need_no_release_in_the_new_protocol(root):
    cuhk03(root.parent)
    shutil.rmtree(root / "cuhk03_release")
    assert len(cuhk03(root.parent).query) == 6
    protocol = "DATASETS.CUHK03.PROTOCOL"
    assert_refused(root.parent, "cuhk-03.mat", f"{protocol} new", options=CLASSIC, key=protocol)


def test_the_configuration_may_lie_with_the_release(root):
    name = "cuhk03_new_protocol_config_detected.mat"
    (root / name).rename(root / "cuhk03_release" / name)
    assert len(cuhk03(root.parent).query) == 6


def test_a_missing_configuration(root):
    (root / "cuhk03_new_protocol_config_detected.mat").unlink()
    name, protocol = "cuhk03_new_protocol_config_detected.mat", "DATASETS.CUHK03.PROTOCOL"
    assert_refused(root.parent, name, f"{protocol} classic", key=protocol)
    assert len(cuhk03(root.parent, CLASSIC).query) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"filelist": np.array([["x.png"]], dtype=object)},
        {"train_idx": np.array([[0]])},
        {"train_idx": np.array([[99]])},
        {"train_idx": np.zeros((0, 1))},
        {"labels": np.array([[1]])},
    ],
)
def test_a_configuration_of_another_kind(root, change):
    file = root / "cuhk03_new_protocol_config_detected.mat"
    write_config(file, **change)
    assert_refused(root.parent, str(file), "train_idx")


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_broken_files(root, content):
    (root / "cuhk03_new_protocol_config_detected.mat").write_bytes(content)
    assert_refused(root.parent, "cuhk03_new_protocol_config_detected.mat", "train_idx")
    (root / "cuhk03_release" / "cuhk-03.mat").write_bytes(content)
    for options in (BenchmarkOptions(cuhk03_boxes="labeled"), CLASSIC):
        assert_refused(root.parent, "cuhk-03.mat", "testsets", options=options)
    assert not list(root.glob(".*"))


def test_another_file_of_this_kind(root):
    with h5py.File(root / "cuhk03_release" / "cuhk-03.mat", "w") as content:
        content["something"] = 1
    assert_refused(root.parent, "cuhk-03.mat", "testsets")
    assert not (root / "images_detected").exists()


@pytest.mark.parametrize("image", [np.zeros((3, 4, 8)), np.zeros((1, 4, 8), dtype=np.uint8)])
def test_images_of_another_kind(root, image):
    with h5py.File(root / "cuhk03_release" / "cuhk-03.mat", "r+") as content:
        slot = content[content["detected"][0][0]][0, 0]
        name = content[slot].name
        del content[name]
        content[name] = image
        content[content["detected"][0][0]][0, 0] = content[name].ref
    assert_refused(root.parent, "cuhk-03.mat", "an image is")
    assert not (root / "images_detected").exists()


def test_images_that_were_not_all_extracted(root):
    cuhk03(root.parent)
    (root / "images_detected" / "2_002_2_10.png").unlink()
    assert_refused(root.parent, "1 of 16", "2_002_2_10.png", f"remove {root / 'images_detected'}")


def test_extraction_that_is_interrupted_leaves_nothing(root, monkeypatch):
    saved = []
    save = Image.Image.save

    def fail_at_the_third(self, *arguments, **options):
        saved.append(arguments)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save(self, *arguments, **options)

    before = sorted(root.iterdir())
    monkeypatch.setattr(Image.Image, "save", fail_at_the_third)
    assert_refused(root.parent, str(root), "No space left on device", kind=WorldError)
    assert sorted(root.iterdir()) == before
    monkeypatch.undo()
    assert len(cuhk03(root.parent).query) == 6


def test_another_process_may_be_faster(root, monkeypatch):
    rename = Path.rename

    def overtaken(self, target):
        if not Path(target).exists():
            shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert prepare_cuhk03(root.parent, DEFAULTS) == root / "images_detected"
    assert not list(root.glob(".*"))


@pytest.mark.parametrize(("package", "options"), [("h5py", CLASSIC), ("scipy.io", DEFAULTS)])
def test_a_package_that_is_not_installed(root, monkeypatch, package, options):
    prepare_cuhk03(root.parent, options)
    monkeypatch.setitem(sys.modules, package, None)
    install = "uv sync --extra cuhk03"
    assert_refused(root.parent, install, options=options, key="DATASETS.NAMES", kind=WorldError)


def test_the_layout_of_cuhk03_np(tmp_path):
    names = {
        "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png", "0009_c1_1.png"],
        "query": ["0003_c1_1.png"],
        "bounding_box_test": ["0003_c2_6.png"],
    }
    for boxes in ("detected", "labeled"):
        for folder, images in names.items():
            (tmp_path / "cuhk03-np" / boxes / folder).mkdir(parents=True)
            for name in images:
                (tmp_path / "cuhk03-np" / boxes / folder / name).touch()
    for boxes in ("detected", "labeled"):
        benchmark = cuhk03(tmp_path, BenchmarkOptions(cuhk03_boxes=boxes))
        assert benchmark.root == tmp_path / "cuhk03-np" / boxes
        assert benchmark.train.pids.tolist() == [0, 0, 1]
        assert benchmark.train.camids.tolist() == [0, 1, 0]
        assert (benchmark.query.pids.tolist(), benchmark.gallery.camids.tolist()) == ([3], [1])
        assert not benchmark.single_gallery_shot
    assert_refused(tmp_path, "lacks cuhk03_release/cuhk-03.mat ", options=CLASSIC)
    assert prepare_cuhk03(tmp_path, DEFAULTS) == tmp_path / "cuhk03-np" / "detected"


def test_parts_of_cuhk03(root):
    assert len(cuhk03(root.parent, parts=["train"]).query) == 0
    assert len(cuhk03(root.parent, CLASSIC, ["test"]).train) == 0
    for name in ("1_001_1_01.png", "1_001_1_02.png"):
        (root / "images_detected" / name).unlink()
    assert len(cuhk03(root.parent, parts=["test"]).query) == 6


def test_nothing_of_cuhk03(tmp_path):
    (tmp_path / "cuhk03").mkdir()
    assert_refused(tmp_path, str(tmp_path / "cuhk03"), "lacks cuhk03_release/cuhk-03.mat ")


def test_no_path_of_this_machine_is_kept(root, tmp_path):
    """Read a folder that was moved; other code keeps absolute paths of the splits in a file."""
    first = fingerprint(cuhk03(root.parent))
    moved = tmp_path / "elsewhere" / "CUHK03"
    moved.parent.mkdir()
    root.rename(moved)
    assert fingerprint(cuhk03(moved.parent)) == first
