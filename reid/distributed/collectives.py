"""Collectives: objects, tensors and errors that ranks exchange."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reid.config.schema import SETTINGS
from reid.errors import ReidError, WorldError, shared

T = TypeVar("T")


def rank() -> int:
    return int(idist.get_rank())


def num_ranks() -> int:
    return int(idist.get_world_size())


def is_main() -> bool:
    return rank() == 0


@contextmanager
def errors_shared() -> Iterator[None]:
    """Run a block on every rank; if it raises a user error on some ranks, raise one on all, so that no rank waits.

    Example:
        >>> with errors_shared():
        ...     images = list_images(folder)

    Raises:
        ReidError: The error of the lowest failing rank, marked `is_shared`: rank 0 reports it for all.
    """
    local_error = None
    try:
        yield
    except ReidError as raised:
        if num_ranks() == 1:
            raise
        local_error = raised
    for failed_rank, error in enumerate(gather_objects(local_error)):
        if error is not None:
            message = str(error) if failed_rank == 0 else f"{error} (on rank {failed_rank})"
            raise shared(type(error)(message, key=error.key)) from local_error


def require_same_on_all_ranks(facts: Mapping[str, object], *, key: str | None = None) -> None:
    """Raise an error on every rank unless the facts are equal on all of them.

    Args:
        facts: Values by name.
        key: Key of the error if no setting differs.

    Raises:
        WorldError: A rank differs from rank 0. The error names the first such rank, its host, and the differences.
    """
    first, *others = gather_objects((platform.node(), dict(facts)))
    for other, (host, theirs) in enumerate(others, start=1):
        names = sorted(name for name in first[1].keys() | theirs.keys() if first[1].get(name) != theirs.get(name))
        if names:
            differences = "; ".join(f"{name} is {theirs.get(name)!r}, not {first[1].get(name)!r}" for name in names)
            error = WorldError(
                f"rank {other} on {host} does not agree with rank 0 on {first[0]}: {differences}. Fix: start all ranks "
                "with the same command, code, packages and data.",
                key=next((name for name in names if name in SETTINGS), key),
            )
            raise shared(error)


def once_per_node(work: Callable[[], object]) -> None:
    """Run the work on one rank of every node while the others wait; errors as in `errors_shared`."""
    with errors_shared():
        if idist.get_local_rank() == 0:
            work()


def from_rank_zero(work: Callable[[], T]) -> T:
    """Run the work on rank 0 and return its result on every rank; errors as in `errors_shared`."""
    with errors_shared():
        box = [work() if is_main() else None]
    if num_ranks() > 1:
        dist.broadcast_object_list(box, src=0)
    return cast("T", box[0])


def gather_objects(local: T) -> list[T]:
    """Return one object of every rank, in rank order."""
    if num_ranks() == 1:
        return [local]
    gathered: list[Any] = [None] * num_ranks()
    dist.all_gather_object(gathered, local)
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the element-wise sum of every rank's tensor."""
    return cast("Tensor", idist.all_reduce(values.clone()))


def on_any_rank(*, local: bool) -> bool:
    """Return whether the argument is true on at least one rank; all ranks call it."""
    return any(gather_objects(local))


class Consensus:
    """The largest number that any rank passed at the step before: the same on all ranks, without waiting.

    Every call starts a small all-reduce on the CPU and completes that of the call before, which ran during the step.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if num_ranks() > 1 else None
        self._pending: tuple[dist.Work | None, Tensor] = (None, torch.tensor(0))

    def exchange(self, local: int) -> int:
        """Return the largest number of the last step, 0 at the first; a single rank gets its number back.

        All ranks call it at every step.
        """
        if self._group is None:
            return local
        work, largest = self._pending
        if work is not None:
            work.wait()
        value = torch.tensor(local)
        self._pending = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True), value
        return int(largest)


class Noticeboard:
    """Short texts of all ranks, which can be posted and read while a collective hangs.

    Args:
        topic: Name of the use, which keeps its texts apart from others.
        patience: Seconds to wait for the process that keeps the texts.
    """

    def __init__(self, topic: str, patience: float) -> None:
        # torchrun may keep the store for the next group, and its count of groups differs between nodes.
        attempt = from_rank_zero(lambda: secrets.token_hex(4))
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=patience))  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"reid/{topic}/{attempt}", store)  # type: ignore[attr-defined]

    def post(self, text: str) -> None:
        self._store.set(str(rank()), text)

    def read(self) -> dict[int, str]:
        """Return the posted texts by rank."""
        present = [other for other in range(num_ranks()) if self._store.check([str(other)])]
        return {other: self._store.get(str(other)).decode() for other in present}


def is_lost_rank(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone or silent."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def global_batch(feat: Tensor, pids: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the features and identities of the global batch, in rank order, in one collective.

    Only the rows of this rank carry a gradient. A loss over *all* rows therefore has, with respect to them, the
    gradient of the single process. It must be multiplied by the number of ranks, over which gradients are averaged.

    Args:
        feat: [B_rank, D], as many rows on every rank.
        pids: [B_rank], below 2**24, so that float32 holds them exactly.

    Returns:
        Features [B, D] and identities [B].
    """
    if num_ranks() == 1:
        return feat, pids
    return cast("tuple[Tensor, Tensor]", _GlobalBatch.apply(feat, pids))


class _GlobalBatch(torch.autograd.Function):
    """Features and identities packed into one tensor, gathered, and unpacked as views."""

    @staticmethod
    def forward(ctx: Any, feat: Tensor, pids: Tensor) -> tuple[Tensor, Tensor]:
        gathered = all_gather(torch.cat([feat, pids[:, None].to(feat.dtype)], dim=1))  # [B, D + 1]
        all_pids = gathered[:, -1].to(pids.dtype)
        ctx.local_rows = slice(rank() * len(feat), (rank() + 1) * len(feat))
        ctx.mark_non_differentiable(all_pids)
        return gathered[:, :-1], all_pids

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.local_rows], None


def all_gather(local: Tensor) -> Tensor:
    """Concatenate the tensors [n, ...] of all ranks, of which there are several; without gradient."""
    gathered = local.new_empty((num_ranks() * len(local), *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


def gather_rows(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Gather the rows of all ranks in the order of their ids; ranks may have different numbers of rows, or none.

    Args:
        rows: [n_rank, ...].
        ids: [n_rank], every one of 0..num_rows-1 on exactly one rank.
        num_rows: Number of rows of all ranks.

    Returns:
        [num_rows, ...] on every rank, on the device of `rows`.

    Raises:
        WorldError: An id is missing or duplicate.
    """
    if num_ranks() > 1:
        counts = gather_objects(len(ids))
        longest = max(counts)
        rows, ids = (_gather_uneven(part, counts, longest) for part in (rows, ids))
    if not torch.equal(ids.sort().values.cpu(), torch.arange(num_rows)):
        raise shared(WorldError(f"each of {num_rows} rows must come from exactly one rank, got {len(ids)} rows"))
    ordered = torch.empty_like(rows)
    ordered[ids] = rows
    return ordered


def _gather_uneven(part: Tensor, counts: list[int], longest: int) -> Tensor:
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    gathered = all_gather(padded)
    return torch.cat([gathered[i * longest : i * longest + n] for i, n in enumerate(counts)])


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to every rank: without SyncBN, BatchNorm statistics differ between ranks."""
    if num_ranks() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
