"""Evaluation of a model: embeddings of all ranks to retrieval scores, each block of queries ranked on one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reid.data.datasets import DataSets
from reid.data.loaders import TestData, build_test_data
from reid.distributed import collectives
from reid.distributed.accelerator import unsharded
from reid.errors import DataError, shared
from reid.evaluation.embedder import BatchEmbedder, distance_of
from reid.evaluation.per_query import camera_table, per_query_rows, scores_by_camera
from reid.models.reid_model import ReIDModel
from reid.process.signals import Preempted
from reid.retrieval.distances import Distances, embedding_distances
from reid.retrieval.metrics import Labels, NoMatchError, Protocol, RetrievalScores, Share, query_blocks, score
from reid.retrieval.neighbours import row_blocks
from reid.retrieval.ranking import QueryScores
from reid.retrieval.reranking import KReciprocal
from reid.runs.directory import RunDirectory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

Scores = Mapping[str, RetrievalScores]  # by the name of the benchmark

logger = logging.getLogger(__name__)


class Evaluator(BatchEmbedder):
    """An evaluation on one benchmark; called by all ranks, with the same result on all.

    Args:
        model: Unwrapped model.
        accelerator: Accelerator used for autocast.
        data: Query and gallery.
        cfg: Complete configuration; TEST, INPUT and SOLVER.PRECISION are read.
        beat: Function called after every batch as a sign of life.
        is_stopped: Function called after every batch that returns whether no time is left for the evaluation.
        on_scored: Function called on all ranks with data, distances and scores.
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
        key = "TEST.WEIGHT" if cfg.TEST.WEIGHT else "SOLVER.BASE_LR"
        super().__init__(model, accelerator, cfg, beat=beat, is_stopped=is_stopped, key=key)
        self._data, self._on_scored = data, on_scored
        choice = cfg.TEST.SINGLE_GALLERY_SHOT
        is_single_shot = data.single_gallery_shot if choice == "auto" else choice == "yes"
        self._protocol = Protocol(fprs=cfg.TEST.FPR, single_gallery_shot=is_single_shot)

    def run(self) -> RetrievalScores:
        """Return the scores of the model with its current weights.

        Raises:
            DataError: No query has a match.
            NonFiniteError: An embedding is not finite.
            Preempted: The evaluation was stopped on some rank, and therefore on all.
        """
        collectives.broadcast_buffers(self._model)
        distances = self._distances(self._embed())
        scores = score_queries(distances, self._data.query, self._data.gallery, self._protocol)
        self._on_scored(self._data, distances, scores)
        return scores

    def _distances(self, embedding: Tensor) -> Distances:
        num_queries, test = len(self._data.query.pids), self._cfg.TEST
        queries, gallery = embedding[:num_queries], embedding[num_queries:]
        if test.RE_RANKING:
            parameters = test.RE_RANKING_K1, test.RE_RANKING_K2, test.RE_RANKING_LAMBDA
            return reranked_distances(queries, gallery, *parameters)
        return embedding_distances(queries, gallery, distance_of(self._cfg))

    def _embed(self) -> Tensor:
        """Return the embeddings of queries, then gallery images, on every rank: [Q + G, D]."""
        was_training = self._model.training
        self._model.eval()
        with unsharded(self._model):
            self._embed_batches(self._data.loader, len(self._data.loader))
        self._model.train(was_training)
        if collectives.on_any_rank(local=self._is_stopped()):
            raise shared(Preempted())
        return self._gathered(len(self._data.query.pids) + len(self._data.gallery.pids))


class EvaluatorGroup:
    """An `Evaluator` for each test benchmark, with the same arguments; `on_scored` also gets the benchmark's name."""

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
            name: Evaluator(model, accelerator, test_data, cfg, on_scored=partial(on_scored, name), **options)
            for name, test_data in self.data.items()
        }

    def run(self) -> Scores:
        """Return the scores of the model with its current weights, in the order of TEST.DATASETS.

        Raises:
            ReidError: See `Evaluator.run`.
        """
        return {name: evaluator.run() for name, evaluator in self._evaluators.items()}


def reranked_distances(q_embedding: Tensor, g_embedding: Tensor, k1: int, k2: int, lambda_value: float) -> Distances:
    """Return k-reciprocal distances (see `reranking`); called by all ranks, which share the images.

    Args:
        q_embedding: [Q, D] output of `prepare_embeddings`, equal on all ranks.
        g_embedding: [G, D] output of `prepare_embeddings`, equal on all ranks.
        k1: See `k_reciprocal`.
        k2: See `k_reciprocal`.
        lambda_value: See `k_reciprocal`.
    """
    blocks = row_blocks(len(q_embedding) + len(g_embedding))[collectives.rank() :: collectives.num_ranks()]
    reranked = KReciprocal(
        *(q_embedding, g_embedding, k1, k2, lambda_value), blocks=blocks, gather=collectives.gather_rows
    )
    return Distances(reranked.distances, q_embedding.new_zeros(len(q_embedding)))


def report_queries(folder: RunDirectory, data: Mapping[str, TestData], scores: Scores) -> None:
    """Log the scores of each camera, and write those of each query to per_query.csv, one file for each benchmark."""
    for name, benchmark_scores in scores.items():
        test, per_query = data[name], benchmark_scores.per_query
        file = "per_query.csv" if len(scores) == 1 else f"per_query_{name}.csv"
        folder.write_rows(file, per_query_rows(per_query, test.query, test.query_paths))
        heading = f"{name}, by camera of the query:\n" if len(scores) > 1 else ""
        logger.info("%s%s", heading, camera_table(scores_by_camera(per_query, test.query.camids)))


def score_queries(distances: Distances, query: Labels, gallery: Labels, protocol: Protocol) -> RetrievalScores:
    """Return the scores of all queries; called by all ranks, each of which computes its blocks.

    Args:
        distances: Distances of all queries, equal on all ranks.
        query: Labels of Q images.
        gallery: Labels of G images.
        protocol: Options of the scores.

    Raises:
        DataError: No query has a match.
    """
    device, num_queries = distances.offset.device, len(query.pids)
    blocks = query_blocks(num_queries, len(gallery.pids))[collectives.rank() :: collectives.num_ranks()]
    positions = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(b.start, b.stop) for b in blocks)])

    def gather(local: QueryScores) -> QueryScores:
        columns = local.average_precision, local.inverse_negative_penalty, local.first_match, local.num_matches
        rows = torch.cat([torch.stack([column.double() for column in columns], 1), local.single_shot.double()], dim=1)
        rows = collectives.gather_rows(rows.to(device), positions.to(device), num_queries).cpu()
        return QueryScores(rows[:, 0], rows[:, 1], rows[:, 2].long(), rows[:, 3].long(), rows[:, 4:].long())

    share = Share(blocks, gather, collectives.sum_over_ranks)
    try:
        return score(distances, query.to(device), gallery.to(device), protocol, share)
    except NoMatchError as error:
        raise shared(
            DataError(f"{error}; check the camera and identity numbers in the file names", key="DATASETS.ROOT_DIR")
        ) from error
