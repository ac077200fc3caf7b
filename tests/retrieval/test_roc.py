"""Tests of TPR at FPR against trying every threshold, of sums over parts, and of the keys of distances."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rankings import TIED, retrievals, sides, without_ties

from reid.retrieval import metrics
from reid.retrieval.metrics import retrieval_scores, scores_from_distmat
from reid.retrieval.roc import num_levels, ordered_keys, tpr_at_fpr

RATES = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.99)


def assert_agrees(rates, case):
    assert rates == {fpr: reference.tpr_at_fpr(*case, fpr) for fpr in RATES}


@given(retrievals(TIED))
def test_rates_equal_every_threshold_with_ties_and_infinities(case):
    assert_agrees(scores_from_distmat(*case, fprs=RATES).tpr_at_fpr, case)


@given(retrievals(st.floats(-10, 10)))
def test_rates_agree_with_trying_every_threshold(case):
    assert_agrees(scores_from_distmat(*case, fprs=RATES).tpr_at_fpr, case)


@given(retrievals(st.floats(-10, 10, width=32)))
def test_rates_of_float32_distances_agree(case):
    distmat, *both = case
    assert_agrees(scores_from_distmat(distmat.astype(np.float32), *both, fprs=RATES).tpr_at_fpr, case)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rates_from_embeddings_equal_those_from_distances(golden, distance, dtype):
    """Queries of different lengths have equal rankings, but distances that differ between queries."""
    q, q_pids, q_camids, g, g_pids, g_camids = sides(golden)
    q = (q * np.random.default_rng(0).uniform(0.5, 2, (len(q), 1))).astype(dtype)
    given = q, q_pids, q_camids, g.astype(dtype), g_pids, g_camids
    if distance == "cosine":
        q, g = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (q, g))
    distmat = np.linalg.norm(q[:, None].astype(np.float64) - g[None], axis=2)
    rates = scores_from_distmat(distmat, q_pids, q_camids, g_pids, g_camids, fprs=RATES[1:]).tpr_at_fpr
    assert 0 < rates[0.01] < rates[0.5] < 1
    tolerance = 0 if dtype == np.float64 else 2e-3  # of about 1,000 positive pairs two may change sides by rounding
    assert retrieval_scores(*given, distance=distance, fprs=RATES[1:]).tpr_at_fpr == pytest.approx(rates, abs=tolerance)


def test_rates_equal_dense_sort_over_several_query_blocks():
    rng = np.random.default_rng(0)
    distmat = rng.random((2 * metrics.QUERY_BLOCK + 3, 400), dtype=np.float32)
    (q_pids, q_camids), (g_pids, g_camids) = ((rng.integers(0, 30, n), rng.integers(0, 4, n)) for n in distmat.shape)
    same = q_pids[:, None] == g_pids
    positives, negatives = distmat[same & (q_camids[:, None] != g_camids)], np.sort(distmat[~same])
    rates = scores_from_distmat(distmat, q_pids, q_camids, g_pids, g_camids, fprs=RATES).tpr_at_fpr
    for fpr in RATES:
        limit = negatives[math.floor(fpr * len(negatives))]
        assert rates[fpr] == (positives < limit).sum() / len(positives)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_size_of_the_blocks_of_queries_changes_nothing(monkeypatch, size):
    case = without_ties()
    complete = scores_from_distmat(*case, fprs=RATES).tpr_at_fpr
    monkeypatch.setattr(metrics, "QUERY_BLOCK", size)
    assert scores_from_distmat(*case, fprs=RATES).tpr_at_fpr == complete


def test_distances_are_compared_in_float64():
    distmat = np.array([[1 + 2e-15, 1 + 4e-15, 1 + 3e-15, 1]])
    scores = scores_from_distmat(distmat, [1], [0], [1, 1, 2, 3], [1, 1, 1, 1], fprs=[0.0, 0.5])
    assert scores.tpr_at_fpr == {0.0: 0, 0.5: 0.5}


def test_a_query_without_a_match_has_negative_pairs():
    """They alone keep the threshold below the match."""
    fprs = [0.0]
    alone = scores_from_distmat([[0.2, 0.3]], [1], [0], [1, 2], [1, 1], fprs=fprs)
    with_it = scores_from_distmat([[0.2, 0.3], [0.1, 0.4]], [1, 5], [0, 0], [1, 2], [1, 1], fprs=fprs)
    assert (alone.tpr_at_fpr, with_it.tpr_at_fpr) == ({0.0: 1}, {0.0: 0})


def test_images_of_the_querys_camera_are_no_pairs():
    scores = scores_from_distmat([[0.1, 0.5, 0.6]], [1], [0], [1, 1, 2], [0, 1, 1], fprs=[0.0])
    assert scores.tpr_at_fpr == {0.0: 1}


def test_without_a_negative_pair_all_are_accepted():
    assert scores_from_distmat([[0.1, 0.5]], [1], [0], [1, 1], [1, 2], fprs=[0.1]).tpr_at_fpr == {0.1: 1}


def test_a_share_that_is_exactly_the_rate_is_accepted():
    """0.29 * 100 is 28.999999999999996, but 29 / 100 is 0.29."""
    distmat = np.arange(101.0)[None] * 2
    distmat[0, 100] = 57
    scores = scores_from_distmat(distmat, [1], [0], [2] * 100 + [1], [1] * 101, fprs=[0.28, 0.29])
    assert scores.tpr_at_fpr == {0.28: 0, 0.29: 1}


def test_the_summary_names_the_rates():
    scores = scores_from_distmat(*without_ties(), fprs=[1e-05, 0.001, 0.1])
    assert {key: value for key, value in scores.summary().items() if "TPR" in key} == {
        "TPR@FPR=1e-05": scores.tpr_at_fpr[1e-05],
        "TPR@FPR=0.001": scores.tpr_at_fpr[0.001],
        "TPR@FPR=0.1": scores.tpr_at_fpr[0.1],
    }


@pytest.mark.parametrize("fpr", [1.0, -0.1, math.nan])
def test_rates_that_are_none_are_rejected(fpr):
    with pytest.raises(ValueError, match="rates"):
        scores_from_distmat(*without_ties(), fprs=[0.1, fpr])


def test_counts_without_a_positive_pair_are_rejected():
    with pytest.raises(ValueError, match="pair"):
        tpr_at_fpr(lambda level, prefixes: torch.ones(1, 2, 4) * torch.tensor([[1], [0]]), [0.1], 2)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
@example(0.0, -0.0)
@example(-math.inf, -1.7e308)
def test_keys_are_in_the_order_of_the_distances(left, right):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        distances = torch.tensor([left, right], dtype=torch.float64).to(dtype)
        keys = ordered_keys(distances)
        assert (keys[0] < keys[1]) == (distances[0] < distances[1])
        assert (keys[0] == keys[1]) == (distances[0] == distances[1])
        assert torch.iinfo(keys.dtype).bits == 16 * num_levels(dtype)
