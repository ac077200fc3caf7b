"""Embeddings of batches and of images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from reid.data.loaders import Batch
from reid.data.preprocessing import BatchPreprocessor
from reid.data.samplers import EvaluationBatches
from reid.data.store import UnreadableImageError, decode
from reid.distributed import collectives
from reid.errors import DataError, NonFiniteError
from reid.models.reid_model import ReIDModel
from reid.retrieval.distances import Distance, prepare_embeddings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

_AHEAD = 2  # batches that are decoded while one is embedded


def distance_of(cfg: CfgNode) -> Distance:
    """Return the distance by which embeddings are compared."""
    return "cosine" if cfg.TEST.FEAT_NORM else "euclidean"


class EmbeddingBatch(NamedTuple):
    """Embeddings of one batch."""

    embedding: Tensor  # [B, D] of the weights' dtype
    sample_ids: Tensor  # [B] in host memory


def build_embedder(
    model: ReIDModel, accelerator: Accelerator, preprocessor: BatchPreprocessor, *, flip: bool = False
) -> Engine:
    """Return an engine whose output is `EmbeddingBatch`.

    Args:
        model: Unwrapped model: ranks have different numbers of batches, and none may wait for another.
        accelerator: Accelerator used for autocast.
        preprocessor: Preprocessor of the batch's images.
        flip: Whether to average the embeddings of an image and its mirror image, before any normalization.
    """

    def step(engine: Engine, batch: Batch) -> EmbeddingBatch:
        del engine
        with accelerator.autocast():
            embedding = embed_images(model, preprocessor.for_evaluation(batch), flip=flip)
        return EmbeddingBatch(embedding, batch.sample_ids)

    return Engine(step)


@torch.no_grad()
def embed_images(model: nn.Module, images: Tensor, *, flip: bool) -> Tensor:
    """Return the embeddings [B, D] of normalized images [B, 3, H, W], in the number type of the weights."""
    dtype = next(model.parameters()).dtype
    embedding: Tensor = model(images).to(dtype)
    return (embedding + model(images.flip(-1)).to(dtype)) / 2 if flip else embedding


def _prepared(embedding: Tensor, cfg: CfgNode, key: str) -> Tensor:
    try:
        return prepare_embeddings(embedding, distance_of(cfg))
    except ValueError as error:
        raise NonFiniteError(f"the model's {error}; its weights or BatchNorm statistics are broken", key=key) from error


ImageSource = Path | str | Image.Image | NDArray[np.uint8]


class Embedder:
    """A trained model that turns images into embeddings; see `reid.load_model`.

    Args:
        model: Model in evaluation mode, on its device.
        cfg: Complete configuration; TEST, INPUT and SOLVER.PRECISION are read.

    Attributes:
        cfg: The frozen configuration that the model is used with.
        input_size: Height and width in pixels that images are resized to.
        num_features: Length D of an embedding.

    Example:
        >>> embedder = reid.load_model("runs/market1501/checkpoints/best_0120.pt")
        >>> embedder.embed(["a.jpg", "b.jpg"]).shape
        torch.Size([2, 2048])
    """

    def __init__(self, model: ReIDModel, cfg: CfgNode) -> None:
        self.cfg, self.num_features = cfg, model.num_features
        height, width = cfg.INPUT.SIZE_TEST
        self.input_size: tuple[int, int] = (height, width)
        self._model, self._device = model, next(model.parameters()).device
        self._preprocessor = BatchPreprocessor(cfg, self._device)
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.SOLVER.PRECISION)

    def embed(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Return the embeddings of N images as evaluation computes them: float32 [N, D] on the CPU.

        Their length is 1 where TEST.FEAT_NORM is yes; the dot product of two is then their cosine similarity.

        Args:
            images: Image files, PIL images, or uint8 RGB arrays [H, W, 3] of any size; a single one counts as N = 1.

        Raises:
            DataError: An image cannot be read, or an array is not uint8 [H, W, 3].
            NonFiniteError: The model computes NaN or infinity.
        """
        is_single = isinstance(images, str | Path | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim == 3
        )
        sources = cast("Sequence[ImageSource]", [images] if is_single else images)
        size = self.cfg.TEST.IMS_PER_BATCH
        batches = [self._embed_batch(sources[i : i + size], start=i) for i in range(0, len(sources), size)]
        return _prepared(torch.cat([torch.zeros(0, self.num_features), *batches]), self.cfg, "TEST.WEIGHT")

    def _embed_batch(self, images: Sequence[ImageSource], start: int) -> Tensor:
        pixels = b"".join(self._pixels(image, number) for number, image in enumerate(images, start))
        stored = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(len(images), *self.input_size, 3)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
            embedding = embed_images(self._model, self._preprocessor.normalized(stored), flip=self.cfg.TEST.FLIP)
        return embedding.float().cpu()

    def _pixels(self, image: ImageSource, number: int) -> bytes:
        """Return the H*W*3 bytes of one resized image."""
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
            raise DataError(
                f"an image array must be uint8 [H, W, 3] in RGB, got {image.dtype} {list(image.shape)} at position "
                f"{number}; convert it first",
                key="images",
            )
        try:
            if isinstance(image, np.ndarray):
                return decode(Image.fromarray(image), self.input_size)
            return decode(Path(image) if isinstance(image, str) else image, self.input_size)
        except UnreadableImageError as error:
            raise DataError(
                f"{image} at position {number} must be an image that can be read, got {error}. Fix: replace it.",
                key="images",
            ) from error


class BatchEmbedder:
    """An embedder whose ranks embed different batches and then gather all embeddings.

    Args:
        model: Unwrapped model.
        accelerator: Accelerator used for autocast.
        cfg: Complete configuration; TEST, INPUT and SOLVER.PRECISION are read.
        beat: Function called after every batch as a sign of life.
        is_stopped: Function called after every batch that returns whether to stop.
        key: Setting to blame if an embedding is not finite.
    """

    def __init__(
        self,
        model: ReIDModel,
        accelerator: Accelerator,
        cfg: CfgNode,
        *,
        beat: Callable[[], None] = lambda: None,
        is_stopped: Callable[[], bool] = lambda: False,
        key: str = "TEST.WEIGHT",
    ) -> None:
        self._model, self._cfg, self._beat, self._is_stopped, self._key = model, cfg, beat, is_stopped, key
        preprocessor = BatchPreprocessor(cfg, accelerator.device)
        self._engine = build_embedder(model, accelerator, preprocessor, flip=cfg.TEST.FLIP)
        self._engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        self._collected: list[EmbeddingBatch] = []

    def _collect(self, engine: Engine) -> None:
        self._collected.append(engine.state.output)  # type: ignore[arg-type]
        self._beat()
        if self._is_stopped():
            engine.terminate()

    def _embed_batches(self, batches: Iterable[Batch], num_batches: int) -> None:
        self._collected = []
        if num_batches:
            self._engine.run(batches, max_epochs=1, epoch_length=num_batches)

    def _gathered(self, num_images: int) -> Tensor:
        """Return the embeddings [N, D] of all ranks in the order of sample ids, prepared for comparison."""
        weight = next(self._model.parameters())
        # A rank without a batch takes part with no rows.
        none = torch.zeros((0, self._model.num_features), dtype=weight.dtype, device=weight.device)
        embedding = torch.cat([none, *(part.embedding for part in self._collected)])
        sample_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.sample_ids for part in self._collected)])
        self._collected = []
        embedding = collectives.gather_rows(embedding, sample_ids.to(weight.device), num_images)
        with collectives.errors_shared():
            return _prepared(embedding, self._cfg, self._key)


class EmbeddedImages(NamedTuple):
    """Embeddings of N images from all ranks."""

    embedding: Tensor  # [N, D], of length 1 where they compare by cosine
    unreadable: dict[int, str]  # position -> reason; these rows have no meaning

    def readable(self) -> Tensor:
        """Return the embeddings of readable images, in order."""
        return self.embedding[[position for position in range(len(self.embedding)) if position not in self.unreadable]]


class ImageEmbedder(BatchEmbedder):
    """An embedder of image files; called by all ranks, with the same result on all.

    Args:
        model: Unwrapped model in evaluation mode.
        accelerator: Accelerator used for autocast.
        cfg: Complete configuration; TEST, INPUT, SOLVER.PRECISION and DATALOADER.NUM_WORKERS (threads) are read.
        beat: Function called after every batch as a sign of life.
    """

    def __init__(
        self, model: ReIDModel, accelerator: Accelerator, cfg: CfgNode, *, beat: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(model, accelerator, cfg, beat=beat)
        self._size, self.batch_size = tuple(cfg.INPUT.SIZE_TEST), cfg.TEST.IMS_PER_BATCH
        self._unreadable: dict[int, str] = {}
        Image.init()  # loads PIL's plug-ins, which two threads must not do at once

    def embed(self, paths: Sequence[Path]) -> EmbeddedImages:
        """Return the embeddings of N images; each rank decodes and embeds its share of their batches.

        Raises:
            NonFiniteError: An embedding is not finite.
        """
        batches = EvaluationBatches(
            len(paths), batch_size=self.batch_size, rank=collectives.rank(), num_ranks=collectives.num_ranks()
        )
        self._unreadable = {}
        with ThreadPoolExecutor(max(1, self._cfg.DATALOADER.NUM_WORKERS), thread_name_prefix="decode") as pool:
            self._embed_batches(self._decoded(paths, batches, pool), len(batches))
        embedding = self._gathered(len(paths))
        unreadable: dict[int, str] = {}
        for of_rank in collectives.gather_objects(self._unreadable):
            unreadable |= of_rank
        return EmbeddedImages(embedding, unreadable)

    def _decoded(self, paths: Sequence[Path], batches: EvaluationBatches, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        waiting: deque[dict[int, Future[bytes]]] = deque()
        for planned in batches:
            waiting.append({i: pool.submit(decode, paths[i], self._size) for i in planned.sample_ids.tolist()})
            if len(waiting) > _AHEAD:
                yield self._batch(waiting.popleft())
        while waiting:
            yield self._batch(waiting.popleft())

    def _batch(self, decoded: dict[int, Future[bytes]]) -> Batch:
        """Return a batch; unreadable images are black, so that other embeddings do not depend on them."""
        images = np.zeros((len(decoded), *self._size, 3), dtype=np.uint8)
        for image, (position, future) in zip(images, decoded.items(), strict=True):
            try:
                image[:] = np.frombuffer(future.result(), np.uint8).reshape(image.shape)
            except UnreadableImageError as error:
                self._unreadable[position] = str(error)
        ids = torch.tensor(list(decoded))
        no_draws = torch.zeros((len(ids), 0), dtype=torch.int32)
        return Batch(torch.from_numpy(images), torch.zeros_like(ids), ids, no_draws)
