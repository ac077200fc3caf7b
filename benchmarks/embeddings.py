"""Embeddings of people as evaluation and re-ranking get them, drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

IMAGES_PER_PID = 25
NUM_CAMERAS = 6
_CHUNK = 1024


@dataclass(frozen=True)
class Drawn:
    """Images of people, each about a centre of its identity."""

    embedding: Tensor  # float32 [N, D] of length 1, in one allocation
    pids: Tensor  # int64 [N]
    camids: Tensor  # int64 [N]


def draw(num_images: int, num_features: int, device: torch.device, *, spread: float = 0.9, levels: float = 0) -> Drawn:
    """As many identities as give 25 images of each.

    Args:
        num_images: N.
        num_features: D.
        device: of the embeddings and labels.
        spread: of an identity's images, in units of the distance between identities.
        levels: steps to a unit that every feature is rounded to, so that many distances are equal; 0: not rounded.
    """
    generator = torch.Generator().manual_seed(0)
    num_pids = max(1, num_images // IMAGES_PER_PID)
    pids = torch.randint(num_pids, (num_images,), generator=generator)
    camids = torch.randint(NUM_CAMERAS, (num_images,), generator=generator)
    centres = torch.randn(num_pids, num_features, generator=generator)
    embedding = torch.empty(num_images, num_features, device=device)
    for start in range(0, num_images, _CHUNK):
        part = slice(start, min(start + _CHUNK, num_images))
        noise = torch.randn(part.stop - start, num_features, generator=generator)
        embedding[part] = normalize(centres[pids[part]] + spread * noise)
    if levels:
        embedding.mul_(levels).round_()
    return Drawn(embedding, pids.to(device), camids.to(device))
