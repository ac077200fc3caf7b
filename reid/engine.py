"""What happens to one batch: the train step and the embed step, as Ignite engines."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from ignite.engine import Engine
from torch import Tensor, nn

from reid.accumulation import backward_in_parts
from reid.backbones import normalisation
from reid.criterion import Criterion, Losses
from reid.data.augment import augment, normalise
from reid.model import ReIDModel
from reid.wrapping import clip_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

    from reid.data.loaders import Batch


class Preparation:
    """From uint8 images in host memory to what the model takes, on the device.

    Args:
        cfg: the whole configuration; INPUT, MODEL.NAME and SOLVER.PRECISION are read.
        device: of the model.
        images: all images of the data set, uint8 [N, H, W, 3], where they lie on the device; None where each batch
            brings its own.
    """

    def __init__(self, cfg: CfgNode, device: torch.device, images: Tensor | None = None) -> None:
        self._device, self._images = device, images
        dtype = torch.float64 if cfg.SOLVER.PRECISION == "fp64" else torch.float32
        self._mean, self._std = (torch.tensor(value, dtype=dtype, device=device) for value in normalisation(cfg))
        self._padding: int = cfg.INPUT.PADDING

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def for_training(self, batch: Batch) -> Tensor:
        """Augmented images [B, 3, H, W]."""
        drawn = self.to_device(batch.drawn)
        if self._images is None:
            images = self.to_device(batch.images)
        else:
            images = self._images.index_select(0, self.to_device(batch.sample_ids))
        return augment(images, drawn, self._padding, self._mean, self._std)

    def for_evaluation(self, batch: Batch) -> Tensor:
        """Normalised images [B, 3, H, W]."""
        return normalise(self.to_device(batch.images), self._mean, self._std)


def build_trainer(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    preparation: Preparation,
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
        preparation: of the batch's images.
        num_parts: SOLVER.ACCUMULATE.
        max_grad_norm: SOLVER.CLIP_GRAD_NORM.
    """
    centers = getattr(accelerator.unwrap_model(model), "centers", None)

    def backward(batch: Batch) -> Losses:
        pids = preparation.to_device(batch.pids)
        if num_parts > 1:
            criterion_of_batch = partial(criterion, pids=pids, centers=centers)
            return backward_in_parts(model, preparation.for_training, batch, num_parts, criterion_of_batch, accelerator)
        losses = criterion(model(preparation.for_training(batch)), pids, centers)
        accelerator.backward(losses.to_minimise)
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


class Embedded(NamedTuple):
    """The embeddings of one batch."""

    embedding: Tensor  # [B, D] of the weights' dtype
    sample_ids: Tensor  # [B] in host memory


def build_embedder(
    model: ReIDModel, accelerator: Accelerator, preparation: Preparation, *, flip: bool = False
) -> Engine:
    """An engine whose output is `Embedded`.

    Args:
        model: not wrapped, as ranks have different numbers of batches and none may wait for another.
        accelerator: whose precision is used.
        preparation: of the batch's images.
        flip: the embedding is the mean of those of the image and of its mirror image, before any normalisation.
    """
    dtype = next(model.parameters()).dtype

    def embed(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(images).to(dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(engine: Engine, batch: Batch) -> Embedded:
        del engine
        images = preparation.for_evaluation(batch)
        embedding = embed(images)
        if flip:
            embedding = (embedding + embed(images.flip(-1))) / 2
        return Embedded(embedding, batch.sample_ids)

    return Engine(step)
