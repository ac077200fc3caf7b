"""TPR at FPR: how many of the pairs of one person are accepted where hardly any pair of two persons is; exact, pure.

A pair is a query and a gallery image that its protocol keeps; it is positive where they are a match, else negative, and
accepted where it is closer than a threshold, one for all queries. Nothing is sorted or stored: the threshold is found
digit by digit, most significant first, from counts of pairs by the next 16 bits of their distances. Counts of parts of
the pairs may be added up, in any order, and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT_BITS = 16
_NUM_DIGITS = 1 << _DIGIT_BITS

# What `count_digits` gives for a level and prefixes, summed over all pairs.
Counter = Callable[[int, Sequence[int]], Tensor]


@dataclass
class _Search:
    """For the closest negative pair that may not be accepted."""

    left: int  # negative pairs to pass over among those whose keys begin with the prefix
    prefix: int = 0  # the digits that are known of its key
    accepted: int = 0  # positive pairs that are certainly closer


def tpr_at_fpr(count: Counter, fprs: Sequence[float], num_digits: int) -> dict[float, float]:
    """The share of positive pairs accepted at the largest threshold that accepts no larger share of the negative ones.

    That is the share that is closer than the closest negative pair which must not be accepted any more; what is just as
    far is not accepted. Without a negative pair all are accepted.

    Args:
        count: of all pairs; asked once for every digit.
        fprs: the largest shares of negative pairs, from 0 to less than 1.
        num_digits: of a key, see `num_digits`.

    Raises:
        ValueError: a rate is not one, or there is no positive pair.
    """
    if not all(0 <= fpr < 1 for fpr in fprs):
        raise ValueError(f"false positive rates must be from 0 to less than 1, got {list(fprs)}")
    counts = count(0, [0])
    num_negatives, num_positives = counts[0].sum(1).tolist()
    if num_positives == 0:
        raise ValueError("there must be a pair of a query and a match")
    if num_negatives == 0:
        return dict.fromkeys(fprs, 1.0)
    searches = [_Search(_most_accepted(fpr, num_negatives)) for fpr in fprs]
    for level in range(num_digits):
        prefixes = sorted({search.prefix for search in searches})
        if level > 0:
            counts = count(level, prefixes)
        for search in searches:
            negatives, positives = counts[prefixes.index(search.prefix)]
            digit = int((negatives.cumsum(0) <= search.left).sum())
            search.left -= int(negatives[:digit].sum())
            search.accepted += int(positives[:digit].sum())
            search.prefix = search.prefix * _NUM_DIGITS + digit - (_NUM_DIGITS // 2 if level == 0 else 0)
    return {fpr: search.accepted / num_positives for fpr, search in zip(fprs, searches, strict=True)}


def _most_accepted(fpr: float, num_negatives: int) -> int:
    """The largest number whose share of the negative pairs, as a float, is not above the rate."""
    number = int(fpr * num_negatives)  # rounding may have made it one too large or too small
    return max(n for n in (number - 1, number, number + 1) if n / num_negatives <= fpr)


def num_digits(dtype: torch.dtype) -> int:
    """The digits of the keys of distances of this type."""
    return 64 // _DIGIT_BITS if dtype == torch.float64 else 32 // _DIGIT_BITS


def ordered_keys(distances: Tensor) -> Tensor:
    """Integers in the order of the distances: int64 for float64, else int32. NaN has no place in it."""
    if distances.dtype != torch.float64:
        distances = distances.float()
    num_bits, dtype = (64, torch.int64) if distances.dtype == torch.float64 else (32, torch.int32)
    bits = (distances + 0.0).view(dtype)  # 0.0, as -0.0 is equal to it but has other bits
    return bits ^ ((bits >> (num_bits - 1)) & torch.iinfo(dtype).max)


def count_digits(keys: Tensor, same_pid: Tensor, is_match: Tensor, level: int, prefixes: Sequence[int]) -> Tensor:
    """How many pairs have which digit of their key at this level, among those whose digits before it are the prefix.

    Args:
        keys: [b, G], see `ordered_keys`; the first digit is signed.
        same_pid: bool [b, G]; those that are no matches are left out.
        is_match: bool [b, G], the positive pairs.
        level: the number of digits in the prefixes.
        prefixes: all of them different; at level 0 there is one, and it means nothing.

    Returns:
        int64 [len(prefixes), 2, 2**16]: negative pairs, then positive ones.
    """
    shift = torch.iinfo(keys.dtype).bits - _DIGIT_BITS * (level + 1)
    digits = keys >> shift
    if level == 0:
        digits = digits + _NUM_DIGITS // 2
        # Few are of one identity, so that it is cheaper to take their digits away again than to select the others.
        negatives = _count(digits) - _count(digits[same_pid])
        return torch.stack([negatives, _count(digits[is_match])])[None]
    stems = digits >> _DIGIT_BITS
    digits = digits & (_NUM_DIGITS - 1)
    counts = []
    for prefix in prefixes:
        inside = stems == prefix
        counts += [_count(digits[inside & ~same_pid]), _count(digits[inside & is_match])]
    return torch.stack(counts).view(len(prefixes), 2, _NUM_DIGITS)


def _count(digits: Tensor) -> Tensor:
    return torch.bincount(digits.flatten(), minlength=_NUM_DIGITS)


def no_counts(num_prefixes: int, device: torch.device) -> Tensor:
    """The counts of no pair at all."""
    return torch.zeros((num_prefixes, 2, _NUM_DIGITS), dtype=torch.int64, device=device)
