"""Tests that rows of queries and the table of cameras agree with the means."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rankings import without_ties

from reid.evaluation.per_query import CameraScores, camera_table, per_query_rows, scores_by_camera
from reid.retrieval.metrics import Labels, scores_from_distmat

# Query 0 on camera 0 ranks wrong, right, wrong, right; query 1 has no match; query 2 finds two images of itself first.
DISTMAT = [[0.2, 0.1, 0.4, 0.3, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.5, 0.2, 0.4, 0.3]]
QUERY = Labels.of([1, 5, 1], [0, 7, 2])
GALLERY = [1, 2, 1, 3, 4], [1, 1, 1, 1, 1]


def scored(**options):
    return scores_from_distmat(DISTMAT, QUERY.pids, QUERY.camids, *GALLERY, **options)


def test_rows_small_enough_to_read():
    rows = per_query_rows(scored().per_query, QUERY, [Path("a.jpg"), Path("b, c.jpg"), Path("d\udcff.jpg")])
    assert rows == [
        (0, "a.jpg", 1, 0, 2, pytest.approx((1 / 2 + 2 / 4) / 2), 2 / 4, 2),
        (1, "b, c.jpg", 5, 7, 0, None, None, None),
        (2, "d\\udcff.jpg", 1, 2, 2, 1.0, 1.0, 1),
    ]


def test_the_means_of_the_rows_are_those_reported():
    distmat, q_pids, q_camids, *gallery = without_ties()
    scores = scores_from_distmat(distmat, q_pids, q_camids, *gallery)
    rows = per_query_rows(scores.per_query, Labels.of(q_pids, q_camids))
    assert [row.path for row in rows] == [""] * 40
    for name, mean in (("AP", scores.mAP), ("INP", scores.mINP)):
        assert np.mean([getattr(row, name) for row in rows if row.num_matches]) == pytest.approx(mean, rel=1e-12)
    assert np.mean([row.first_match <= 5 for row in rows if row.num_matches]) == pytest.approx(float(scores.cmc[4]))


def test_cameras_small_enough_to_read():
    cameras = scores_by_camera(scored().per_query, QUERY.camids)
    assert cameras[0] == (0, 1, 1, 0.5, 0.0)
    assert cameras[1][:3] == (2, 1, 1)
    assert cameras[1][3:] == (1.0, 1.0)
    assert cameras[2][:3] == (7, 1, 0)
    assert all(math.isnan(share) for share in cameras[2][3:])


@pytest.mark.parametrize("single_gallery_shot", [False, True])
def test_the_cameras_together_are_all_queries(single_gallery_shot):
    distmat, q_pids, q_camids, *gallery = without_ties()
    q_pids = np.where(np.arange(40) % 3, q_pids, 99)  # queries without a match on every camera
    scores = scores_from_distmat(distmat, q_pids, q_camids, *gallery, single_gallery_shot=single_gallery_shot)
    cameras = scores_by_camera(scores.per_query, torch.from_numpy(q_camids))
    assert [camera.camid for camera in cameras] == [0, 1, 2]
    assert sum(camera.num_queries for camera in cameras) == 40
    assert sum(camera.num_valid_queries for camera in cameras) == scores.num_valid_queries < 40
    for name, mean in (("mAP", scores.mAP), ("rank_1", scores.cmc[0])):
        total = sum(getattr(camera, name) * camera.num_valid_queries for camera in cameras)
        assert total / scores.num_valid_queries == pytest.approx(float(mean), rel=1e-12)


def test_the_table_is_aligned():
    table = camera_table([CameraScores(0, 1234, 1200, 0.8512, 1.0), CameraScores(11, 3, 0, math.nan, math.nan)])
    assert table.splitlines() == [
        "camid  queries  valid     mAP   rank-1",
        "0        1,234  1,200  85.1 %  100.0 %",
        "11           3      0       -        -",
    ]
