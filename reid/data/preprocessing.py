"""Preprocessing of batches on the device."""

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
    """Converts uint8 images in host memory to the model's input on the device.

    Args:
        cfg: Configuration; INPUT, MODEL.NAME and SOLVER.PRECISION are read.
        device: Device of the model.
        images: [N, H, W, 3], uint8, all images of the data set on the device; None if each batch holds its images.
    """

    def __init__(self, cfg: CfgNode, device: torch.device, images: Tensor | None = None) -> None:
        self._device, self._images = device, images
        dtype = torch.float64 if cfg.SOLVER.PRECISION == "fp64" else torch.float32
        self._mean, self._std = (torch.tensor(value, dtype=dtype, device=device) for value in normalization(cfg))
        self._padding: int = cfg.INPUT.PADDING

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def for_training(self, batch: Batch) -> Tensor:
        """Return the augmented images of the batch: [B, 3, H, W]."""
        if self._images is None:
            images = self.to_device(batch.images)
        else:
            images = self._images.index_select(0, self.to_device(batch.sample_ids))
        return augment(images, self.to_device(batch.drawn), self._padding, self._mean, self._std)

    def for_evaluation(self, batch: Batch) -> Tensor:
        """Return the normalized images of the batch: [B, 3, H, W]."""
        return self.normalized(batch.images)

    def normalized(self, images: Tensor) -> Tensor:
        """Return uint8 images [B, H, W, 3] as the model takes them: [B, 3, H, W]."""
        return normalize(self.to_device(images), self._mean, self._std)
