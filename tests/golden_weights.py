"""Weights computed from the names of their parameters, as for the golden figures (zlib.crc32 seeds)."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import nn


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the value of one entry of a state dict, float64; for all but num_batches_tracked."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) == 4:
        return random.standard_normal(shape) * np.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    if len(shape) == 2:
        return random.standard_normal(shape) * np.sqrt(1 / shape[1])
    if name.endswith("running_var"):
        return random.uniform(0.5, 1.5, shape)
    if name.endswith("running_mean"):
        return random.standard_normal(shape) * 0.1
    if name.endswith("weight"):
        return random.uniform(0.5, 1.0, shape)
    return random.standard_normal(shape) * 0.1


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Overwrite all weights and buffers, the centers among them, in place and in the model's dtype."""
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
