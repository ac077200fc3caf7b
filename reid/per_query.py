"""What stands behind the means: the scores of every query as rows, and of every camera's queries as a table; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from reid.metrics import Labels
from reid.process.files import printable
from reid.ranking import QueryScores


class QueryRow(NamedTuple):
    """One query; what it does not have, as it has no match, is None."""

    query: int  # number among the queries, from 0
    path: str  # of the image; empty where images are no files
    pid: int
    camid: int
    num_matches: int
    AP: float | None
    INP: float | None
    first_match: int | None  # rank of the first match in the whole gallery, from 1


def per_query_rows(scores: QueryScores, query: Labels, paths: Sequence[Path] = ()) -> list[QueryRow]:
    """One row for each of Q queries, in their order.

    Args:
        scores: of Q queries.
        query: of Q images.
        paths: Q files, or none.
    """
    rows = []
    columns = query.pids, query.camids, scores.num_matches, scores.average_precision, scores.inverse_negative_penalty
    values = zip(*(column.tolist() for column in (*columns, scores.first_match)), strict=True)
    for number, (pid, camid, num_matches, precision, penalty, first) in enumerate(values):
        # A name on disk may hold bytes that are no text.
        path = printable(paths[number]) if paths else ""
        of_match = (precision, penalty, first + 1) if num_matches else (None, None, None)
        rows.append(QueryRow(number, path, pid, camid, num_matches, *of_match))
    return rows


class CameraScores(NamedTuple):
    """The queries of one camera; means over those that are valid, as fractions, NaN where none is."""

    camid: int
    num_queries: int
    num_valid_queries: int
    mAP: float
    rank_1: float  # of the CMC curve that was asked for: of the whole gallery, or of a single shot


def scores_by_camera(scores: QueryScores, camids: Tensor) -> list[CameraScores]:
    """The cameras of Q queries, by number.

    Args:
        scores: of Q queries, on the CPU.
        camids: [Q].
    """
    camids = camids.to(scores.first_match.device)
    cameras = []
    for camid in camids.unique().tolist():  # type: ignore[no-untyped-call]
        own = camids == camid
        valid = own & scores.is_valid
        cameras.append(
            CameraScores(
                camid=camid,
                num_queries=int(own.sum()),
                num_valid_queries=int(valid.sum()),
                mAP=float(scores.average_precision[valid].mean()),
                rank_1=float((scores.cmc_positions[valid] == 0).double().mean()),
            )
        )
    return cameras


def camera_table(cameras: Sequence[CameraScores]) -> str:
    """A table of text, one line for each camera below a line of headings."""
    lines = [f"{'camid':<12}{'queries':>10}{'valid':>10}{'mAP':>10}{'rank-1':>10}"]
    for camera in cameras:
        percentages = [f"{100 * share:.1f} %" if not math.isnan(share) else "-" for share in camera[3:]]
        counts = f"{camera.camid:<12}{camera.num_queries:>10,}{camera.num_valid_queries:>10,}"
        lines.append(counts + "".join(f"{share:>10}" for share in percentages))
    return "\n".join(lines)
