"""Folders of images are turned into galleries."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from program import REPOSITORY, untrained
from refusals import refused

from reid.checkpoints.state_dicts import state_dict_of
from reid.checkpoints.weights import load_state, read_file
from reid.commands.embed import list_images
from reid.config.load import load_config
from reid.data.store import decode
from reid.errors import DataError
from reid.evaluation.gallery import read_gallery
from reid.models.reid_model import build_model

PHOTOS = ["0002_c1s1_000451_03.jpg", "b/0002_c2.PNG", "b/c/x y.webp", "b/c/z.bmp", "ü.jpeg"]


def photograph(file, seed, size=(20, 50)):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def photos(place):
    """Return a folder of 37 images in several folders and formats, and other files; in batches of 8 a rest remains."""
    folder = place.folder / "photos"
    for seed, name in enumerate([*PHOTOS, *(f"many/{number:02d}.png" for number in range(32))]):
        photograph(folder / name, seed)
    photograph(folder / ".hidden.jpg", 0)
    photograph(folder / ".cache" / "a.jpg", 0)
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture(scope="module")
def weight(place):
    return untrained(place.folder / "untrained.pt")


def run(place, *arguments, code=0, num_ranks=1):
    first, *others = place.run("embed", *arguments, bare=True, num_ranks=num_ranks)
    assert [rank.code for rank in (first, *others)] == [code] * num_ranks, (first, *others)
    return first


@pytest.fixture(scope="module")
def output(place, photos, weight):
    """Make the gallery `out` from a checkpoint alone; return the stdout of the program."""
    return run(place, photos, "TEST.WEIGHT", weight, "--output", "out").out


@pytest.fixture(scope="module")
def gallery(place, output):
    return read_gallery(place.folder / "out")


def test_number_of_images_and_speed_are_reported(output):
    assert re.search(r"^out: .*\b37 images\b.* [\d.]+ s .*\d+ images/s", output, re.MULTILINE)
    assert "warning" not in output


def test_gallery_holds_the_images_of_all_folders_in_order(gallery):
    names = [image.path for image in gallery.images]
    assert names == sorted([*PHOTOS, *(f"many/{number:02d}.png" for number in range(32))])
    ids = {image.path: (image.pid, image.camid) for image in gallery.images}
    assert ids["0002_c1s1_000451_03.jpg"] == (2, 0)
    assert ids["b/0002_c2.PNG"] == (2, 1)
    assert ids["ü.jpeg"] == (None, None)


def model_of(weight):
    cfg = load_config(None, ["MODEL.NAME=resnet18", "MODEL.STEM_RELU=yes"])
    model = build_model(cfg, 8)
    load_state(model, state_dict_of(read_file(weight, "TEST.WEIGHT")), "FILE")
    return model.eval()


def images_of(gallery, photos):
    """Return the normalized images [N, 3, H, W]."""
    pixels = [np.frombuffer(decode(photos / image.path, (32, 16)), np.uint8) for image in gallery.images]
    images = torch.from_numpy(np.stack(pixels).reshape(-1, 32, 16, 3)).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images - mean) / std).permute(0, 3, 1, 2)


def test_the_embeddings_equal_those_of_the_model(gallery, photos, weight):
    with torch.no_grad():
        expected = model_of(weight)(images_of(gallery, photos))
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.from_numpy(np.array(gallery.embedding)), expected, atol=1e-5, rtol=0)


def test_metadata_describe_how_the_gallery_was_made(gallery, photos, weight):
    metadata = gallery.metadata
    assert (metadata.folder, metadata.weight) == (str(photos), str(weight))
    assert (metadata.num_images, metadata.num_features, metadata.num_unreadable) == (37, 512, 0)
    assert (metadata.distance, metadata.normalised) == ("cosine", True)
    assert "SIZE_TEST:\n  - 32\n  - 16" in metadata.config


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_gallery_is_identical_on_any_number_of_ranks(place, photos, weight, gallery):
    run(place, photos, "TEST.WEIGHT", weight, "--output", "out3", num_ranks=3)
    assert files_of(place.folder / "out3") == files_of(place.folder / "out")


def test_unnormalized_flip_embedding_is_mean_pre_neck_feature(place, photos, weight):
    settings = ("TEST.WEIGHT", weight, "TEST.FEAT_NORM", "no", "TEST.NECK_FEAT", "before", "TEST.FLIP", "yes")
    run(place, photos, "--config_file", "tiny.yml", *settings, "OUTPUT_DIR", "raw")
    made = read_gallery(place.folder / "raw" / "galleries" / "photos")
    assert (made.metadata.distance, made.metadata.normalised) == ("euclidean", False)
    images, model = images_of(made, photos), model_of(weight)
    with torch.no_grad():
        expected = (model.base(images) + model.base(images.flip(-1))).mean((2, 3)) / 2
    torch.testing.assert_close(torch.from_numpy(np.array(made.embedding)), expected, atol=1e-5, rtol=1e-5)


# ---- images that cannot be read ----


@pytest.fixture(scope="module")
def damaged(place, photos):
    folder = place.folder / "damaged"
    shutil.copytree(photos, folder)
    (folder / "many" / "03.png").write_bytes(b"no image")
    (folder / "many" / "20.png").write_bytes((photos / "many" / "20.png").read_bytes()[:300])
    (folder / "b" / "gone.jpg").symlink_to("nowhere.jpg")
    return folder


def test_unreadable_images_are_left_out_listed_and_counted(place, damaged, weight, gallery):
    message = run(place, damaged, "TEST.WEIGHT", weight, "--output", "rest", num_ranks=2).out
    assert re.search(
        r"^warning: 3 of 38 .*b/gone\.jpg \(No such file or directory\), many/03\.png \(", message, re.MULTILINE
    )
    lines = (place.folder / "rest" / "unreadable.txt").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["b/gone.jpg", "many/03.png", "many/20.png"]
    rest = read_gallery(place.folder / "rest")
    assert rest.metadata.num_unreadable == 3
    kept = [i for i, image in enumerate(gallery.images) if image.path not in ("many/03.png", "many/20.png")]
    assert rest.images == tuple(gallery.images[i] for i in kept)
    np.testing.assert_allclose(rest.embedding, gallery.embedding[kept], atol=1e-6)


def test_strict_rejects_unreadable_images_and_keeps_old_gallery(place, damaged, weight, gallery):
    shutil.copytree(place.folder / "out", place.folder / "strict")
    arguments = (damaged, "--strict", "TEST.WEIGHT", weight, "--output", "strict")
    message = place.refusal("embed", *arguments, bare=True, num_ranks=2, code=2)
    keywords = ("3 of 38", str(damaged), "b/gone.jpg", "strict/unreadable.txt", "--strict")
    assert all(keyword in message for keyword in keywords), message
    assert np.array_equal(read_gallery(place.folder / "strict").embedding, gallery.embedding)


def test_a_folder_without_a_readable_image_is_rejected(place, weight):
    (place.folder / "ruins").mkdir()
    (place.folder / "ruins" / "a.jpg").touch()
    message = place.refusal("embed", "ruins", "TEST.WEIGHT", weight, bare=True, code=2)
    assert all(keyword in message for keyword in ("1 of 1", "ruins", "a.jpg (")), message


# ---- errors ----


def test_a_missing_weight_is_reported(place, photos):
    message = place.refusal("embed", photos, bare=True, num_ranks=2, code=2)
    assert "TEST.WEIGHT" in message
    assert "got ''" in message


def test_a_missing_folder_is_reported(place, weight):
    message = place.refusal("embed", "nowhere", "TEST.WEIGHT", weight, bare=True, num_ranks=2, code=2)
    assert "FOLDER" in message
    assert "nowhere (No such file" in message


def test_an_output_that_is_a_file_is_reported(place, photos, weight):
    arguments = (photos, "TEST.WEIGHT", weight, "--output", "tiny.yml")
    message = place.refusal("embed", *arguments, bare=True, num_ranks=2, code=1)
    assert "tiny.yml" in message
    assert "File exists" in message


def test_weights_that_give_nan_are_reported(place, photos):
    weight = untrained(place.folder / "nan.pt")
    content = torch.load(weight)
    content["model"]["bottleneck.running_var"].fill_(torch.nan)
    torch.save(content, weight)
    message = place.refusal("embed", photos, "TEST.WEIGHT", weight, bare=True, num_ranks=2, code=1)
    assert "embeddings" in message
    assert "BatchNorm" in message


def test_a_config_file_of_another_model_is_rejected(place, photos, weight):
    arguments = (photos, "--config_file", "tiny.yml", "TEST.WEIGHT", weight, "MODEL.LAST_STRIDE", 2)
    message = place.refusal("embed", *arguments, bare=True, code=1)
    assert "TEST.WEIGHT" in message
    assert re.search(r"MODEL\.LAST_STRIDE\D*1\D*2\D", message), message


# ---- list_images ----


def test_links_to_folders_are_followed_once(tmp_path):
    photograph(tmp_path / "real" / "a.jpg", 0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "photos")
    assert list_images(tmp_path / "photos") == ["link/a.jpg"]


def test_a_folder_without_images_is_rejected(tmp_path):
    (tmp_path / "a.txt").touch()
    with refused(DataError, "FOLDER", str(tmp_path), ".bmp, .jpeg, .jpg, .png, .webp"):
        list_images(tmp_path)


def test_a_file_instead_of_a_folder_is_rejected(tmp_path):
    photograph(tmp_path / "a.jpg", 0)
    with refused(DataError, "FOLDER", "a.jpg", "Not a directory"):
        list_images(tmp_path / "a.jpg")


@pytest.mark.slow
def test_the_real_command_under_torchrun(place, photos, weight, gallery):
    script = REPOSITORY / "launch" / "embed.py"
    arguments = (
        "torchrun",
        "--standalone",
        "--nproc_per_node=2",
        script,
        photos,
        "--output",
        "real",
        "TEST.WEIGHT",
        weight,
    )
    ended = place.command(*arguments)
    assert (ended.code, ended.err) == (0, ""), ended
    assert files_of(place.folder / "real") == files_of(place.folder / "out")
