"""Batches of a rank: stores, samplers and loaders, built from settings and benchmarks."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reid.data import augment, store
from reid.data.benchmarks.splits import Benchmark, Split
from reid.data.datasets import DataSets, join_training
from reid.data.prefetch import prefetched
from reid.data.samplers import EvaluationBatches, IdentityPlan, PlannedBatch, ShufflePlan, TrainBatches
from reid.distributed import collectives
from reid.errors import DataError
from reid.process.files import copy_path, temporary_copy
from reid.retrieval.metrics import Labels

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_DEVICE_CACHE_SHARE = 0.2  # largest share of a GPU's memory that DATASETS.DEVICE_CACHE auto takes
_CHUNK = 1024  # images copied to the device at once


class Batch(NamedTuple):
    """Part of a global batch that this rank computes, in host memory."""

    images: Tensor  # uint8 [B, H, W, 3]; [0, H, W, 3] if all images are on the device already
    pids: Tensor  # int64 [B], in training 0..C-1
    sample_ids: Tensor  # int64 [B], positions in the data set
    drawn: Tensor  # int32 [B, 7], result of `augment.draw`; [B, 0] in evaluation


class StoredImages:
    """Images of memory-mapped stores, gathered one `PlannedBatch` at a time.

    Args:
        stores: [N_i, H, W, 3] each, uint8; the data set is their concatenation.
        pids: [N].
        recipe: Augmentation; None for evaluation.
        with_images: Whether a batch holds its images, or only their `sample_ids`.
    """

    def __init__(
        self,
        stores: Sequence[NDArray[np.uint8]],
        pids: NDArray[np.int64],
        recipe: augment.Recipe | None,
        *,
        with_images: bool = True,
    ) -> None:
        self._with_images = with_images
        # Plain arrays: indexing a memory map makes a new map object each time.
        self._stores, self._pids, self._recipe = [np.asarray(images) for images in stores], pids, recipe
        self._starts = np.cumsum([0] + [len(images) for images in stores])

    def __len__(self) -> int:
        return len(self._pids)

    def batch(self, planned: PlannedBatch, *, pin_memory: bool = False) -> Batch:
        """Return the planned batch, in page-locked memory if `pin_memory` is set."""
        if self._recipe is None:
            drawn = torch.zeros((len(planned.sample_ids), 0), dtype=torch.int32)
        else:
            drawn = augment.draw(self._recipe, planned.epoch, planned.positions)
        stored_ids = planned.sample_ids if self._with_images else planned.sample_ids[:0]
        images = self._gather(stored_ids, pin_memory=pin_memory)
        pids, sample_ids = torch.from_numpy(self._pids[planned.sample_ids]), torch.from_numpy(planned.sample_ids)
        batch = Batch(images, pids, sample_ids, drawn)
        return Batch(*(part.pin_memory() for part in batch)) if pin_memory else batch

    def images(self, sample_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the stored images: [B, H, W, 3]."""
        return self._gather(sample_ids, pin_memory=False).numpy()

    def _gather(self, sample_ids: NDArray[np.int64], *, pin_memory: bool) -> Tensor:
        images = torch.empty((len(sample_ids), *self._stores[0].shape[1:]), dtype=torch.uint8, pin_memory=pin_memory)
        out = images.numpy()
        parts = np.searchsorted(self._starts, sample_ids, side="right") - 1
        bounds = np.flatnonzero(np.diff(parts, prepend=-1, append=-1))
        for start, stop in pairwise(bounds.tolist()):  # consecutive images of one store
            rows = sample_ids[start:stop] - self._starts[parts[start]]
            # One call releases the interpreter lock once, page faults included. With a busy thread, 1,024 images took
            # 56 ms, and 117 ms when assigned image by image. With mode="raise", numpy would copy twice.
            np.take(self._stores[parts[start]], rows, axis=0, out=out[start:stop], mode="clip")
        return images


class BatchLoader:
    """Batches of a sampler, in its order, from its position at the time of `iter`.

    Args:
        dataset: Images of the batches.
        batches: Sampler of this rank.
        prefetch: Whether a thread loads the next batches while the trainer computes.
        pin_memory: Whether batches are in page-locked memory. No two batches share any: torch reuses it only after the
            copies to a device that read it.
    """

    def __init__(
        self, dataset: StoredImages, batches: TrainBatches | EvaluationBatches, *, prefetch: bool, pin_memory: bool
    ) -> None:
        self._batches, self._prefetch = batches, prefetch
        self._load = partial(dataset.batch, pin_memory=pin_memory)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        planned = list(self._batches)  # so the thread never asks the sampler, whose position the trainer sets
        return (prefetched if self._prefetch else map)(self._load, planned)


@dataclass(frozen=True)
class TrainData:
    """Training images, their sampler and their loader."""

    loader: BatchLoader
    batches: TrainBatches
    images: StoredImages
    num_pids: int  # C
    recipe: augment.Recipe
    on_device: Tensor | None  # uint8 [N, H, W, 3], all images, if DATASETS.DEVICE_CACHE keeps them there


@dataclass(frozen=True)
class TestData:
    """Test images of a benchmark: the queries, then the gallery."""

    loader: BatchLoader
    query: Labels
    gallery: Labels
    images: StoredImages
    query_paths: tuple[Path, ...] = ()  # one per query if the images are files
    single_gallery_shot: bool = False  # whether the benchmark's CMC curve takes one gallery image of each identity


def build_stores(cfg: CfgNode, data: DataSets) -> None:
    """Decode the images that are not in a store yet, once per node; all ranks call it.

    Raises:
        DataError: Images of any split cannot be read; all are in one message.
    """
    needed = [
        *((f"{b.name}-train", b.train, cfg.INPUT.SIZE_TRAIN) for b in data.train),
        *((f"{b.name}-{name}", split, cfg.INPUT.SIZE_TEST) for b in data.test for name, split in test_splits(b)),
    ]

    def build() -> None:
        faults: list[DataError] = []
        for name, split, size in needed:
            try:
                file = _store_file(cfg, name, split, tuple(size))
                store.build_store(file, split.paths, tuple(size), progress=collectives.is_main())
            except DataError as error:
                faults.append(error)
        if faults:
            raise DataError("; ".join(map(str, faults)), key=faults[0].key)

    collectives.once_per_node(build)


def test_splits(benchmark: Benchmark) -> tuple[tuple[str, Split], ...]:
    """Return the names and splits of the test images, in the order in which evaluation embeds them."""
    return ("query", benchmark.query), ("gallery", benchmark.gallery)


def build_train_data(cfg: CfgNode, benchmarks: Sequence[Benchmark], device: torch.device | None = None) -> TrainData:
    """Join the benchmarks' training images for a model on the device; all ranks call it.

    Raises:
        DataError: The benchmarks have fewer identities (or images) than a batch.
    """
    recipe = augment.Recipe(
        size=tuple(cfg.INPUT.SIZE_TRAIN),
        flip_probability=cfg.INPUT.PROB,
        padding=cfg.INPUT.PADDING,
        erasing_probability=cfg.INPUT.RE_PROB,
        seed=cfg.SEED,
    )
    joined = join_training(benchmarks)
    with collectives.errors_shared():
        plan = _build_plan(cfg, joined)
    batches = TrainBatches(plan, rank=collectives.rank(), num_ranks=collectives.num_ranks())
    stores = [_open_store(cfg, f"{b.name}-train", b.train, recipe.size) for b in benchmarks]
    device = device or torch.device("cpu")
    on_device = _on_device(stores, device) if _is_cached_on(device, stores, cfg.DATASETS.DEVICE_CACHE) else None
    dataset = StoredImages(stores, joined.pids, recipe, with_images=on_device is None)
    loader = _build_loader(cfg, dataset, batches)
    return TrainData(loader, batches, dataset, int(joined.pids.max()) + 1, recipe, on_device)


def _is_cached_on(device: torch.device, stores: Sequence[NDArray[np.uint8]], choice: str) -> bool:
    if choice != "auto" or device.type != "cuda":
        return choice == "on"
    num_bytes = sum(images.nbytes for images in stores)
    return num_bytes <= _DEVICE_CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory


def _on_device(stores: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    lengths = [len(stored) for stored in stores]
    images = torch.empty((sum(lengths), *stores[0].shape[1:]), dtype=torch.uint8, device=device)
    for stored, out in zip(stores, torch.split(images, lengths), strict=True):
        for start in range(0, len(stored), _CHUNK):
            out[start : start + _CHUNK] = torch.from_numpy(np.array(stored[start : start + _CHUNK]))
    logger.info("copied all %d training images (%.1f GB) to %s", len(images), images.nbytes / 1e9, device)
    return images


def build_test_data(cfg: CfgNode, benchmark: Benchmark) -> TestData:
    """Open the test images of the benchmark; all ranks call it."""
    size = tuple(cfg.INPUT.SIZE_TEST)
    splits = test_splits(benchmark)
    stores = [_open_store(cfg, f"{benchmark.name}-{name}", split, size) for name, split in splits]
    pids = np.concatenate([split.pids for _, split in splits])
    rank, num_ranks = collectives.rank(), collectives.num_ranks()
    batches = EvaluationBatches(len(pids), batch_size=cfg.TEST.IMS_PER_BATCH, rank=rank, num_ranks=num_ranks)
    images = StoredImages(stores, pids, None)
    loader = _build_loader(cfg, images, batches)
    query, gallery = (Labels.of(split.pids, split.camids) for _, split in splits)
    return TestData(loader, query, gallery, images, benchmark.query.paths, benchmark.single_gallery_shot)


def _build_plan(cfg: CfgNode, train: Split) -> IdentityPlan | ShufflePlan:
    batch_size, num_instances = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
    num_pids, is_shuffled = len(np.unique(train.pids)), cfg.DATALOADER.SAMPLER == "softmax"
    largest = len(train) if is_shuffled else num_pids * num_instances
    if batch_size > largest:
        limit = f"{num_pids} training identities with DATALOADER.NUM_INSTANCE={num_instances}"
        raise DataError(
            f"SOLVER.IMS_PER_BATCH must be at most {largest}, got {batch_size}: DATASETS.NAMES has "
            f"{f'{largest} training images' if is_shuffled else limit}. Fix: lower SOLVER.IMS_PER_BATCH to {largest}"
            f"{'' if is_shuffled else ' or raise DATALOADER.NUM_INSTANCE'}.",
            key="SOLVER.IMS_PER_BATCH",
        )
    if is_shuffled:
        return ShufflePlan(len(train), batch_size=batch_size, seed=cfg.SEED)
    return IdentityPlan(train.pids, num_pids=batch_size // num_instances, num_instances=num_instances, seed=cfg.SEED)


def _store_file(cfg: CfgNode, name: str, split: Split, size: tuple[int, int]) -> Path:
    return store.store_file(Path(cfg.DATASETS.CACHE_DIR), name, split.paths, size)


def _open_store(cfg: CfgNode, name: str, split: Split, size: tuple[int, int]) -> NDArray[np.uint8]:
    file = _store_file(cfg, name, split, size)
    collectives.once_per_node(lambda: store.build_store(file, split.paths, size, progress=collectives.is_main()))
    with _local_copy(cfg, file) as nearest, collectives.errors_shared():
        return store.open_store(nearest, len(split), size)


@contextmanager
def _local_copy(cfg: CfgNode, file: Path) -> Iterator[Path]:
    """Yield the store's copy in this node's DATASETS.NODE_LOCAL_DIR, or the store itself if there is no copy.

    The copy is unlinked as soon as all ranks of the node have opened it, so that it vanishes with the last of them,
    however that one ends.
    """
    folder = os.path.expandvars(cfg.DATASETS.NODE_LOCAL_DIR)
    copy = copy_path(file, Path(folder), collectives.from_rank_zero(lambda: secrets.token_hex(8)))
    faults: list[str] = []
    with ExitStack() as copies:

        def make_copy() -> None:
            if not folder or "$" in folder:
                return
            try:
                start = time.monotonic()
                copies.enter_context(temporary_copy(file, copy))
                logger.info("%s: copied to %s in %.1f s", file, folder, time.monotonic() - start)
            except OSError as error:
                faults.append(f"{folder} on {platform.node()} has no room or cannot be written to: {error.strerror}")

        collectives.once_per_node(make_copy)
        for fault in dict.fromkeys(chain(*collectives.gather_objects(faults))):
            logger.warning("warning: DATASETS.NODE_LOCAL_DIR=%s; images are read from DATASETS.CACHE_DIR there", fault)
        yield copy if copy.exists() else file


def _build_loader(cfg: CfgNode, dataset: StoredImages, batches: TrainBatches | EvaluationBatches) -> BatchLoader:
    pin_memory = torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu"
    return BatchLoader(dataset, batches, prefetch=cfg.DATALOADER.NUM_WORKERS > 0, pin_memory=pin_memory)
