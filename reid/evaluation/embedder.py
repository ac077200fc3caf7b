"""Embeddings of batches and of image files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from reid.data.store import decode, pixels_of, reason_of
from reid.distributed import collectives
from reid.errors import DataError, NonFiniteError, shared
from reid.models.reid_model import ReIDModel
from reid.retrieval.distances import Distance, prepare_embeddings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

_AHEAD = 2  # batches that are decoded while one is embedded


def distance_of(cfg: CfgNode) -> Distance:
    """How embeddings compare."""
    return "cosine" if cfg.TEST.FEAT_NORM else "euclidean"


class EmbeddingBatch(NamedTuple):
    """The embeddings of one batch."""

    embedding: Tensor  # [B, D] of the weights' dtype
    sample_ids: Tensor  # [B] in host memory


def build_embedder(
    model: ReIDModel, accelerator: Accelerator, preprocessor: BatchPreprocessor, *, flip: bool = False
) -> Engine:
    """An engine whose output is `EmbeddingBatch`.

    Args:
        model: not wrapped, as ranks have different numbers of batches and none may wait for another.
        accelerator: whose precision is used.
        preprocessor: of the batch's images.
        flip: the embedding is the mean of those of the image and of its mirror image, before any normalisation.
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


ImageSource = Path | str | Image.Image | NDArray[np.uint8]


class Embedder:
    """A trained model that turns images into embeddings; see `reid.load_model`.

    Args:
        model: Model in evaluation mode, on its device.
        cfg: Whole configuration; TEST, INPUT and SOLVER.PRECISION are read.

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
        embedding = torch.cat([torch.zeros(0, self.num_features), *batches])
        try:
            return prepare_embeddings(embedding, distance_of(self.cfg))
        except ValueError as error:
            raise NonFiniteError(
                f"the model's {error}; its weights or BatchNorm statistics are broken", key="TEST.WEIGHT"
            ) from error

    def _embed_batch(self, images: Sequence[ImageSource], start: int) -> Tensor:
        pixels = b"".join(self._pixels(image, number) for number, image in enumerate(images, start))
        stored = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(len(images), *self.input_size, 3)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
            embedding = embed_images(self._model, self._preprocessor.normalized(stored), flip=self.cfg.TEST.FLIP)
        return embedding.float().cpu()

    def _pixels(self, image: ImageSource, number: int) -> bytes:
        """The resized pixels of one image, H*W*3 bytes."""
        try:
            if isinstance(image, np.ndarray):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise DataError(
                        f"an image array must be uint8 [H, W, 3] in RGB, got {image.dtype} {list(image.shape)} at "
                        f"position {number}; convert it first",
                        key="images",
                    )
                return pixels_of(Image.fromarray(image), self.input_size)
            if isinstance(image, Image.Image):
                return pixels_of(image, self.input_size)
            return decode(Path(image), self.input_size)
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{image} at position {number} must be an image that can be read, got {reason_of(error)}; replace it",
                key="images",
            ) from error


class EmbeddedImages(NamedTuple):
    """What all ranks together made of N images."""

    embedding: Tensor  # [N, D], of length 1 where they compare by cosine
    unreadable: dict[int, str]  # position -> reason; these rows mean nothing

    def readable(self) -> Tensor:
        """The embeddings that mean something, in order."""
        kept = [place for place in range(len(self.embedding)) if place not in self.unreadable]
        return self.embedding[kept]


class ImageEmbedder:
    """Embeds image files as evaluation embeds its images; called by all ranks, the same result on all.

    Args:
        model: in evaluation mode, not wrapped.
        accelerator: whose precision is used.
        cfg: the whole configuration; TEST, INPUT, SOLVER.PRECISION and DATALOADER.NUM_WORKERS (threads) are read.
        beat: called after every batch, as a sign of life.
    """

    def __init__(
        self, model: ReIDModel, accelerator: Accelerator, cfg: CfgNode, *, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._beat = beat
        self._distance: Distance = distance_of(cfg)
        self._size, self.batch_size = tuple(cfg.INPUT.SIZE_TEST), cfg.TEST.IMS_PER_BATCH
        self._num_threads = max(1, cfg.DATALOADER.NUM_WORKERS)
        weight = next(model.parameters())
        # A rank without a batch takes part with no rows.
        self._none = torch.zeros((0, model.num_features), dtype=weight.dtype, device=weight.device)
        preprocessor = BatchPreprocessor(cfg, accelerator.device)
        self._embedder = build_embedder(model, accelerator, preprocessor, flip=cfg.TEST.FLIP)
        self._embedder.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        self._collected: list[EmbeddingBatch] = []
        self._unreadable: dict[int, str] = {}
        Image.init()  # loads PIL's plug-ins, which two threads must not do at once

    def embed(self, paths: Sequence[Path]) -> EmbeddedImages:
        """The embeddings of N images; each rank decodes and embeds its share of their batches.

        Raises:
            NonFiniteError: one is not finite.
        """
        batches = EvaluationBatches(
            len(paths), batch_size=self.batch_size, rank=collectives.rank(), num_ranks=collectives.num_ranks()
        )
        self._collected, self._unreadable = [], {}
        if len(batches):
            with ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode") as pool:
                self._embedder.run(self._decoded(paths, batches, pool), max_epochs=1, epoch_length=len(batches))
        embedding = torch.cat([self._none, *(part.embedding for part in self._collected)])
        sample_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.sample_ids for part in self._collected)])
        self._collected = []
        embedding = collectives.gather_rows(embedding, sample_ids.to(embedding.device), len(paths))
        unreadable: dict[int, str] = {}
        for of_rank in collectives.gather_objects(self._unreadable):
            unreadable |= of_rank
        try:
            return EmbeddedImages(prepare_embeddings(embedding, self._distance), unreadable)
        except ValueError as error:
            raise shared(
                NonFiniteError(
                    f"the model's {error}; its weights or BatchNorm statistics are broken", key="TEST.WEIGHT"
                )
            ) from error

    def _decoded(self, paths: Sequence[Path], batches: EvaluationBatches, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        waiting: deque[dict[int, Future[bytes]]] = deque()
        for planned in batches:
            waiting.append({i: pool.submit(decode, paths[i], self._size) for i in planned.sample_ids.tolist()})
            if len(waiting) > _AHEAD:
                yield self._batch(waiting.popleft())
        while waiting:
            yield self._batch(waiting.popleft())

    def _batch(self, decoded: dict[int, Future[bytes]]) -> Batch:
        """The images; black where one cannot be read, so that the others' embeddings do not depend on it."""
        images = np.zeros((len(decoded), *self._size, 3), dtype=np.uint8)
        for image, (place, future) in zip(images, decoded.items(), strict=True):
            try:
                image[:] = np.frombuffer(future.result(), np.uint8).reshape(image.shape)
            except Exception as error:  # a broken file makes PIL's decoders raise nearly anything
                self._unreadable[place] = reason_of(error)
        ids = torch.tensor(list(decoded))
        no_draws = torch.zeros((len(ids), 0), dtype=torch.int32)
        return Batch(torch.from_numpy(images), torch.zeros_like(ids), ids, no_draws)

    def _collect(self, engine: Engine) -> None:
        self._collected.append(engine.state.output)  # type: ignore[arg-type]
        self._beat()
