"""Embeddings of all ranks to retrieval scores; every rank ranks its own blocks of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from reid import distributed
from reid.data.loaders import TestData, build_test_data
from reid.data.sets import DataSets
from reid.engine import Embedded, Preparation, build_embedder
from reid.errors import DataError, shared
from reid.metrics import (
    Labels,
    QueryScores,
    RetrievalScores,
    concatenate,
    prepare_embeddings,
    query_blocks,
    score_block,
    summarise,
)
from reid.model import ReIDModel
from reid.preemption import Preempted
from reid.wrapping import unsharded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

Distance = Literal["cosine", "euclidean"]


class Evaluator:
    """Embeds query and gallery and scores the retrieval; called by all ranks, the same result on all.

    Args:
        model: not wrapped.
        accelerator: whose precision is used.
        data: query and gallery.
        cfg: the whole configuration; TEST, INPUT and SOLVER.PRECISION are read.
        beat: called after every batch, as a sign of life.
        is_stopped: asked after every batch whether there is no time left for this.
    """

    def __init__(
        self,
        model: ReIDModel,
        accelerator: Accelerator,
        data: TestData,
        cfg: CfgNode,
        *,
        beat: Callable[[], None] = lambda: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model, self._data = model, data
        self._beat, self._is_stopped = beat, is_stopped
        self._distance: Distance = "cosine" if cfg.TEST.FEAT_NORM else "euclidean"
        self._num_features = model.num_features
        self._embedder = build_embedder(model, accelerator, Preparation(cfg, accelerator.device))
        self._embedder.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        self._collected: list[Embedded] = []

    def run(self) -> RetrievalScores:
        """Scores of the model as it is now.

        Raises:
            DataError: no query has a match.
            FloatingPointError: an embedding is not finite.
            Preempted: stopped on some rank, and hence on all.
        """
        distributed.broadcast_buffers(self._model)
        embedding = self._embed()
        num_queries = len(self._data.query.pids)
        scores = score_queries(
            embedding[:num_queries], embedding[num_queries:], self._data.query, self._data.gallery, self._distance
        )
        try:
            return summarise(scores)
        except ValueError as error:
            raise shared(DataError(f"{error}; check the camera and identity numbers in the file names")) from error

    def _embed(self) -> Tensor:
        """Embeddings of query and gallery in the data set's order, on every rank: [Q + G, D]."""
        self._collected = []
        was_training = self._model.training
        self._model.eval()
        with unsharded(self._model):
            if len(self._data.loader):
                self._embedder.run(self._data.loader)
        self._model.train(was_training)
        if distributed.on_any_rank(own=self._is_stopped()):
            raise shared(Preempted())
        weight = next(self._model.parameters())
        # A rank without a batch takes part with no rows.
        none = torch.zeros((0, self._num_features), dtype=weight.dtype, device=weight.device)
        embedding = torch.cat([none, *(part.embedding for part in self._collected)])
        sample_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.sample_ids for part in self._collected)])
        self._collected = []
        num_images = len(self._data.query.pids) + len(self._data.gallery.pids)
        return distributed.gather_rows(embedding, sample_ids.to(weight.device), num_images)

    def _collect(self, engine: Engine) -> None:
        self._collected.append(engine.state.output)  # type: ignore[arg-type]
        self._beat()
        if self._is_stopped():
            engine.terminate()


class Evaluators:
    """An `Evaluator` for each benchmark to test on; the arguments are theirs."""

    def __init__(
        self, data: DataSets, model: ReIDModel, accelerator: Accelerator, cfg: CfgNode, **options: Callable[[], Any]
    ) -> None:
        self._evaluators = {
            benchmark.name: Evaluator(model, accelerator, build_test_data(cfg, benchmark), cfg, **options)
            for benchmark in data.test
        }

    def run(self) -> dict[str, RetrievalScores]:
        """Benchmark -> scores of the model as it is now, in the order of TEST.DATASETS; raises what theirs do."""
        return {name: evaluator.run() for name, evaluator in self._evaluators.items()}


def score_queries(
    q_embedding: Tensor, g_embedding: Tensor, query: Labels, gallery: Labels, distance: Distance
) -> QueryScores:
    """Scores of all queries, each computed on one rank; called by all ranks with the same arguments.

    Raises:
        FloatingPointError: an embedding is not finite.
    """
    device = q_embedding.device
    query, gallery = query.to(device), gallery.to(device)
    try:
        q_embedding, g_embedding = (prepare_embeddings(part, distance) for part in (q_embedding, g_embedding))
    except ValueError as error:
        raise shared(
            FloatingPointError(f"the model's {error}; its weights or BatchNorm statistics are broken")
        ) from error
    blocks = list(query_blocks(len(query.pids)))
    own_blocks = blocks[distributed.rank() :: distributed.num_ranks()]
    own = concatenate(
        [score_block(q_embedding, g_embedding, query, gallery, block, distance=distance) for block in own_blocks]
    )
    places = torch.cat(
        [torch.arange(block.start, block.stop) for block in own_blocks] or [torch.zeros(0, dtype=torch.int64)]
    )
    rows = torch.stack([own.average_precision, own.inverse_negative_penalty, own.first_match.double()], dim=1)
    rows = distributed.gather_rows(rows.to(device), places.to(device), len(query.pids)).cpu()
    return QueryScores(rows[:, 0], rows[:, 1], rows[:, 2].long())
