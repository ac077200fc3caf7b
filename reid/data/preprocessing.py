"""Batches from host memory to the model's input, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reid.data.augment import augment, normalize
from reid.models.backbones import normalization

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from reid.data.loaders import Batch


class BatchPreprocessor:
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
        self._mean, self._std = (torch.tensor(value, dtype=dtype, device=device) for value in normalization(cfg))
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
        return self.normalized(batch.images)

    def normalized(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] as the model takes them: [B, 3, H, W]."""
        return normalize(self.to_device(images), self._mean, self._std)
