"""TPR at FPR: the share of accepted positive pairs where hardly any negative pair is accepted, exact.

A pair is a query and a gallery image that its protocol keeps. It is positive if they match, else negative. It is
accepted if it is closer than a threshold, one for all queries. The threshold results from histograms of the distances:
the first one counts all pairs by the upper 16 bits of their distances, and each further one divides the bin that holds
the threshold by the next 16 bits. Nothing is sorted or stored, and memory does not grow with the number of pairs.
Histograms of parts of the pairs may be added in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BIN_BITS = 16
NUM_BINS = 1 << _BIN_BITS


def tpr_at_fpr(count: Callable[[int, list[int]], Tensor], fprs: Sequence[float], num_levels: int) -> dict[float, float]:
    """Return the share of positive pairs accepted at the largest threshold that does not exceed each FPR.

    A positive pair is accepted if it is closer than the closest negative pair that must be rejected. All are accepted
    if there is no negative pair.

    Args:
        count: Sum of `count_pairs` over all pairs, as a function of level and prefixes; called once for every level.
        fprs: Largest shares of accepted negative pairs, from 0 to less than 1.
        num_levels: Number of histograms, see `num_levels`.

    Raises:
        ValueError: A rate is out of range, or there is no positive pair.
    """
    if not all(0 <= fpr < 1 for fpr in fprs):
        raise ValueError(f"false positive rates must be from 0 to less than 1, got {list(fprs)}")
    counts = count(0, [0]).cpu()
    num_negatives, num_positives = counts[0].sum(1).tolist()
    if num_positives == 0:
        raise ValueError("there must be a pair of a query and a match")
    if num_negatives == 0:
        return dict.fromkeys(fprs, 1.0)
    left = torch.tensor([_most_accepted(fpr, num_negatives) for fpr in fprs])  # [R] negatives closer than the threshold
    accepted, prefix = torch.zeros_like(left), torch.zeros_like(left)
    for level in range(num_levels):
        if level > 0:
            counts = count(level, prefix.tolist()).cpu()
        negatives, positives = counts.unbind(1)  # [R, NUM_BINS] each; one row for all rates at level 0
        digit = (negatives.cumsum(1) <= left[:, None]).sum(1)  # bin of the threshold
        is_closer = torch.arange(NUM_BINS) < digit[:, None]
        left -= (negatives * is_closer).sum(1)
        accepted += (positives * is_closer).sum(1)
        prefix = prefix * NUM_BINS + digit - (NUM_BINS // 2 if level == 0 else 0)
    return dict(zip(fprs, (accepted.double() / num_positives).tolist(), strict=True))


def _most_accepted(fpr: float, num_negatives: int) -> int:
    """Return the largest number of negative pairs whose share, as a float, does not exceed the rate."""
    number = int(fpr * num_negatives)  # off by at most one, by rounding
    return max(n for n in (number - 1, number, number + 1) if n / num_negatives <= fpr)


def num_levels(dtype: torch.dtype) -> int:
    """Return the number of histograms that separate all distances of this type."""
    return 64 // _BIN_BITS if dtype == torch.float64 else 32 // _BIN_BITS


def ordered_keys(distances: Tensor) -> Tensor:
    """Return integers in the order of the distances, which must not be NaN: int64 for float64, else int32."""
    if distances.dtype != torch.float64:
        distances = distances.float()
    num_bits, dtype = (64, torch.int64) if distances.dtype == torch.float64 else (32, torch.int32)
    bits = (distances + 0.0).view(dtype)  # adding 0.0 turns -0.0 into 0.0, which is equal but has other bits
    return bits ^ ((bits >> (num_bits - 1)) & torch.iinfo(dtype).max)


def count_pairs(keys: Tensor, same_pid: Tensor, is_match: Tensor, level: int, prefixes: Sequence[int]) -> Tensor:
    """Count pairs by 16 bits of their keys, among the pairs whose higher bits are a prefix.

    Args:
        keys: [b, G], see `ordered_keys`; the first 16 bits are signed.
        same_pid: bool [b, G]; pairs of the same pid that do not match are left out.
        is_match: bool [b, G], the positive pairs.
        level: Number of 16-bit groups in a prefix.
        prefixes: Higher bits of the keys, one for each histogram; ignored at level 0.

    Returns:
        int64 [len(prefixes), 2, NUM_BINS]: negative pairs, then positive ones.
    """
    digits = keys >> (torch.iinfo(keys.dtype).bits - _BIN_BITS * (level + 1))
    if level == 0:
        digits = digits + NUM_BINS // 2
        # Few pairs are of one identity: subtracting their counts is cheaper than selecting all others.
        negatives = _histogram(digits) - _histogram(digits[same_pid])
        return torch.stack([negatives, _histogram(digits[is_match])])[None]
    stems, digits = digits >> _BIN_BITS, digits & (NUM_BINS - 1)
    counts = []
    for prefix in prefixes:
        inside = stems == prefix
        counts += [_histogram(digits[inside & ~same_pid]), _histogram(digits[inside & is_match])]
    return torch.stack(counts).view(len(prefixes), 2, NUM_BINS)


def _histogram(digits: Tensor) -> Tensor:
    return torch.bincount(digits.flatten(), minlength=NUM_BINS)
