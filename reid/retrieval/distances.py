"""Distances between the embeddings of queries and of gallery images, one block of queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

Distance = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class Distances:
    """Distances of Q queries to the gallery, computed one block of queries at a time.

    Attributes:
        of_block: Function of a block of queries that returns [b, G], always the same values for the same block. They
            are comparable within a row.
        offset: [Q] values that make distances of different queries comparable when added to their rows.
    """

    of_block: Callable[[slice], Tensor]
    offset: Tensor


def as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """Return the values without gradient; arrays that torch cannot share (negative strides) are copied."""
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.ascontiguousarray(values))


def prepare_pair(
    q_embedding: ArrayLike | Tensor, g_embedding: ArrayLike | Tensor, distance: Distance
) -> tuple[Tensor, Tensor]:
    """Return embeddings [Q, D] and [G, D] of one floating type, see `prepare_embeddings`."""
    pair = as_tensor(q_embedding), as_tensor(g_embedding)
    dtype = torch.promote_types(pair[0].dtype, pair[1].dtype)
    q, g = (prepare_embeddings(embedding.to(dtype), distance) for embedding in pair)
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"embeddings must be [Q, D] and [G, D], got {list(q.shape)} and {list(g.shape)}")
    return q, g


def prepare_embeddings(embedding: Tensor, distance: Distance) -> Tensor:
    """Return finite embeddings [N, D] in float32 or float64, scaled to length 1 for the cosine distance.

    Raises:
        ValueError: The distance is unknown, the embedding is not two-dimensional, or a squared length is not finite.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance must be cosine or euclidean, got {distance!r}")
    if embedding.dim() != 2:
        raise ValueError(f"embeddings must be [N, D], got shape {list(embedding.shape)}")
    if embedding.dtype != torch.float64:
        embedding = embedding.float()
    if not embedding.square().sum(1).isfinite().all():  # NaN, infinity, or so large that distances would overflow
        raise ValueError("embeddings and their squared lengths must be finite, got NaN or infinity")
    return F.normalize(embedding) if distance == "cosine" else embedding


def embedding_distances(q_embedding: Tensor, g_embedding: Tensor, distance: Distance) -> Distances:
    """Return negative cosines or squared Euclidean distances of embeddings that `prepare_embeddings` returned.

    The squared length of a query is its offset: adding it to the row would round the distances and not change their
    order.
    """
    if distance == "cosine":
        return Distances(lambda block: -q_embedding[block] @ g_embedding.T, q_embedding.new_zeros(len(q_embedding)))
    squared_lengths = g_embedding.square().sum(1)
    return Distances(
        lambda block: torch.addmm(squared_lengths, q_embedding[block], g_embedding.T, alpha=-2),
        q_embedding.square().sum(1),
    )
