"""Batch samplers: the images of the global batch of (seed, epoch, step), and the part of each rank (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from reid.randomness import random_bits, uniform

Int64 = NDArray[np.int64]

_NUM_DRAWN_AT_ONCE = 2**14  # any value gives the same numbers

# One number per purpose, so that no two purposes share random numbers.
_IMAGE_ORDER, _REPEATS, _IDENTITIES, _SHUFFLE, _LENGTH = range(1, 6)


class PlannedBatch(NamedTuple):
    """Images of a global batch that this rank loads."""

    epoch: int
    sample_ids: Int64  # [B], positions in the data set
    positions: Int64  # [B], positions in the epoch's global plan, which seed the augmentation


class IdentityPlan:
    """P x K plan of reid-strong-baseline's identity sampler, with the same number of batches in every epoch.

    An epoch cuts the shuffled images of every identity into groups of K (an identity with fewer than K images gives one
    group, drawn with replacement). Each batch takes P distinct identities, uniformly among those with groups left, and
    one group of each. The original stops when fewer than P identities are left, after a number of batches that varies
    by about one between epochs. Here `num_batches` is the length of one such pass, drawn from the data alone. An epoch
    that would fall short of it (rarely, and only near its end) takes first the identities that would be left over.

    Args:
        pids: [N], identity of every training image.
        num_pids: Number P of distinct identities in a batch.
        num_instances: Number K of images of each.
        seed: Seed of the run.

    Raises:
        ValueError: There are fewer than P identities.
    """

    def __init__(self, pids: Int64, *, num_pids: int, num_instances: int, seed: int) -> None:
        self.num_pids, self.num_instances, self._seed = num_pids, num_instances, seed
        _, self._label, self._count = np.unique(pids, return_inverse=True, return_counts=True)
        if len(self._count) < num_pids:
            raise ValueError(f"a batch must have at most {len(self._count)} identities, got {num_pids} identities")
        self._first = np.cumsum(self._count) - self._count  # [C], first image of each once sorted by identity
        self._num_groups = np.maximum(self._count // num_instances, 1)  # [C]
        canonical = _uniforms_by_step((_LENGTH,), num_pids)
        self.num_batches = len(_draw_identities(self._num_groups, num_pids, canonical, None))

    def __call__(self, epoch: int) -> Int64:
        """Return the images of an epoch in global order: [num_batches, P * K]."""
        uniforms = _uniforms_by_step((self._seed, epoch, _IDENTITIES), self.num_pids)
        identities = _draw_identities(self._num_groups, self.num_pids, uniforms, self.num_batches)  # [T, P]
        return self._groups(epoch, identities.reshape(-1)).reshape(self.num_batches, -1)

    def _groups(self, epoch: int, identities: Int64) -> Int64:
        """Return the images [n, K] of the next group of each identity [n], in their order."""
        keys = random_bits(self._seed, epoch, _IMAGE_ORDER, np.arange(len(self._label)))
        by_identity = np.lexsort((keys, self._label))  # [N], images sorted by identity, shuffled within
        slots = np.arange(self.num_instances)
        offsets = _occurrence(identities)[:, None] * self.num_instances + slots  # [n, K], within the identity
        counts = self._count[identities][:, None]
        repeats = uniform(self._seed, epoch, _REPEATS, identities[:, None], slots)
        offsets = np.where(counts < self.num_instances, (repeats * counts).astype(np.int64), offsets)
        return by_identity[self._first[identities][:, None] + offsets]


class ShufflePlan:
    """Plan of all images in random order, without the last incomplete batch of an epoch.

    Args:
        num_images: Number N of images.
        batch_size: Number of images of the global batch.
        seed: Seed of the run.

    Raises:
        ValueError: There are fewer images than in a batch.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int) -> None:
        if num_images < batch_size:
            raise ValueError(f"a batch must have at most {num_images} images, got {batch_size} images")
        self._num_images, self._batch_size, self._seed = num_images, batch_size, seed
        self.num_batches = num_images // batch_size

    def __call__(self, epoch: int) -> Int64:
        """Return the images of an epoch in global order: [num_batches, batch_size]."""
        order = np.argsort(random_bits(self._seed, epoch, _SHUFFLE, np.arange(self._num_images)), kind="stable")
        return order[: self.num_batches * self._batch_size].reshape(self.num_batches, self._batch_size)


def _occurrence(values: Int64) -> Int64:
    """Return for every element the number of equal ones before it: [n]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    run_lengths = np.diff(np.r_[starts, len(values)])
    occurrence = np.empty_like(values)
    occurrence[order] = np.arange(len(values)) - np.repeat(starts, run_lengths)
    return occurrence


def _uniforms_by_step(key: tuple[int, ...], width: int) -> Iterator[list[float]]:
    """Yield the uniform numbers [width] of step after step, without end."""
    num_steps = max(1, _NUM_DRAWN_AT_ONCE // width)
    for step in count(0, num_steps):
        yield from uniform(*key, np.arange(step, step + num_steps)[:, None], np.arange(width)).tolist()


def _draw_identities(
    num_groups: Int64, num_pids: int, uniforms: Iterator[list[float]], num_batches: int | None
) -> Int64:
    """Draw P distinct identities for every batch: [T, P].

    If `num_batches` is None, stop when fewer than P identities have groups left (the original's rule). Otherwise draw
    exactly that many batches, which must be possible: sum(min(num_groups, num_batches)) >= P * num_batches.
    """
    left = num_groups.tolist()
    available = list(range(len(left)))
    reserve = None if num_batches is None else _Reserve(num_groups, num_pids, num_batches)
    batches: list[list[int]] = []
    while len(available) >= num_pids if num_batches is None else len(batches) < num_batches:
        for slot, u in enumerate(next(uniforms)):  # a partial Fisher-Yates shuffle
            other = slot + int(u * (len(available) - slot))
            available[slot], available[other] = available[other], available[slot]
        if reserve is not None:
            reserve.enforce(available, left)
        batches.append(available[:num_pids])
        for slot in range(num_pids - 1, -1, -1):
            left[available[slot]] -= 1
            if left[available[slot]] == 0:
                available[slot] = available[-1]
                available.pop()
    return np.array(batches, dtype=np.int64).reshape(-1, num_pids)


class _Reserve:
    """Keeps an epoch from running out of identities before its fixed number of batches.

    With R batches to go and c_i groups left, the rest is possible exactly while surplus = sum(min(c_i, R)) - P * R >=
    0. A batch lowers the surplus by the number of identities with c_i >= R ("tight") that it leaves out. So it may
    leave out `surplus` of them at most. A tight identity stays tight to the end.
    """

    def __init__(self, num_groups: Int64, num_pids: int, num_batches: int) -> None:
        self._num_pids, self._batches_left = num_pids, num_batches
        self._surplus = int(np.minimum(num_groups, num_batches).sum()) - num_pids * num_batches
        self._by_size = np.argsort(-num_groups, kind="stable").tolist()
        self._sizes = num_groups.tolist()
        self._num_candidates = 0  # first ones of _by_size, which started with enough groups to be tight by now
        self._tight: dict[int, None] = {}  # ordered set

    def enforce(self, available: list[int], left: list[int]) -> None:
        """Swap the tight identities that must not be left out into the first P positions of `available`."""
        self._update_tight(left)
        self._batches_left -= 1
        if not self._tight:
            return
        chosen = set(available[: self._num_pids])
        omitted = [identity for identity in self._tight if identity not in chosen]
        num_forced = max(len(omitted) - self._surplus, 0)
        slots = [slot for slot in range(self._num_pids) if available[slot] not in self._tight]
        for slot, identity in zip(slots, omitted[:num_forced], strict=False):
            other = available.index(identity)
            available[slot], available[other] = available[other], available[slot]
        self._surplus -= len(omitted) - num_forced

    def _update_tight(self, left: list[int]) -> None:
        while (
            self._num_candidates < len(self._by_size)
            and self._sizes[self._by_size[self._num_candidates]] >= self._batches_left
        ):
            self._num_candidates += 1
        for identity in self._by_size[: self._num_candidates]:
            if left[identity] >= self._batches_left:
                self._tight[identity] = None


def rank_part(batch_size: int, rank: int, num_ranks: int) -> slice:
    """Return a rank's positions in a global batch: consecutive ones, hence complete identities.

    Raises:
        ValueError: The number of ranks does not divide the batch.
    """
    if batch_size % num_ranks:
        raise ValueError(
            f"the number of ranks must divide the global batch, got {batch_size} images on {num_ranks} ranks"
        )
    share = batch_size // num_ranks
    return slice(rank * share, (rank + 1) * share)


class TrainBatches(Sampler[PlannedBatch]):
    """Sampler of this rank's part of every batch of an epoch, starting at a given step.

    Args:
        plan: Function of the epoch that returns its images: [num_batches, batch_size].
        rank: Rank of this process.
        num_ranks: Number of ranks that share the global batch.
    """

    def __init__(self, plan: IdentityPlan | ShufflePlan, *, rank: int, num_ranks: int) -> None:
        self._plan, self._rank, self._num_ranks = plan, rank, num_ranks
        self._epoch, self._step = 1, 0

    def set_position(self, epoch: int, step: int) -> None:
        """Start the next pass in `epoch` (from 1), after its first `step` batches."""
        self._epoch, self._step = epoch, step

    def first_global_batch(self) -> PlannedBatch:
        """Return the global batch of the first step of the first epoch."""
        sample_ids = self._plan(1)[0]
        return PlannedBatch(1, sample_ids, np.arange(len(sample_ids)))

    def __len__(self) -> int:
        return self._plan.num_batches

    def __iter__(self) -> Iterator[PlannedBatch]:
        plan = self._plan(self._epoch)
        part = rank_part(plan.shape[1], self._rank, self._num_ranks)
        positions = np.arange(plan.size).reshape(plan.shape)
        for step in range(self._step, len(plan)):
            yield PlannedBatch(self._epoch, plan[step, part], positions[step, part])


class EvaluationBatches(Sampler[PlannedBatch]):
    """Sampler of every image exactly once, in the data set's order; each rank takes consecutive batches.

    A batch holds the same images on any number of ranks, so that an image's embedding cannot depend on it.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int, num_ranks: int) -> None:
        num_batches = -(-num_images // batch_size)
        self._num_images, self._batch_size = num_images, batch_size
        self._batches = range(num_batches * rank // num_ranks, num_batches * (rank + 1) // num_ranks)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PlannedBatch]:
        for batch in self._batches:
            ids = np.arange(batch * self._batch_size, min((batch + 1) * self._batch_size, self._num_images))
            yield PlannedBatch(0, ids, ids)
