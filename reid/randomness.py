"""Random numbers as a pure function of integers: the same on any rank, in any thread, after a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def random_bits(*words: int | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """64 random bits for every combination of the words.

    Args:
        words: non-negative integers or integer arrays; arrays broadcast against each other.

    Returns:
        uint64, of the broadcast shape (at least one dimension).

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (the SplitMix64 finaliser,
    chained).
    """
    state: Any = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        for word in words:
            state = _mix((state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN_GAMMA)
    return state  # type: ignore[no-any-return]


def uniform(*words: int | NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for every combination of the words (see `random_bits`)."""
    return (random_bits(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
