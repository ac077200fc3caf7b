"""Embeddings of batches and of image files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor

from reid import distributed
from reid.data.loaders import Batch
from reid.data.preprocessing import BatchPreprocessor
from reid.data.samplers import EvaluationBatches
from reid.data.store import decode, reason_of
from reid.errors import NonFiniteError, shared
from reid.metrics import prepare_embeddings
from reid.model import ReIDModel

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

Distance = Literal["cosine", "euclidean"]

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
    dtype = next(model.parameters()).dtype

    def embed(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(images).to(dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(engine: Engine, batch: Batch) -> EmbeddingBatch:
        del engine
        images = preprocessor.for_evaluation(batch)
        embedding = embed(images)
        if flip:
            embedding = (embedding + embed(images.flip(-1))) / 2
        return EmbeddingBatch(embedding, batch.sample_ids)

    return Engine(step)


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
            len(paths), batch_size=self.batch_size, rank=distributed.rank(), num_ranks=distributed.num_ranks()
        )
        self._collected, self._unreadable = [], {}
        if len(batches):
            with ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode") as pool:
                self._embedder.run(self._decoded(paths, batches, pool), max_epochs=1, epoch_length=len(batches))
        embedding = torch.cat([self._none, *(part.embedding for part in self._collected)])
        sample_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.sample_ids for part in self._collected)])
        self._collected = []
        embedding = distributed.gather_rows(embedding, sample_ids.to(embedding.device), len(paths))
        unreadable: dict[int, str] = {}
        for of_rank in distributed.gather_objects(self._unreadable):
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
