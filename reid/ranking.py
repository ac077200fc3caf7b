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
    num_matches = _num_true(is_match)  # [b]
    matched = _matched_distances(distances, is_match, num_matches)  # [b, M]
    last = matched.gather(1, (num_matches - 1).clamp(min=0)[:, None]).masked_fill(num_matches[:, None] == 0, -torch.inf)
    counts = (distances <= last) & (same_pid == is_match)  # what is farther than the last match plays no part
    positions, has_ties = _positions(_sorted_rows(distances, counts), matched, num_matches)
    for row in has_ties.nonzero()[:, 0].tolist():
        own = slice(int(num_matches[row]))
        settled = _among_equals(distances[row], counts[row], is_match[row], matched[row, own], positions[row, own])
        positions[row, own] = settled
    return _scores_from_positions(positions, num_matches)


def _matched_distances(distances: Tensor, is_match: Tensor, num_matches: Tensor) -> Tensor:
    """The distances of each query's matches, ascending, filled up with infinity: [b, M]."""
    return _filled_up(distances[is_match], num_matches, distances).sort(dim=1).values


def _sorted_rows(distances: Tensor, counts: Tensor) -> Tensor:
    """The distances that count, row by row in ascending order, filled up with infinity: [b, at most G]."""
    lengths = _num_true(counts)
    if 4 * int(lengths.max() if len(lengths) else 0) > distances.shape[1]:
        # A quarter of the time of picking most of them out.
        rows = torch.where(counts, distances, torch.inf).contiguous()
    else:
        rows = _filled_up(distances[counts], lengths, distances)
    if rows.is_cuda:
        return rows.sort(dim=1).values
    rows.detach().numpy().sort(axis=1)  # in place; a tenth of the time of torch's sort, which keeps the order of equals
    return rows


def _num_true(values: Tensor) -> Tensor:
    """Of each row: int64 [b]; summed in int32, which is faster by far."""
    return values.sum(1, dtype=torch.int32).long()


def _filled_up(values: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """The values of all rows, one row behind the other, as rows of one length: [b, at least 1]."""
    width = max(int(lengths.max()), 1) if len(lengths) else 1
    rows = like.new_full((len(lengths), width), torch.inf)
    rows[torch.arange(width, device=rows.device) < lengths[:, None]] = values
    return rows


def _positions(ordered: Tensor, matched: Tensor, num_matches: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [b, M] of the matches, from 0; and the queries [b] where they are not settled, as other images tie.

    Args:
        ordered: [b, n] what counts, matches included, ascending.
        matched: [b, M] the matches, ascending.
        num_matches: [b].
    """
    number = torch.arange(matched.shape[1], device=matched.device)
    num_closer, first_equal = (torch.searchsorted(values, matched) for values in (ordered, matched))
    upto, upto_equal = (torch.searchsorted(values, matched, right=True) for values in (ordered, matched))
    upto_equal = torch.minimum(upto_equal, num_matches[:, None])  # not what fills up, which is infinite
    has_others = (upto - num_closer > upto_equal - first_equal) & (number < num_matches[:, None])
    return num_closer + number - first_equal, has_others.any(1)  # matches at equal distance follow each other


def _among_equals(distances: Tensor, counts: Tensor, is_match: Tensor, matched: Tensor, positions: Tensor) -> Tensor:
    """The positions [m] of a query's matches where the image that stands first comes first.

    Args:
        distances: [G].
        counts: bool [G].
        is_match: bool [G].
        matched: [m] the matches' distances, ascending.
        positions: [m]; right for the first of equal matches if no other image were as near.
    """
    nearest = torch.searchsorted(matched, distances.contiguous()).clamp(max=len(matched) - 1)  # the first match as near
    columns = ((matched[nearest] == distances) & counts).nonzero()[:, 0]
    columns = columns[nearest[columns].argsort(stable=True)]
    value = nearest[columns]
    before = torch.arange(len(value), device=value.device) - torch.searchsorted(value, value)  # of its equals
    return (positions[value] + before)[is_match[columns]]


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
