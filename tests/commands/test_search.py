"""Images are searched in a gallery, from the command line to the picture."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from program import untrained

from reid.evaluation.gallery import read_gallery

QUERY = "0002_c1_query.jpg"
# In gallery order: copies of the query whose names state different identities; images of noise follow.
COPIES = ("0000_c2.png", "0002_c1.png", "0002_c3.png", "0007_c1.png", "-1_c1.png", "unnamed.png")


@pytest.fixture(scope="module")
def folder(place):
    """Make a gallery `g` of noise and of copies of the query with the checkpoint `s.pt`; return its parent folder."""
    made = place.folder / "search"
    made.mkdir()
    (made / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(made / "photos" / f"z{number:02d}.png")
    query = Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8))
    for name in COPIES:
        query.save(made / "photos" / name)
    query.save(made / "photos" / "copy.png")
    shutil.copy(made / "photos" / "copy.png", made / QUERY)
    untrained(made / "s.pt")
    (ended,) = place.run("embed", "photos", "TEST.WEIGHT", "s.pt", "--output", "g", bare=True, folder=made)
    assert ended.code == 0, ended
    return made


def run(place, folder, *arguments):
    (ended,) = place.run("search", *arguments, bare=True, folder=folder)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


@pytest.fixture(scope="module")
def output(place, folder):
    arguments = (
        QUERY,
        "photos/z03.png",
        "--gallery",
        "g",
        "--top",
        9,
        "--output",
        "results.png",
        "--json",
        "results.json",
    )
    return run(place, folder, *arguments)


def test_table_is_sorted_by_similarity_then_gallery_order(output):
    lines = output.splitlines()
    start = lines.index(QUERY)
    assert lines[start + 1].split() == ["rank", "similarity", "image"]
    assert [line.split(maxsplit=2) for line in lines[start + 2 : start + 9]] == [
        ["1", "1.0000", "-1_c1.png (same camera)"],
        ["2", "1.0000", "0000_c2.png (other)"],
        ["3", "1.0000", "0002_c1.png (match, same camera)"],
        ["4", "1.0000", "0002_c3.png (match)"],
        ["5", "1.0000", "0007_c1.png (other, same camera)"],
        ["6", "1.0000", "copy.png"],
        ["7", "1.0000", "unnamed.png"],
    ]
    assert lines[lines.index("photos/z03.png") + 2].split() == ["1", "1.0000", "z03.png"]
    assert "results.png" in lines[-1]


def test_json_report_agrees_with_the_table(output, folder):
    report = json.loads((folder / "results.json").read_text())
    assert (report["folder"], report["measure"]) == (str(folder / "photos"), "similarity")
    first, second = report["results"]
    assert (first["image"], second["image"]) == (QUERY, "photos/z03.png")
    assert [match["rank"] for match in first["found"]] == list(range(1, 10))
    verdicts = {match["path"]: (match["match"], match["same_camera"]) for match in first["found"]}
    assert verdicts["0002_c3.png"] == (True, False)
    assert verdicts["0002_c1.png"] == (True, True)
    assert verdicts["0000_c2.png"] == (False, False)
    assert verdicts["-1_c1.png"] == (None, True)
    assert verdicts["copy.png"] == (None, False)
    assert first["found"][0]["similarity"] == pytest.approx(1, abs=1e-6)
    embedding = np.array(read_gallery(folder / "g").embedding, dtype=np.float64)
    expected = np.sort(embedding @ embedding[[*sorted(p.name for p in (folder / "photos").iterdir())].index("z03.png")])
    similarities = [match["similarity"] for match in second["found"]]
    assert similarities == pytest.approx(expected[::-1][:9], abs=1e-5)


def test_the_picture_shows_both_queries_with_nine_images_each(output, folder):
    with Image.open(folder / "results.png") as picture:
        assert picture.width > 10 * 76
        assert 2 * 168 < picture.height < 4 * 168


def test_search_works_with_missing_images_and_small_gallery(place, folder):
    moved = folder / "moved"
    shutil.copytree(folder / "g", moved)
    metadata = json.loads((moved / "gallery.json").read_text())
    (moved / "gallery.json").write_text(json.dumps(metadata | {"folder": "/gone"}))
    output = run(place, folder, QUERY, "--gallery", "moved", "--top", 1000, "--output", "gone.jpg")
    assert "  27  " in output
    with Image.open(folder / "gone.jpg") as picture:
        assert picture.width > 27 * 76


def test_other_settings_than_the_gallerys_are_rejected(place, folder):
    arguments = (QUERY, "--gallery", "g", "TEST.FLIP", "yes")
    message = place.refusal("search", *arguments, bare=True, folder=folder, code=2)
    assert all(keyword in message for keyword in ("TEST.FLIP", "be no", "--gallery g", "got yes")), message
    arguments = (QUERY, "--gallery", "g", "MODEL.LAST_STRIDE=2")
    message = place.refusal("search", *arguments, bare=True, folder=folder, code=1)
    assert "--gallery g" in message
    assert re.search(r"MODEL\.LAST_STRIDE\D*1\D*2\D", message), message


def test_other_weights_than_the_gallerys_are_rejected(place, folder):
    untrained(folder / "other.pt", seed=1)
    arguments = (QUERY, "--gallery", "g", "TEST.WEIGHT", "other.pt")
    message = place.refusal("search", *arguments, bare=True, folder=folder, code=1)
    made_with = read_gallery(folder / "g").metadata.checksum
    assert all(keyword in message for keyword in ("TEST.WEIGHT=other.pt", "gallery g", made_with)), message


def test_moved_weights_are_accepted_by_test_weight(place, folder):
    shutil.copy(folder / "s.pt", folder / "moved.pt")
    run(place, folder, QUERY, "--gallery", "g", "TEST.WEIGHT", "moved.pt")


def test_images_that_cannot_be_read_are_all_named(place, folder):
    (folder / "torn.jpg").write_bytes(b"\xff\xd8")
    arguments = ("gone.png", QUERY, "torn.jpg", "--gallery", "g")
    message = place.refusal("search", *arguments, bare=True, folder=folder, code=2)
    keywords = ("IMAGE", "2 of 3", "gone.png (No such file or directory)", "torn.jpg (")
    assert all(keyword in message for keyword in keywords), message


def test_search_runs_in_one_process_only(place, folder):
    message = place.refusal("search", QUERY, "--gallery", "g", bare=True, folder=folder, num_ranks=2, code=2)
    assert all(keyword in message for keyword in ("search must", "got 2", "torchrun")), message


def test_a_picture_that_cannot_be_written_is_named(place, folder):
    arguments = (QUERY, "--gallery", "g", "--output", "no/folder.jpg")
    message = place.refusal("search", *arguments, bare=True, folder=folder, code=1)
    assert "no/folder.jpg" in message
    assert "No such file or directory" in message
