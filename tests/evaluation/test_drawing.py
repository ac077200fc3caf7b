"""Tests of positions and colors in pictures of any size."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from reid.data.augment import normalize
from reid.evaluation import drawing
from reid.evaluation.drawing import (
    QUERY,
    RIGHT,
    SAME_CAMERA,
    WRONG,
    GalleryCell,
    batch_grid,
    cmc_chart,
    denormalize,
    pixels_of,
    ranked_gallery,
    sheet,
)

PAPER = (255, 255, 255)


def plain(color, height=64, width=32):
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


def runs(pixels):
    """Return the colors along a line, each once, with the number of pixels."""
    segments = []
    for pixel in map(tuple, pixels.tolist()):
        if segments and segments[-1][0] == pixel:
            segments[-1][1] += 1
        else:
            segments.append([pixel, 1])
    return [(color, number) for color, number in segments]


def test_a_ranking_is_framed_in_blue_green_and_red_in_its_order():
    colors = [(10, 20, 30), (200, 10, 10), (10, 200, 10), (10, 10, 200)]
    query, *matches = (GalleryCell(plain(color), ("pid 1", "cos 0.5")) for color in colors)
    picture = np.asarray(ranked_gallery(query, matches, [True, False, None]))
    middle = runs(picture[100])
    colored = [color for color, _ in middle if color != PAPER]
    assert colored == [
        *(QUERY, colors[0], QUERY),
        *(RIGHT, colors[1], RIGHT),
        *(WRONG, colors[2], WRONG),
        colors[3],
    ]
    widths = {number for color, number in middle if color in colors}
    assert len(widths) == 1
    gaps = [number for color, number in middle if color == PAPER]
    assert gaps[0] > gaps[1]  # a wider gap after the query


def test_same_camera_is_marked_by_ring_inside_frame():
    color = (10, 20, 30)
    query, *matches = (GalleryCell(plain(color), (), same_camera=ring) for ring in (False, True, True, False))
    picture = np.asarray(ranked_gallery(query, matches, [True, None, True]))
    line = [(color, number) for color, number in runs(picture[100]) if color != PAPER and color != QUERY]
    (_, width), *others = line
    ring, frame = (SAME_CAMERA, 2), (RIGHT, 2)
    image = (color, width)
    assert others == [frame, ring, image, ring, frame, ring, image, ring, (RIGHT, 4), image, (RIGHT, 4)]
    column = runs(picture[:, next(x for x in range(picture.shape[1]) if tuple(picture[100, x]) == SAME_CAMERA) + 20])
    assert [part for part in column if part[0] in (SAME_CAMERA, RIGHT)] == [frame, ring, ring, frame]


def test_unreadable_image_keeps_its_position_empty():
    there = ranked_gallery(GalleryCell(plain((1, 2, 3)), ()), [GalleryCell(plain((1, 2, 3)), ("a",))], [True])
    gone = ranked_gallery(GalleryCell(plain((1, 2, 3)), ()), [GalleryCell(None, ("a",))], [True])
    assert gone.size == there.size
    assert RIGHT in {color for color, _ in runs(np.asarray(gone)[100])}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "F", "LA"])
def test_any_kind_of_image_has_pixels(mode):
    pixels = pixels_of(Image.new(mode, (1000, 2000)))
    assert (pixels.shape, pixels.dtype) == ((168, 84, 3), np.uint8)


def test_transparent_palette_image_is_read_without_warning():
    image = Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).convert("P")
    image.info["transparency"] = b"\0" * 256
    assert pixels_of(image).shape == (168, 168, 3)


@pytest.mark.parametrize(("size", "expected"), [((10, 10), (168, 168)), ((9000, 1), (1, 336)), ((1, 9000), (168, 1))])
def test_an_image_keeps_its_ratio_but_is_at_most_twice_as_wide(size, expected):
    assert pixels_of(Image.new("RGB", size)).shape[:2] == expected


def test_green_and_red_differ_in_brightness_too():
    weights = np.array([0.299, 0.587, 0.114])
    assert abs(weights @ np.array(RIGHT) - weights @ np.array(WRONG)) > 50


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 4),
    st.text(max_size=40),
)
@example(64, 32, 2, "two\nlines, Läufe")
def test_rankings_of_any_size_and_caption_fit_on_the_sheet(height, width, num, caption):
    shown = [GalleryCell(plain((1, 2, 3), height, width), (caption, "b")) for _ in range(num + 1)]
    row = ranked_gallery(shown[0], shown[1:], [True] * num)
    page = sheet([row, row], caption, caption)
    assert page.width > row.width
    assert page.height > 2 * row.height
    assert (np.asarray(page)[:, -8:] == 255).all()  # nothing reaches into the margin
    assert (np.asarray(page)[-8:] == 255).all()


def test_a_long_title_widens_the_sheet():
    row = ranked_gallery(GalleryCell(plain((1, 2, 3)), ()), [], [])
    assert sheet([row], "a title " * 50).width > sheet([row], "a title").width > row.width


def test_batch_grid_keeps_order_and_groups_identities():
    colors = [(10 * i + 5, 200 - 7 * i, 3 * i) for i in range(12)]
    picture = np.asarray(batch_grid(np.stack([plain(color) for color in colors]), [7] * 4 + [3] * 4 + [7] * 4, "t"))
    line = runs(picture[150])
    assert [color for color, _ in line if color != PAPER] == colors
    gaps = [number for color, number in line if color == PAPER][1:-1]
    assert gaps == [2, 2, 2, 16, 2, 2, 2, 16, 2, 2, 2]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(8, 100), st.integers(8, 400))
def test_batches_of_any_size_fit_on_a_page(num_pids, num_instances, height, width):
    images = np.zeros((num_pids * num_instances, height, width, 3), np.uint8)
    picture = batch_grid(images, np.repeat(np.arange(num_pids), num_instances).tolist(), "title", "note")
    assert picture.width <= max(1200, num_instances * 258 + 40)


@given(st.integers(0, 2**32 - 1))
def test_denormalized_pixels_are_those_that_were_normalized(seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    model_input = normalize(images, torch.tensor(mean), torch.tensor(std)).numpy()
    np.testing.assert_array_equal(denormalize(model_input, mean, std), images)


def test_pixels_beyond_black_and_white_are_cut_off():
    model_input = np.array([-9.0, 9.0, 0.0]).reshape(1, 3, 1, 1)
    assert denormalize(model_input, [0.5] * 3, [0.25] * 3).tolist() == [[[[0, 255, 128]]]]


def test_cmc_curve_is_drawn_at_its_percentages():
    picture = np.asarray(cmc_chart({"x": [0.5] * 5 + [0.75] * 5 + [1.0] * 5}, "t")).astype(int)
    is_blue = (np.abs(picture - [31, 119, 180]).sum(2) < 60)[: picture.shape[0] * 3 // 4]  # the legend is below
    heights = [rows.mean() for rows in map(np.flatnonzero, is_blue.T) if 0 < len(rows) < 12]
    steps, counts = np.unique(np.round(heights), return_counts=True)
    top, middle = sorted(steps[counts > 40])[:2]  # 100 % and 75 %
    is_blue = np.abs(picture - [31, 119, 180]).sum(2) < 60
    bottom = np.median(is_blue[:, :200].nonzero()[0])  # 50 %
    assert bottom - middle == pytest.approx(middle - top, abs=2) != 0


@pytest.mark.parametrize("curve", [[1.0], [0.0, 0.0], [0.999] * 50, list(np.linspace(0.01, 1, 500)), [0.0, 1.0]])
def test_any_curve_is_drawn_within_the_page(curve):
    names = {"one": curve, "two": curve[:1], "a $name as long as they come, Läufe 行人": curve}
    picture = np.asarray(cmc_chart(names, "t_$x"))
    assert picture.shape == (480, 760, 3)
    assert (np.concatenate([picture[:3], picture[-3:]]) == 255).all()
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_without_matplotlib_charts_are_skipped_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("reid"), "propagate", True)
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    drawing._has_matplotlib.cache_clear()
    with caplog.at_level(logging.INFO, "reid"):
        assert [cmc_chart({"x": [1.0]}, "t") for _ in range(2)] == [None, None]
    drawing._has_matplotlib.cache_clear()
    (message,) = caplog.messages
    assert "matplotlib" in message
    assert "--extra plots" in message
