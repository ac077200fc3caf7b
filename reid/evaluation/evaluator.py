"""Embeddings of all ranks to retrieval scores; every rank ranks its own blocks of queries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from reid.data.datasets import DataSets
from reid.data.loaders import TestData, build_test_data
from reid.data.preprocessing import BatchPreprocessor
from reid.distributed import collectives
from reid.distributed.accelerator import unsharded
from reid.errors import DataError, NonFiniteError, shared
from reid.evaluation.embedder import EmbeddingBatch, build_embedder, distance_of
from reid.evaluation.per_query import camera_table, per_query_rows, scores_by_camera
from reid.models.reid_model import ReIDModel
from reid.process.signals import Preempted
from reid.retrieval.distances import Distance, Distances, embedding_distances, prepare_embeddings
from reid.retrieval.metrics import Labels, NoMatchError, Protocol, RetrievalScores, Share, query_blocks, score
from reid.retrieval.neighbours import row_blocks
from reid.retrieval.ranking import QueryScores
from reid.retrieval.reranking import KReciprocal
from reid.runs.directory import RunDirectory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

Scores = Mapping[str, RetrievalScores]  # by the name of the test set

logger = logging.getLogger(__name__)


class Evaluator:
    """Embeds query and gallery and scores the retrieval; called by all ranks, the same result on all.

    Args:
        model: not wrapped.
        accelerator: whose precision is used.
        data: query and gallery.
        cfg: the whole configuration; TEST, INPUT and SOLVER.PRECISION are read.
        beat: called after every batch, as a sign of life.
        is_stopped: asked after every batch whether there is no time left for this.
        on_scored: told what was compared, on all ranks, while the distances are at hand.
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
        on_scored: Callable[[TestData, Distances, RetrievalScores], None] = lambda *compared: None,
    ) -> None:
        self._model, self._data = model, data
        self._key_of_weights = "TEST.WEIGHT" if cfg.TEST.WEIGHT else "SOLVER.BASE_LR"  # for errors
        self._beat, self._is_stopped, self._on_scored = beat, is_stopped, on_scored
        self._distance: Distance = distance_of(cfg)
        self._num_features = model.num_features
        choice = cfg.TEST.SINGLE_GALLERY_SHOT
        is_single_shot = data.single_gallery_shot if choice == "auto" else choice == "yes"
        self._protocol = Protocol(fprs=cfg.TEST.FPR, single_gallery_shot=is_single_shot)
        test = cfg.TEST
        parameters = test.RE_RANKING_K1, test.RE_RANKING_K2, test.RE_RANKING_LAMBDA
        self._re_ranking: tuple[int, int, float] | None = parameters if test.RE_RANKING else None
        preprocessor = BatchPreprocessor(cfg, accelerator.device)
        self._embedder = build_embedder(model, accelerator, preprocessor, flip=cfg.TEST.FLIP)
        self._embedder.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        self._collected: list[EmbeddingBatch] = []

    def run(self) -> RetrievalScores:
        """Scores of the model as it is now.

        Raises:
            DataError: no query has a match.
            NonFiniteError: an embedding is not finite.
            Preempted: stopped on some rank, and hence on all.
        """
        collectives.broadcast_buffers(self._model)
        distances = self._distances(self._embed())
        scores = score_queries(distances, self._data.query, self._data.gallery, self._protocol)
        self._on_scored(self._data, distances, scores)
        return scores

    def _distances(self, embedding: Tensor) -> Distances:
        num_queries = len(self._data.query.pids)
        try:
            embedding = prepare_embeddings(embedding, self._distance)
        except ValueError as error:
            raise shared(
                NonFiniteError(
                    f"the model's {error}; its weights or BatchNorm statistics are broken", key=self._key_of_weights
                )
            ) from error
        queries, gallery = embedding[:num_queries], embedding[num_queries:]
        if self._re_ranking is None:
            return embedding_distances(queries, gallery, self._distance)
        return reranked_distances(queries, gallery, *self._re_ranking)

    def _embed(self) -> Tensor:
        """Embeddings of query and gallery in the data set's order, on every rank: [Q + G, D]."""
        self._collected = []
        was_training = self._model.training
        self._model.eval()
        with unsharded(self._model):
            if len(self._data.loader):
                self._embedder.run(self._data.loader)
        self._model.train(was_training)
        if collectives.on_any_rank(own=self._is_stopped()):
            raise shared(Preempted())
        weight = next(self._model.parameters())
        # A rank without a batch takes part with no rows.
        none = torch.zeros((0, self._num_features), dtype=weight.dtype, device=weight.device)
        embedding = torch.cat([none, *(part.embedding for part in self._collected)])
        sample_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.sample_ids for part in self._collected)])
        self._collected = []
        num_images = len(self._data.query.pids) + len(self._data.gallery.pids)
        return collectives.gather_rows(embedding, sample_ids.to(weight.device), num_images)

    def _collect(self, engine: Engine) -> None:
        self._collected.append(engine.state.output)  # type: ignore[arg-type]
        self._beat()
        if self._is_stopped():
            engine.terminate()


class EvaluatorGroup:
    """An `Evaluator` for each benchmark to test on; the arguments are theirs, but `on_scored` is told its name too."""

    def __init__(
        self,
        data: DataSets,
        model: ReIDModel,
        accelerator: Accelerator,
        cfg: CfgNode,
        *,
        on_scored: Callable[[str, TestData, Distances, RetrievalScores], None] = lambda *compared: None,
        **options: Callable[[], Any],
    ) -> None:
        self.data = {benchmark.name: build_test_data(cfg, benchmark) for benchmark in data.test}
        self._evaluators = {
            name: Evaluator(model, accelerator, of_one, cfg, on_scored=partial(on_scored, name), **options)
            for name, of_one in self.data.items()
        }

    def run(self) -> Scores:
        """Scores of the model as it is now, in the order of TEST.DATASETS; raises what theirs do."""
        return {name: evaluator.run() for name, evaluator in self._evaluators.items()}


def reranked_distances(q_embedding: Tensor, g_embedding: Tensor, k1: int, k2: int, lambda_value: float) -> Distances:
    """k-reciprocal distances (see `reranking`), each image's neighbours sought on one rank; called by all ranks.

    Args:
        q_embedding: [Q, D], the same on all ranks, as `prepare_embeddings` gives it.
        g_embedding: [G, D], likewise.
        k1: at least 1.
        k2: at least 1.
        lambda_value: 0 to 1.
    """
    own_blocks = row_blocks(len(q_embedding) + len(g_embedding))[collectives.rank() :: collectives.num_ranks()]
    reranked = KReciprocal(
        *(q_embedding, g_embedding, k1, k2, lambda_value), own_blocks=own_blocks, gather=collectives.gather_rows
    )
    return Distances(reranked.distances, q_embedding.new_zeros(len(q_embedding)))


def report_queries(folder: RunDirectory, data: Mapping[str, TestData], scores: Scores) -> None:
    """What each camera contributes, to the console, and each query, to per_query.csv (of several sets one each)."""
    for name, of_one in scores.items():
        test = data[name]
        file = "per_query.csv" if len(scores) == 1 else f"per_query_{name}.csv"
        folder.write_rows(file, per_query_rows(of_one.per_query, test.query, test.query_paths))
        heading = f"{name}, by camera of the query:\n" if len(scores) > 1 else ""
        logger.info("%s%s", heading, camera_table(scores_by_camera(of_one.per_query, test.query.camids)))


def score_queries(distances: Distances, query: Labels, gallery: Labels, protocol: Protocol) -> RetrievalScores:
    """Scores of all queries, each block computed on one rank; called by all ranks with the same arguments.

    Args:
        distances: from any of the functions that give them.
        query: of Q images.
        gallery: of G images.
        protocol: options of the scores.

    Raises:
        DataError: no query has a match.
    """
    device = distances.offset.device
    num_queries = len(query.pids)
    own_blocks = query_blocks(num_queries, len(gallery.pids))[collectives.rank() :: collectives.num_ranks()]
    gather = partial(_gather, own_blocks=own_blocks, num_queries=num_queries, device=device)
    share = Share(own_blocks, gather, collectives.sum_over_ranks)
    try:
        return score(distances, query.to(device), gallery.to(device), protocol, share)
    except NoMatchError as error:
        raise shared(
            DataError(f"{error}; check the camera and identity numbers in the file names", key="DATASETS.ROOT_DIR")
        ) from error


def _gather(own: QueryScores, own_blocks: Sequence[slice], num_queries: int, device: torch.device) -> QueryScores:
    """The scores of all queries, on the CPU of every rank."""
    places = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(b.start, b.stop) for b in own_blocks)])
    columns = [own.average_precision, own.inverse_negative_penalty, own.first_match.double(), own.num_matches.double()]
    rows = torch.cat([torch.stack(columns, dim=1), own.single_shot.double()], dim=1)
    rows = collectives.gather_rows(rows.to(device), places.to(device), num_queries).cpu()
    return QueryScores(rows[:, 0], rows[:, 1], rows[:, 2].long(), rows[:, 3].long(), rows[:, 4:].long())
