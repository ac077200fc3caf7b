"""The files of a gallery."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from reid.errors import DataError
from reid.evaluation.gallery import (
    GalleryImage,
    Metadata,
    read_gallery,
    read_metadata,
    write_gallery,
    write_unreadable,
    writing_embeddings,
)

METADATA = Metadata(
    folder="/images",
    num_images=3,
    num_features=4,
    num_unreadable=0,
    distance="cosine",
    normalised=True,
    weight="/w.pt",
    checksum="0123",
    config="SEED: 1\n",
)
PATHS = ["0002_c1s1_000451_03.jpg", "a/-1_c3_x.png", "b/no name.webp"]


def write(folder, *parts, paths=PATHS, metadata=METADATA):
    with writing_embeddings(folder, metadata.num_features) as file:
        for part in parts:
            file.append(part)
    write_gallery(folder, paths, metadata)


def write_then_fail(file, rows):
    file.append(rows)
    raise ValueError("shape")


@pytest.fixture
def embedding():
    return np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def test_embeddings_written_in_parts_are_read_as_one_array(tmp_path, embedding):
    write(tmp_path / "new" / "out", embedding[:1], embedding[1:1], embedding[1:])
    gallery = read_gallery(tmp_path / "new" / "out")
    assert gallery.metadata == METADATA
    assert np.array_equal(gallery.embedding, embedding)
    assert isinstance(gallery.embedding, np.memmap)
    assert gallery.images == (
        GalleryImage("0002_c1s1_000451_03.jpg", 2, 0),
        GalleryImage("a/-1_c3_x.png", -1, 2),
        GalleryImage("b/no name.webp", None, None),
    )


def test_header_has_the_same_size_for_any_number_of_rows(tmp_path):
    for num in (0, 9, 10, 99_999, 100_000):
        with writing_embeddings(tmp_path, 1) as file:
            file.append(np.ones((num, 1), dtype=np.float32))
        assert np.load(tmp_path / "embeddings.npy").shape == (num, 1)
        assert (tmp_path / "embeddings.npy").stat().st_size == 128 + 4 * num


@given(st.lists(st.text(st.characters(exclude_characters="\0/"), min_size=1), min_size=3, max_size=3))
def test_any_file_name_is_restored(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    names = [*names, b"\xff\n\r\"',.jpg".decode("utf-8", "surrogateescape")]
    metadata = replace(METADATA, num_images=4)
    write(folder, np.zeros((4, 4), dtype=np.float32), paths=names, metadata=metadata)
    assert [image.path for image in read_gallery(folder).images] == names


def test_failed_write_keeps_the_old_gallery(tmp_path, embedding):
    write(tmp_path, embedding)
    with pytest.raises(ValueError, match="shape"), writing_embeddings(tmp_path, 4) as file:
        write_then_fail(file, 2 * embedding)
    assert np.array_equal(read_gallery(tmp_path).embedding, embedding)
    assert len(list(tmp_path.iterdir())) == 3


def test_temporary_files_of_a_killed_process_are_removed(tmp_path, embedding):
    (tmp_path / ".embeddings.4711.tmp.npy").write_bytes(b"half")
    write(tmp_path, embedding)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["embeddings.npy", "gallery.json", "images.csv"]


def test_gallery_is_invalid_until_its_metadata_are_written(tmp_path, embedding):
    write(tmp_path, embedding)
    with writing_embeddings(tmp_path, 4) as file:
        file.append(embedding[:2])
    with refused(DataError, "--gallery", f"{tmp_path}/gallery.json", "reid embed"):
        read_gallery(tmp_path)


def test_the_list_of_unreadable_images_is_removed_when_empty(tmp_path):
    assert write_unreadable(tmp_path, ["a (b)", "c (d)"]).read_text() == "a (b)\nc (d)\n"
    assert not write_unreadable(tmp_path, []).exists()


def test_a_folder_without_a_gallery_is_rejected(tmp_path):
    with refused(DataError, "--gallery", f"{tmp_path}/none", "reid embed"):
        read_gallery(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "keywords"),
    [
        ({"format_version": 2}, ("gallery.json", "format 1", "got 2")),
        ({"num_images": 4}, ("4 embeddings", "4 features", "[3, 4]", "3 images")),
    ],
)
def test_metadata_that_do_not_fit_are_rejected(tmp_path, embedding, change, keywords):
    write(tmp_path, embedding)
    file = tmp_path / "gallery.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with refused(DataError, "--gallery", *keywords):
        read_gallery(tmp_path)


@pytest.mark.parametrize("name", ["gallery.json", "embeddings.npy", "images.csv"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\x93NUMPY", b"\x80\x04."])
def test_a_damaged_file_is_rejected(tmp_path, embedding, name, content):
    write(tmp_path, embedding)
    (tmp_path / name).write_bytes(content)
    with refused(DataError, "--gallery", str(tmp_path), "reid embed"):
        read_gallery(tmp_path)


def test_metadata_alone_can_be_read(tmp_path, embedding):
    write(tmp_path, embedding)
    assert read_metadata(tmp_path) == METADATA
