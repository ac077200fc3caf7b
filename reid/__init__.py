"""Person re-identification: the same result on any number of ranks, resumed after any interruption.

Packages, from top to bottom; each imports only packages below it (import-linter contracts in pyproject.toml):

    commands/      arguments -> settings -> ranks -> work; one module per command
    training/      the one assembly of a training, its step, schedule and checkpoints
    tracking/      Weights & Biases, TensorBoard; rank 0 only
    checkpoints/   files of weights and of training states
    evaluation/    embeddings of all ranks -> scores, rows per query, pictures
    runs/          the run directory, its owner, its progress
    data/          benchmarks, the store of decoded images, samplers, augmentation, batches
    models/        backbones and the re-identification model
    distributed/   ranks, collectives, SyncBN, precision and wrapping
    retrieval/     distances, scores, neighbors, re-ranking (pure)
    losses/        identity, triplet, center (pure)
    config/        settings: schema, parsing, rules
    process/       signals, log lines, files; before torch

Letters in shape comments: B batch, C training identities (or channels), D feature, G gallery, H height, K images per
identity, N data set, P identities in a batch, Q queries, T batches in an epoch, W width (or the number of ranks).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reid.checkpoints.load_model import load_model
    from reid.commands.api import evaluate, train
    from reid.config.load import load_config
    from reid.errors import ReidError
    from reid.evaluation.embedder import Embedder
    from reid.losses.center import center_loss
    from reid.losses.identity import label_smoothed_cross_entropy
    from reid.losses.triplet import batch_hard_triplet
    from reid.models.reid_model import build_model
    from reid.process.signals import Preempted
    from reid.retrieval.metrics import retrieval_scores, scores_from_distmat
    from reid.retrieval.reranking import k_reciprocal
    from reid.training.optim import learning_rate

# Imported when first used, as torch takes seconds.
_MODULES = {
    "Embedder": "reid.evaluation.embedder",
    "Preempted": "reid.process.signals",
    "ReidError": "reid.errors",
    "batch_hard_triplet": "reid.losses.triplet",
    "build_model": "reid.models.reid_model",
    "center_loss": "reid.losses.center",
    "evaluate": "reid.commands.api",
    "k_reciprocal": "reid.retrieval.reranking",
    "label_smoothed_cross_entropy": "reid.losses.identity",
    "learning_rate": "reid.training.optim",
    "load_config": "reid.config.load",
    "load_model": "reid.checkpoints.load_model",
    "retrieval_scores": "reid.retrieval.metrics",
    "scores_from_distmat": "reid.retrieval.metrics",
    "train": "reid.commands.api",
}

__all__ = [
    "Embedder",
    "Preempted",
    "ReidError",
    "batch_hard_triplet",
    "build_model",
    "center_loss",
    "evaluate",
    "k_reciprocal",
    "label_smoothed_cross_entropy",
    "learning_rate",
    "load_config",
    "load_model",
    "retrieval_scores",
    "scores_from_distmat",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("reid-strong")
    if name not in _MODULES:
        raise AttributeError(f"module 'reid' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
