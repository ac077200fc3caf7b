"""Augmentation of uint8 batches on the device: flip, pad and crop, normalize, random erasing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reid.randomness import uniform

# One number per purpose, so that no two purposes share random numbers (samplers.py uses the low ones).
_FLIP, _CROP_TOP, _CROP_LEFT, _ERASE, _ERASE_BOX = range(16, 21)
_ERASE_ATTEMPTS = 100
_ERASE_AREA = (0.02, 0.4)  # of the image
_ERASE_RATIO = (0.3, 1 / 0.3)  # height / width

# Columns of a draw
FLIP, TOP, LEFT, ERASE_TOP, ERASE_LEFT, ERASE_HEIGHT, ERASE_WIDTH = range(7)


@dataclass(frozen=True)
class Recipe:
    """Settings of the augmentation, in the order in which it is applied to a training image.

    Args:
        size: H and W in pixels.
        flip_probability: Probability of a horizontal flip.
        padding: Black pixels added on all four sides before a random crop back to `size`.
        erasing_probability: Probability of random erasing.
        seed: Seed of the run.

    Source: Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, arXiv 1903.07071;
        erasing: Zhong et al., Random Erasing Data Augmentation, arXiv 1708.04896, with the aspect ratio drawn uniformly
        as reid-strong-baseline does.
    """

    size: tuple[int, int]
    flip_probability: float
    padding: int
    erasing_probability: float
    seed: int


def draw(recipe: Recipe, epoch: int, positions: NDArray[np.int64]) -> Tensor:
    """Draw the augmentation of each image, as a function of (seed, epoch, position in the epoch's global plan).

    Args:
        recipe: Sizes, probabilities and seed.
        epoch: Epoch, counted from 1.
        positions: [B].

    Returns:
        int32 [B, 7]: flip (0 or 1), top and left of the crop in the padded image, and top, left, height and width of
        the erased rectangle (height 0: none), in pixels.
    """
    drawn = np.zeros((len(positions), 7), dtype=np.int32)
    drawn[:, FLIP] = uniform(recipe.seed, epoch, _FLIP, positions) < recipe.flip_probability
    num_offsets = 2 * recipe.padding + 1
    drawn[:, TOP] = uniform(recipe.seed, epoch, _CROP_TOP, positions) * num_offsets
    drawn[:, LEFT] = uniform(recipe.seed, epoch, _CROP_LEFT, positions) * num_offsets
    erased = uniform(recipe.seed, epoch, _ERASE, positions) < recipe.erasing_probability
    drawn[erased, ERASE_TOP:] = _erased_boxes(recipe, epoch, positions[erased])
    return torch.from_numpy(drawn)


def _erased_boxes(recipe: Recipe, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return top, left, height and width of the first of 100 random rectangles that fits into the image: [B, 4]."""
    height, width = recipe.size
    boxes = np.zeros((len(positions), 4), dtype=np.int32)
    pending = np.arange(len(positions))
    for attempt in range(_ERASE_ATTEMPTS):
        if not len(pending):
            break
        u = uniform(recipe.seed, epoch, _ERASE_BOX, positions[pending][:, None], attempt, np.arange(4))  # [b, 4]
        area = (_ERASE_AREA[0] + u[:, 0] * (_ERASE_AREA[1] - _ERASE_AREA[0])) * height * width
        ratio = _ERASE_RATIO[0] + u[:, 1] * (_ERASE_RATIO[1] - _ERASE_RATIO[0])
        h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        box = np.stack([u[:, 2] * (height - h + 1), u[:, 3] * (width - w + 1), h, w], axis=1)
        fits = (h < height) & (w < width)
        boxes[pending[fits]] = box[fits].astype(np.int32)
        pending = pending[~fits]
    return boxes


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale the images to [0, 1], subtract the mean and divide by the standard deviation.

    Args:
        images: [B, H, W, 3], uint8.
        mean: [3], for pixels in [0, 1].
        std: [3], for pixels in [0, 1].

    Returns:
        [B, 3, H, W], of mean's dtype; contiguous on a CPU, in channels_last memory format elsewhere.
    """
    if images.device.type != "cpu":
        return normalize_at_once(images, mean, std)
    result = torch.empty((len(images), 3, *images.shape[1:3]), dtype=mean.dtype)
    for image, out in zip(images, result, strict=True):
        _normalize_in_place(out.copy_(image.permute(2, 0, 1)), mean, std)
    return result


def augment(images: Tensor, drawn: Tensor, padding: int, mean: Tensor, std: Tensor) -> Tensor:
    """Flip, pad with black and crop, normalize, erase.

    The erased rectangle is filled with `mean` after normalization (so slightly bright, not gray), as published.

    Args:
        images: [B, H, W, 3], uint8.
        drawn: [B, 7], integers that `draw` returned.
        padding: Padding of the recipe in pixels.
        mean: [3], for pixels in [0, 1].
        std: [3], for pixels in [0, 1].

    Returns:
        [B, 3, H, W], of mean's dtype; contiguous on a CPU, in channels_last memory format elsewhere, with equal values.
    """
    if images.device.type == "cpu":
        return augment_one_by_one(images, drawn, padding, mean, std)
    return augment_at_once(images, drawn, padding, mean, std)


def augment_one_by_one(images: Tensor, drawn: Tensor, padding: int, mean: Tensor, std: Tensor) -> Tensor:
    """Augment on a CPU, where an image stays in the cache from the first pass to the last."""
    _, height, width, _ = images.shape
    result = torch.empty((len(images), 3, height, width), dtype=mean.dtype)
    for image, out, choices in zip(images, result, drawn.tolist(), strict=True):
        flip, top, left, erase_top, erase_left, erase_height, erase_width = choices
        rows, out_rows = _overlap(top - padding, height)
        columns, out_columns = _overlap(left - padding, width)
        if flip:
            columns = slice(width - columns.stop, width - columns.start)
        kept = image[rows, columns].permute(2, 0, 1)
        if kept.shape != out.shape:
            out.zero_()
        out[:, out_rows, out_columns] = kept.flip(2) if flip else kept
        _normalize_in_place(out, mean, std)
        out[:, erase_top : erase_top + erase_height, erase_left : erase_left + erase_width] = mean[:, None, None]
    return result


def _overlap(offset: int, size: int) -> tuple[slice, slice]:
    """Return the pixels of an image that a crop of its size at `offset` covers, and their positions in the crop."""
    start, stop = min(max(offset, 0), size), max(min(offset + size, size), 0)
    return slice(start, max(start, stop)), slice(start - offset, max(start, stop) - offset)


def _normalize_in_place(image: Tensor, mean: Tensor, std: Tensor) -> None:
    """Normalize an image [3, H, W] of 0..255."""
    image.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def normalize_at_once(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize on a GPU, or where a loop over the images cannot be traced."""
    scaled = images.to(mean.dtype, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(mean).div_(std).permute(0, 3, 1, 2)


def augment_at_once(images: Tensor, drawn: Tensor, padding: int, mean: Tensor, std: Tensor) -> Tensor:
    """Augment on a GPU, in a few passes over the batch, whatever was drawn for its images."""
    result = normalize_at_once(_flip_and_crop(images, drawn, padding), mean, std)
    erased = (
        _inside(drawn[:, ERASE_TOP], drawn[:, ERASE_HEIGHT], images.shape[1])[:, None, :, None]
        & (_inside(drawn[:, ERASE_LEFT], drawn[:, ERASE_WIDTH], images.shape[2])[:, None, None, :])
    )  # [B, 1, H, W]
    return torch.where(erased, mean[:, None, None], result)


def _flip_and_crop(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """Fetch each pixel from its source, or black from the padding: [B, H, W, 3]."""
    num_images, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device) + (drawn[:, TOP, None] - padding)  # [B, H] source rows
    columns = torch.arange(width, device=images.device) + (drawn[:, LEFT, None] - padding)  # [B, W]
    is_padding = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
    columns = torch.where(drawn[:, FLIP, None].bool(), width - 1 - columns, columns)
    base = torch.arange(num_images, device=images.device)[:, None] * height
    row_starts = (base + rows.clamp(0, height - 1)) * width  # [B, H]
    sources = row_starts[:, :, None] + columns.clamp(0, width - 1)[:, None, :]  # [B, H, W] into the flat pixels
    fetched = images.reshape(-1, channels)[sources]
    return fetched.masked_fill_(is_padding[..., None], 0)


def _inside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return which of `size` positions are in [start, start + length): bool [B, size]."""
    positions = torch.arange(size, device=start.device)
    return (positions >= start[:, None]) & (positions < (start + length)[:, None])
