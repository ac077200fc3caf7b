"""The gradient of the global batch's loss, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reid.criterion import Losses
from reid.model import ReIDOutput
from reid.wrapping import statistics_kept

if TYPE_CHECKING:
    from accelerate import Accelerator

    from reid.data.loaders import Batch


def backward_in_parts(
    model: nn.Module,
    prepare: Callable[[Batch], Tensor],
    batch: Batch,
    num_parts: int,
    criterion: Callable[[ReIDOutput], Losses],
    accelerator: Accelerator,
) -> Losses:
    """The losses of the batch, and their gradient in the model's parameters, with one part's activations in memory.

    Part i holds every `num_parts`-th image from the i-th on, so that the parts of all ranks together are the same for
    any number of ranks. First all outputs without a graph; then the loss, and its gradient at the outputs; then each
    part once more, whose outputs' product with that gradient has the loss's gradient in the parameters.

    Args:
        model: wrapped by accelerate; deterministic, as it sees every image twice.
        prepare: of images for the model.
        batch: of this rank.
        num_parts: divides the batch.
        criterion: of the outputs of the whole batch.
        accelerator: which wrapped the model.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
    """
    parts = [type(batch)(*(field[i::num_parts] for field in batch)) for i in range(num_parts)]
    with torch.no_grad(), statistics_kept(model):
        outputs = [model(prepare(part)) for part in parts]
    whole = ReIDOutput(*(_interleaved(fields).requires_grad_() for fields in zip(*outputs, strict=True)))
    losses = criterion(whole)
    losses.to_minimise.backward()  # type: ignore[no-untyped-call]
    for i, part in enumerate(parts):
        with nullcontext() if i == num_parts - 1 else accelerator.no_sync(model):
            products = [
                (field * given.grad[i::num_parts]).sum()
                for field, given in zip(model(prepare(part)), whole, strict=True)
                if given.grad is not None
            ]
            accelerator.backward(torch.stack(products).sum())
    return losses


def _interleaved(parts: tuple[Tensor, ...]) -> Tensor:
    """Part i's rows at the places i, i + n, ...: [B, D]."""
    return torch.stack(parts, dim=1).flatten(0, 1)
