"""The positions of every query's matches in its ranking, by counting what is closer, without sorting; pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryScores:
    """What each of Q queries contributes; NaN and -1 where it is not valid, as it has no match."""

    average_precision: Tensor  # float64 [Q]
    inverse_negative_penalty: Tensor  # float64 [Q] matches / position of the last match
    first_match: Tensor  # int64 [Q] position of the first match, from 0
    num_matches: Tensor  # int64 [Q]
    single_shot: Tensor  # int64 [Q, R] position of the match among one image of each identity, R times; R may be 0

    @property
    def is_valid(self) -> Tensor:
        """Bool [Q]."""
        return self.first_match >= 0

    @property
    def cmc_positions(self) -> Tensor:
        """The positions that the CMC curve counts: int64 [Q, R], R >= 1."""
        return self.single_shot if self.single_shot.shape[1] else self.first_match[:, None]


def rank_matches(distances: Tensor, same_pid: Tensor, is_match: Tensor) -> QueryScores:
    """Finds the position of every match by counting what is closer.

    Args:
        distances: [b, G].
        same_pid: bool [b, G]; those that are no matches are left out.
        is_match: bool [b, G].
    """
    left_out = same_pid & ~is_match
    distances = distances.masked_fill(left_out, torch.inf)
    num_matches = is_match.sum(1)  # [b]
    matched = _matched_distances(distances, is_match, num_matches)  # [b, M]
    positions, has_ties = _positions(distances, matched, is_match)
    for row in has_ties.nonzero()[:, 0].tolist():
        kept = (~left_out[row]).nonzero()[:, 0]
        order = distances[row, kept].argsort(stable=True)
        positions[row, : int(num_matches[row])] = is_match[row, kept][order].nonzero()[:, 0]
    return _scores_from_positions(positions, num_matches)


def _matched_distances(distances: Tensor, is_match: Tensor, num_matches: Tensor) -> Tensor:
    """The distances of each query's matches, ascending, filled up with infinity: [b, M]."""
    rows, columns = is_match.nonzero(as_tuple=True)  # row by row
    starts = num_matches.cumsum(0) - num_matches
    places = torch.arange(len(rows), device=rows.device) - starts[rows]
    width = max(int(num_matches.max()), 1) if len(num_matches) else 1
    matched = distances.new_full((len(distances), width), torch.inf)
    matched[rows, places] = distances[rows, columns]
    return matched.sort(dim=1).values


def _positions(distances: Tensor, matched: Tensor, is_match: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [b, M] of the matches, from 0; and the queries [b] where they are not settled, as other images tie."""
    num_queries, width = matched.shape
    # An image is closer than the matches from number `closer_than` on.
    closer_than = torch.searchsorted(matched, distances, right=True)  # [b, G]
    equals_a_match = matched.gather(1, (closer_than - 1).clamp(min=0)) == distances
    at_infinity = distances == torch.inf  # what is left out, or an infinite distance given by the caller
    has_ties = ((equals_a_match & ~at_infinity & ~is_match) | (is_match & at_infinity)).any(1)
    offsets = torch.arange(num_queries, device=distances.device)[:, None] * (width + 1)
    counts = torch.bincount((closer_than + offsets).flatten(), minlength=num_queries * (width + 1))
    num_closer = counts.view(num_queries, width + 1).cumsum(1)[:, :width]
    # Matches at equal distance follow each other.
    first_equal = torch.searchsorted(matched, matched)
    return num_closer + torch.arange(width, device=matched.device) - first_equal, has_ties


def _scores_from_positions(positions: Tensor, num_matches: Tensor) -> QueryScores:
    number = torch.arange(1, positions.shape[1] + 1, device=positions.device)  # [M]
    is_real = number <= num_matches[:, None]
    precision = (number / (positions + 1).double()).masked_fill(~is_real, 0)
    is_valid = num_matches > 0
    last = positions.gather(1, (num_matches - 1).clamp(min=0)[:, None])[:, 0]
    return QueryScores(
        average_precision=(precision.sum(1) / num_matches).masked_fill(~is_valid, torch.nan),
        inverse_negative_penalty=(num_matches / (last + 1).double()).masked_fill(~is_valid, torch.nan),
        first_match=positions[:, 0].masked_fill(~is_valid, -1),
        num_matches=num_matches,
        single_shot=num_matches.new_zeros((len(num_matches), 0)),
    )


def concatenate(parts: list[QueryScores], num_repeats: int = 0) -> QueryScores:
    """The scores of consecutive blocks as one.

    Args:
        parts: of any number of blocks, also none.
        num_repeats: R of `QueryScores.single_shot`.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    if not parts:
        return QueryScores(nothing.double(), nothing.double(), nothing, nothing, nothing.view(0, num_repeats))
    return QueryScores(
        torch.cat([part.average_precision for part in parts]),
        torch.cat([part.inverse_negative_penalty for part in parts]),
        torch.cat([part.first_match for part in parts]),
        torch.cat([part.num_matches for part in parts]),
        torch.cat([part.single_shot for part in parts]),
    )
