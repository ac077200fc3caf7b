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
    """Return an engine whose output is this rank's shares of the losses and of the gradient norm before clipping.

    The shares are scalars on the device, because the step never waits for it.

    Args:
        model: Model, wrapped by accelerate.
        criterion: Criterion of the global batch.
        optimizer: Optimizer, wrapped by accelerate.
        accelerator: Accelerator that wrapped them.
        preprocessor: Preprocessing of the batches' images.
        num_parts: SOLVER.ACCUMULATE.
        max_grad_norm: SOLVER.CLIP_GRAD_NORM; 0 for no clipping.
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
        # The norm is the same on all ranks. If fp16 overflows, the step is skipped and the norm means nothing.
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
    """Return the losses of the batch and add their gradient to the parameters, with one part's activations in memory.

    Part i holds every `num_parts`-th image from the i-th on, so that the parts of all ranks together are the same for
    any number of ranks. First, all outputs are computed without a graph. Then the loss and its gradient with respect to
    the outputs are computed. Finally, each part runs again: the gradient of (outputs * output gradient).sum() with
    respect to the parameters is that of the loss.

    Args:
        model: Model, wrapped by accelerate; deterministic, because every image passes it twice.
        prepare: Function that returns the images of a batch for the model.
        batch: Batch of this rank.
        num_parts: Number of parts, a divisor of the batch size.
        criterion: Function from the outputs of the complete batch to its losses.
        accelerator: Accelerator that wrapped the model.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983.
    """
    parts = [type(batch)(*(field[i::num_parts] for field in batch)) for i in range(num_parts)]
    with torch.no_grad(), preserve_batchnorm_statistics(model):
        outputs = [model(prepare(part)) for part in parts]
    # Row i of part k is row i * num_parts + k of the batch.
    all_outputs = ReIDOutput(
        *(torch.stack(fields, dim=1).flatten(0, 1).requires_grad_() for fields in zip(*outputs, strict=True))
    )
    losses = criterion(all_outputs)
    losses.to_minimize.backward()  # type: ignore[no-untyped-call]
    for i, part in enumerate(parts):
        with nullcontext() if i == num_parts - 1 else accelerator.no_sync(model):
            products = [
                (field * earlier.grad[i::num_parts]).sum()
                for field, earlier in zip(model(prepare(part)), all_outputs, strict=True)
                if earlier.grad is not None
            ]
            accelerator.backward(torch.stack(products).sum())
    return losses
