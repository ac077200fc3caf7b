"""Augmentation against reid-strong-baseline's: what is drawn for each image, and what is done to it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference import augmented, erasing_box

from reid.data.augment import (
    ERASE_HEIGHT,
    ERASE_LEFT,
    ERASE_TOP,
    ERASE_WIDTH,
    FLIP,
    LEFT,
    TOP,
    Recipe,
    augment,
    augment_at_once,
    augment_one_by_one,
    draw,
    normalize,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "val_transform.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
N = 20_000


def recipe(size=(256, 128), flip=0.5, padding=10, erasing=0.5, seed=0):
    return Recipe(size=size, flip_probability=flip, padding=padding, erasing_probability=erasing, seed=seed)


def drawn(epoch=1, **settings):
    return draw(recipe(**settings), epoch, np.arange(N)).numpy()


def constants(dtype):
    return torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype)


def pictures(num_images, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num_images, *size, 3), dtype=np.uint8))


# ---- what is drawn ----


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_flips_and_erased_rectangles_come_with_their_probability(probability):
    tolerance = 5 * np.sqrt(probability * (1 - probability) / N)
    flips = drawn(flip=probability, erasing=0.0)[:, FLIP]
    assert set(flips.tolist()) <= {0, 1}
    assert abs(flips.mean() - probability) <= tolerance
    boxes = drawn(flip=0.0, erasing=probability)[:, ERASE_TOP:]
    assert abs((boxes[:, 2] > 0).mean() - probability) <= tolerance
    assert not boxes[boxes[:, 2] == 0].any()


@pytest.mark.parametrize("column", [TOP, LEFT])
@pytest.mark.parametrize("padding", [0, 1, 10])
def test_crops_are_uniform_over_all_offsets(column, padding):
    counts = np.bincount(drawn(padding=padding)[:, column])
    num_offsets = 2 * padding + 1
    assert len(counts) == num_offsets
    np.testing.assert_allclose(counts / N, 1 / num_offsets, atol=5 * np.sqrt(1 / num_offsets / N))


@pytest.mark.parametrize("size", [(256, 128), (384, 128), (32, 16), (8, 24)])
def test_erased_areas_reach_all_edges_and_cover_2_to_40_percent(size):
    boxes = drawn(size=size, erasing=1.0)
    height, width = boxes[:, ERASE_HEIGHT], boxes[:, ERASE_WIDTH]
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (height < size[0]).all()
    assert (width < size[1]).all()
    assert (boxes[:, ERASE_TOP].min(), (boxes[:, ERASE_TOP] + height).max()) == (0, size[0])
    assert (boxes[:, ERASE_LEFT].min(), (boxes[:, ERASE_LEFT] + width).max()) == (0, size[1])
    # up to half a pixel of rounding on each side
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * size[0] * size[1]).all()
    assert ((height - 0.5) * (width - 0.5) <= 0.4 * size[0] * size[1]).all()
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all()


def test_erased_rectangles_are_distributed_as_the_originals():
    size = (256, 128)
    ours = drawn(size=size, erasing=1.0)[:, ERASE_TOP:].astype(float)
    rng = random.Random(0)
    theirs = np.array([erasing_box(*size, rng) for _ in range(N)], dtype=float)
    assert abs((ours[:, 2] * ours[:, 3]).mean() / (256 * 128) - 0.2) < 0.005

    def measures(boxes):
        top, left, height, width = boxes.T
        return {
            "area": height * width,
            "ratio": height / width,
            "top": top / (size[0] - height),
            "left": left / (size[1] - width),
            "height": height,
            "width": width,
        }

    for (name, a), b in zip(measures(ours).items(), measures(theirs).values(), strict=True):
        values = np.concatenate([a, b])
        below = [np.searchsorted(np.sort(sample), values, side="right") / N for sample in (a, b)]
        assert np.abs(below[0] - below[1]).max() < 2.2 * np.sqrt(2 / N), name  # Kolmogorov-Smirnov, p about 1e-4


def test_an_image_that_no_rectangle_fits_is_left_alone():
    assert not drawn(size=(2, 1000), erasing=1.0)[:200, ERASE_TOP:].any()


def test_the_decisions_for_an_image_are_independent():
    choices = drawn(size=(256, 128))
    erased = choices[:, ERASE_HEIGHT] > 0
    columns = np.stack([choices[:, FLIP], choices[:, TOP], choices[:, LEFT], erased])
    np.testing.assert_allclose(np.corrcoef(columns), np.eye(4), atol=5 / np.sqrt(N))
    boxes = choices[erased]
    corners = [
        boxes[:, ERASE_TOP] / (256 - boxes[:, ERASE_HEIGHT]),
        boxes[:, ERASE_LEFT] / (128 - boxes[:, ERASE_WIDTH]),
    ]
    others = [boxes[:, FLIP], boxes[:, TOP], boxes[:, LEFT], boxes[:, ERASE_HEIGHT] * boxes[:, ERASE_WIDTH]]
    correlations = np.corrcoef(np.stack([*corners, *others]))[:2]
    np.testing.assert_allclose(correlations, np.eye(2, 6), atol=5 / np.sqrt(erased.sum()))


@given(
    positions=st.lists(st.integers(0, 10**7), min_size=1, max_size=20),
    epoch=st.integers(1, 500),
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(0, 20),
)
def test_an_images_draw_depends_on_seed_epoch_and_position_only(positions, epoch, seed, cut):
    together = draw(recipe(seed=seed), epoch, np.array(positions))
    alone = [draw(recipe(seed=seed), epoch, np.array([position])) for position in positions]
    assert torch.equal(together, torch.cat(alone))
    parts = [
        draw(recipe(seed=seed), epoch, np.array(part, dtype=np.int64)) for part in (positions[:cut], positions[cut:])
    ]
    assert torch.equal(together, torch.cat(parts))
    assert torch.equal(together.flip(0), draw(recipe(seed=seed), epoch, np.array(positions[::-1])))


def test_draws_differ_between_epochs_and_seeds():
    one = drawn(epoch=1, seed=2)
    for other in (drawn(epoch=2, seed=2), drawn(epoch=1, seed=3), drawn(epoch=2, seed=1)):
        assert (one != other).any(1).mean() > 0.99


def test_the_first_draws_are_pinned():
    expected = [[0, 16, 9, 39, 21, 40, 104], [0, 11, 16, 0, 0, 0, 0], [1, 5, 3, 0, 0, 0, 0]]
    assert draw(recipe(), 1, np.arange(3)).tolist() == expected, (
        "the augmentation of every image has changed: runs are no longer comparable seed by seed, nor resumable across "
        "the change"
    )


# ---- what is done ----


@given(
    size=st.tuples(st.integers(4, 14), st.integers(4, 14)),
    num_images=st.integers(1, 5),
    padding=st.integers(0, 16),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_both_ways_to_augment_are_the_slow_one(size, num_images, padding, seed, dtype):
    images = pictures(num_images, size, seed)
    choices = draw(recipe(size=size, padding=padding, seed=seed, erasing=0.8), 1, np.arange(num_images))
    result = augment_at_once(images, choices, padding, *constants(dtype))
    assert torch.equal(augment_one_by_one(images, choices, padding, *constants(dtype)), result)
    assert torch.equal(augment(images, choices, padding, *constants(dtype)), result)
    mean, std = (constant.double().numpy() for constant in constants(dtype))
    expected = [
        augmented(image, choice, padding, mean, std)
        for image, choice in zip(images.numpy(), choices.tolist(), strict=True)
    ]
    assert result.dtype == dtype
    np.testing.assert_allclose(result, np.stack(expected), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_that_does_nothing_only_normalizes(dtype):
    images = pictures(4, (16, 8))
    nothing = draw(recipe(size=(16, 8), flip=0.0, padding=0, erasing=0.0), 1, np.arange(4))
    assert torch.equal(augment(images, nothing, 0, *constants(dtype)), normalize(images, *constants(dtype)))
    assert not nothing.any()


def test_flip_crop_and_erasing_on_an_image_small_enough_to_read():
    image = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)[None, :, :, None].expand(1, 2, 3, 3)
    choices = torch.tensor([[1, 0, 2, 1, 0, 1, 1]])
    mean, std = torch.full((2, 3), 1 / 255, dtype=torch.float64)
    # flipped 3 2 1 / 6 5 4; padded by 1 and cropped at (0, 2): 0 0 0 / 2 1 0; minus 1; erased at (1, 0)
    expected = torch.tensor([[-1, -1, -1], [1 / 255, 0, -1]], dtype=torch.float64)
    for way in (augment_at_once, augment_one_by_one):
        torch.testing.assert_close(way(image, choices, 1, mean, std)[0], expected.expand(3, 2, 3), rtol=0, atol=1e-14)


def test_the_erased_rectangle_holds_the_mean_after_normalization():
    choices = torch.tensor([[0, 0, 0, 2, 1, 3, 4]])
    result = augment(pictures(1, (8, 6)), choices, 0, *constants(torch.float64))
    filled = result[0, :, 2:5, 1:5]
    assert torch.equal(filled, constants(torch.float64)[0][:, None, None].expand_as(filled))


@pytest.mark.parametrize("num_images", [1, 3])
def test_memory_format_fits_device_and_input_is_unchanged(num_images):
    images = pictures(num_images, (16, 8))
    before = images.clone()
    choices = draw(recipe(size=(16, 8), padding=3), 1, np.arange(num_images))
    for result in (
        augment(images, choices, 3, *constants(torch.float32)),
        normalize(images, *constants(torch.float32)),
    ):
        assert result.shape == (num_images, 3, 16, 8)
        assert result.is_contiguous()
    on_a_gpu = augment_at_once(images, choices, 3, *constants(torch.float32))
    assert on_a_gpu.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda images: images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), id="channels first"),
        pytest.param(lambda images: torch.cat([images, images], 2)[:, :, : images.shape[2]], id="part of each row"),
        pytest.param(lambda images: images.repeat_interleave(2, 0)[::2], id="every other image"),
    ],
)
def test_the_memory_layout_of_a_batch_does_not_matter(view):
    images = pictures(3, (16, 8))
    strided = view(images)
    assert not strided.is_contiguous()
    choices = draw(recipe(size=(16, 8), padding=3), 1, np.arange(3))
    for way in (augment_at_once, augment_one_by_one):
        expected = way(images, choices, 3, *constants(torch.float32))
        assert torch.equal(way(strided, choices, 3, *constants(torch.float32)), expected)
    normalized = normalize(strided, *constants(torch.float32))
    assert torch.equal(normalized, normalize(images, *constants(torch.float32)))
    assert normalized.is_contiguous()


def test_test_images_are_normalized_as_recorded():
    golden = np.load(GOLDEN)
    for i in range(3):
        resized = Image.fromarray(golden[f"image_{i}"]).resize((128, 256), Image.Resampling.BILINEAR)
        result = normalize(torch.from_numpy(np.array(resized))[None], *constants(torch.float32))[0]
        np.testing.assert_allclose(result, golden[f"tensor_{i}"], rtol=0, atol=1e-6)
