"""Pictures of search results."""

import numpy as np
import pytest
from PIL import Image

from reid.drawing import Tile, draw_rows, thumbnail_of

GREEN, RED, GREY, BLUE, BLACK = (26, 150, 65), (215, 25, 28), (158, 158, 158), (43, 108, 212), (0, 0, 0)


def colours(picture):
    """Of the picture's pixels, with how many there are of each."""
    return {colour: number for number, colour in picture.getcolors(1 << 20)}


def tile(verdict, **more):
    return Tile(Image.new("RGB", (96, 192), "yellow"), verdict, **more)


def test_every_verdict_has_its_frame():
    row = [tile("query"), tile("match"), tile("other"), tile("unknown")]
    found = colours(draw_rows([row]))
    assert found[GREEN] == found[RED] == found[GREY] == found[BLACK] == 2 * 6 * (96 + 192 + 12)
    assert found[255, 255, 0] == 4 * 96 * 192
    assert BLUE not in found


def test_the_same_camera_has_a_ring_inside_the_frame():
    found = colours(draw_rows([[tile("query"), tile("match", same_camera=True)]]))
    assert found[BLUE] > 0
    assert found[GREEN] > 0
    assert found[GREEN] + found[BLUE] == 2 * 6 * (96 + 192 + 12)


def test_an_image_that_is_gone_leaves_its_place_and_captions_are_below():
    picture = draw_rows([[tile("query", captions=("query",)), Tile(None, "match", ("1: 0.5", "match"))]])
    assert (255, 255, 0) in colours(picture.crop((0, 0, 120, picture.height)))
    assert (255, 255, 0) not in colours(picture.crop((124, 0, picture.width, picture.height)))
    below = picture.crop((136, 8 + 192 + 12, picture.width, picture.height))
    assert below.convert("L").getextrema()[0] < 100


def test_rows_may_have_different_lengths():
    picture = draw_rows([[tile("query")], [tile("query"), *[tile("other")] * 9]])
    assert colours(picture)[255, 255, 0] == 11 * 96 * 192


@pytest.mark.parametrize(("size", "expected"), [((10, 10), (96, 96)), ((50, 200), (48, 192)), ((9000, 1), (96, 1))])
def test_a_thumbnail_keeps_its_ratio(size, expected):
    assert thumbnail_of(Image.new("RGB", size)).size == expected


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "F", "LA"])
def test_any_kind_of_image_becomes_a_thumbnail(mode):
    assert thumbnail_of(Image.new(mode, (10, 20))).mode == "RGB"


def test_a_palette_with_transparency_becomes_one_without_complaint():
    image = Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).convert("P")
    image.info["transparency"] = b"\0" * 256
    assert thumbnail_of(image).mode == "RGB"
