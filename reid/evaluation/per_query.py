"""Scores of every query as rows, and of the queries of each camera as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from reid.process.files import printable
from reid.process.text_tables import format_table
from reid.retrieval.metrics import Labels
from reid.retrieval.ranking import QueryScores


class QueryRow(NamedTuple):
    """Scores of one query; None where the query has no match."""

    query: int  # index among the queries, from 0
    path: str  # image file; empty if the images are not files
    pid: int
    camid: int
    num_matches: int
    AP: float | None
    INP: float | None
    first_match: int | None  # position of the first match in the complete gallery, from 1


def per_query_rows(scores: QueryScores, query: Labels, paths: Sequence[Path] = ()) -> list[QueryRow]:
    """Return one row for each of Q queries, in their order.

    Args:
        scores: Scores of Q queries.
        query: Labels of Q images.
        paths: Q image files, or none.
    """
    rows = []
    columns = query.pids, query.camids, scores.num_matches, scores.average_precision, scores.inverse_negative_penalty
    values = zip(*(column.tolist() for column in (*columns, scores.first_match)), strict=True)
    for number, (pid, camid, num_matches, precision, penalty, first) in enumerate(values):
        # A file name may hold bytes that are not valid text.
        path = printable(paths[number]) if paths else ""
        match_scores = (precision, penalty, first + 1) if num_matches else (None, None, None)
        rows.append(QueryRow(number, path, pid, camid, num_matches, *match_scores))
    return rows


class CameraScores(NamedTuple):
    """Means over the valid queries of one camera, as fractions; NaN if none is valid."""

    camid: int
    num_queries: int
    num_valid_queries: int
    mAP: float
    rank_1: float  # of the same CMC curve as RetrievalScores.cmc


def scores_by_camera(scores: QueryScores, camids: Tensor) -> list[CameraScores]:
    """Return the scores of the queries of each camera, by camera number.

    Args:
        scores: Scores of Q queries, on the CPU.
        camids: [Q] camera of each query.
    """
    camids = camids.to(scores.first_match.device)
    cameras = []
    for camid in camids.unique().tolist():  # type: ignore[no-untyped-call]
        is_camera = camids == camid
        valid = is_camera & scores.is_valid
        cameras.append(
            CameraScores(
                camid=camid,
                num_queries=int(is_camera.sum()),
                num_valid_queries=int(valid.sum()),
                mAP=float(scores.average_precision[valid].mean()),
                rank_1=float((scores.cmc_positions[valid] == 0).double().mean()),
            )
        )
    return cameras


def camera_table(cameras: Sequence[CameraScores]) -> str:
    """Return a table of text, one line for each camera below a heading."""
    rows = [["camid", "queries", "valid", "mAP", "rank-1"]]
    for camera in cameras:
        percentages = [f"{100 * share:.1f} %" if not math.isnan(share) else "-" for share in camera[3:]]
        rows.append([str(camera.camid), f"{camera.num_queries:,}", f"{camera.num_valid_queries:,}", *percentages])
    return format_table(rows, "<>>>>")
