"""The train step, as an Ignite engine, and the gradient of a global batch in several parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from ignite.engine import Engine
from torch import Tensor, nn

from reid.data.preprocessing import BatchPreprocessor
from reid.distributed.accelerator import clip_gradients, preserve_batchnorm_statistics
from reid.models.reid_model import ReIDOutput
from reid.training.criterion import Criterion, Losses

if TYPE_CHECKING:
    from accelerate import Accelerator

    from reid.data.loaders import Batch


def build_trainer(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    preprocessor: BatchPreprocessor,
    *,
    num_parts: int = 1,
    max_grad_norm: float = 0,
) -> Engine:
    """An engine whose output is this rank's shares of the step's losses and of the gradient's 2-norm before clipping.

    They are scalars on the device, as the step never waits for it.

    Args:
        model: wrapped by accelerate.
        criterion: of the global batch.
        optimizer: wrapped by accelerate.
        accelerator: which wrapped them.
        preprocessor: of the batch's images.
        num_parts: SOLVER.ACCUMULATE.
        max_grad_norm: SOLVER.CLIP_GRAD_NORM.
    """
    centers = getattr(accelerator.unwrap_model(model), "centers", None)

    def backward(batch: Batch) -> Losses:
        pids = preprocessor.to_device(batch.pids)
        if num_parts > 1:
            loss = partial(criterion, pids=pids, centers=centers)
            return backward_in_parts(model, preprocessor.for_training, batch, num_parts, loss, accelerator)
        losses = criterion(model(preprocessor.for_training(batch)), pids, centers)
        accelerator.backward(losses.to_minimize)
        return losses

    def step(engine: Engine, batch: Batch) -> dict[str, Tensor]:
        del engine
        optimizer.zero_grad()
        losses = backward(batch)
        norm = clip_gradients(accelerator, model, max_grad_norm)
        optimizer.step()
        if centers is not None:
            criterion.move_centers(losses, centers)
        # It is the same on all ranks. Where fp16 overflows, the step is left out, and says nothing of the loss.
        share = norm.nan_to_num(0, 0, 0) / accelerator.num_processes
        return {**losses.shares, "grad_norm": share}

    return Engine(step)


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
    with torch.no_grad(), preserve_batchnorm_statistics(model):
        outputs = [model(prepare(part)) for part in parts]
    whole = ReIDOutput(*(_interleaved(fields).requires_grad_() for fields in zip(*outputs, strict=True)))
    losses = criterion(whole)
    losses.to_minimize.backward()  # type: ignore[no-untyped-call]
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
