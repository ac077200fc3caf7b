"""Positions of the matches in the ranking of each query, by counting closer images."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryScores:
    """Scores of each of Q queries; NaN and -1 for a query without a match, which is not valid."""

    average_precision: Tensor  # float64 [Q]
    inverse_negative_penalty: Tensor  # float64 [Q] matches / position of the last match
    first_match: Tensor  # int64 [Q] position of the first match, from 0
    num_matches: Tensor  # int64 [Q]
    single_shot: Tensor  # int64 [Q, R] position of the match among one image of each identity, R times; R may be 0

    @property
    def is_valid(self) -> Tensor:
        """Return which queries have a match: bool [Q]."""
        return self.first_match >= 0

    @property
    def cmc_positions(self) -> Tensor:
        """Return the positions that the CMC curve counts: int64 [Q, R], R >= 1."""
        return self.single_shot if self.single_shot.shape[1] else self.first_match[:, None]


def rank_matches(distances: Tensor, same_pid: Tensor, is_match: Tensor) -> QueryScores:
    """Return the scores of a block of queries, from the position of every match.

    Args:
        distances: [b, G] distances; gallery order decides between equal ones.
        same_pid: bool [b, G]; images of the query's pid that do not match are left out.
        is_match: bool [b, G], matches.
    """
    num_matches = _num_true(is_match)  # [b]
    matched = _matched_distances(distances, is_match, num_matches)  # [b, M]
    last = matched.gather(1, (num_matches - 1).clamp(min=0)[:, None]).masked_fill(num_matches[:, None] == 0, -torch.inf)
    counts = (distances <= last) & (same_pid == is_match)  # farther images change no position
    positions, has_ties = _positions(_sorted_rows(distances, counts), matched, num_matches)
    for row in has_ties.nonzero()[:, 0].tolist():
        part = slice(int(num_matches[row]))
        resolved = _among_equals(distances[row], counts[row], is_match[row], matched[row, part], positions[row, part])
        positions[row, part] = resolved
    return _scores_from_positions(positions, num_matches)


def _matched_distances(distances: Tensor, is_match: Tensor, num_matches: Tensor) -> Tensor:
    """Return the distances of each query's matches in ascending order, padded with infinity: [b, M]."""
    return _padded(distances[is_match], num_matches, distances).sort(dim=1).values


def _sorted_rows(distances: Tensor, counts: Tensor) -> Tensor:
    """Return the distances that count, each row in ascending order, padded with infinity: [b, at most G]."""
    lengths = _num_true(counts)
    if 4 * int(lengths.max() if len(lengths) else 0) > distances.shape[1]:
        # Takes a quarter of the time of selecting most of them.
        rows = torch.where(counts, distances, torch.inf).contiguous()
    else:
        rows = _padded(distances[counts], lengths, distances)
    if rows.is_cuda:
        return rows.sort(dim=1).values
    rows.detach().numpy().sort(axis=1)  # takes a tenth of the time of torch's stable sort
    return rows


def _num_true(values: Tensor) -> Tensor:
    """Return the number of true values in each row: int64 [b]; summing in int32 is much faster."""
    return values.sum(1, dtype=torch.int32).long()


def _padded(values: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """Return the values of all rows, given one row after the other, as rows of one length: [b, at least 1]."""
    width = max(int(lengths.max()), 1) if len(lengths) else 1
    rows = like.new_full((len(lengths), width), torch.inf)
    rows[torch.arange(width, device=rows.device) < lengths[:, None]] = values
    return rows


def _positions(ordered: Tensor, matched: Tensor, num_matches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions [b, M] of the matches from 0, and the queries [b] where other images tie with a match.

    Args:
        ordered: [b, n] distances that count, matches included, ascending.
        matched: [b, M] distances of the matches, ascending.
        num_matches: [b] number of matches.
    """
    number = torch.arange(matched.shape[1], device=matched.device)
    num_closer, first_equal = (torch.searchsorted(values, matched) for values in (ordered, matched))
    upto, upto_equal = (torch.searchsorted(values, matched, right=True) for values in (ordered, matched))
    upto_equal = torch.minimum(upto_equal, num_matches[:, None])  # without the padding, which is infinite
    has_others = (upto - num_closer > upto_equal - first_equal) & (number < num_matches[:, None])
    return num_closer + number - first_equal, has_others.any(1)  # matches at equal distance follow each other


def _among_equals(distances: Tensor, counts: Tensor, is_match: Tensor, matched: Tensor, positions: Tensor) -> Tensor:
    """Return the positions [m] of the matches of a query where equal distances are ranked in gallery order.

    Args:
        distances: [G] distances of the query.
        counts: bool [G], images that count.
        is_match: bool [G], matches.
        matched: [m] distances of the matches, ascending.
        positions: [m] positions of the matches if no other image were as near.
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
    """Join the scores of consecutive blocks.

    Args:
        parts: Scores of any number of blocks, possibly none.
        num_repeats: Number R of columns of `QueryScores.single_shot`.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    if not parts:
        return QueryScores(nothing.double(), nothing.double(), nothing, nothing, nothing.view(0, num_repeats))
    names = [field.name for field in fields(QueryScores)]
    return QueryScores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
