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


def random_bits(*keys: int | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """Return 64 random bits for every combination of keys.

    Args:
        keys: Non-negative integers or integer arrays, which broadcast against each other.

    Returns:
        uint64 array of the broadcast shape (at least one dimension).

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (chained SplitMix64 finalizers).
    """
    state: Any = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64 on purpose
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN_GAMMA)
    return state  # type: ignore[no-any-return]


def uniform(*keys: int | NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), one for every combination of keys (see `random_bits`)."""
    return (random_bits(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
