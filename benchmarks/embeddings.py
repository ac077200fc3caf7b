"""Generated embeddings of people, as evaluation and re-ranking receive them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

IMAGES_PER_PID = 25
NUM_CAMERAS = 6
_CHUNK = 1024


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of images, each around the center of its identity."""

    embedding: Tensor  # float32 [N, D] of length 1, in one allocation
    pids: Tensor  # int64 [N]
    camids: Tensor  # int64 [N]


def draw(
    num_images: int, num_features: int, device: torch.device, *, spread: float = 0.9, levels: float = 0
) -> Embeddings:
    """Return random embeddings with 25 images of each identity on average.

    Args:
        num_images: Number N of images.
        num_features: Number D of features.
        device: Device of the embeddings and labels.
        spread: Spread of the images of an identity, in units of the distance between identities.
        levels: Steps per unit to which features are rounded, so that many distances are equal; 0 for no rounding.
    """
    generator = torch.Generator().manual_seed(0)
    num_pids = max(1, num_images // IMAGES_PER_PID)
    pids = torch.randint(num_pids, (num_images,), generator=generator)
    camids = torch.randint(NUM_CAMERAS, (num_images,), generator=generator)
    centers = torch.randn(num_pids, num_features, generator=generator)
    embedding = torch.empty(num_images, num_features, device=device)
    for start in range(0, num_images, _CHUNK):
        part = slice(start, min(start + _CHUNK, num_images))
        noise = torch.randn(part.stop - start, num_features, generator=generator)
        embedding[part] = normalize(centers[pids[part]] + spread * noise)
    if levels:
        embedding.mul_(levels).round_()
    return Embeddings(embedding, pids.to(device), camids.to(device))
