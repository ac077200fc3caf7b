"""CMC, mAP and mINP against recorded figures and a loop over the ranking; what changes nothing; what is refused.

Also covers reid.retrieval.ranking and reid.retrieval.distances.
"""

import doctest
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankings import TIED, retrievals, sides, without_ties

from reid.retrieval import metrics
from reid.retrieval.metrics import Labels, RetrievalScores, retrieval_scores, scores_from_distmat


def assert_agrees(scores: RetrievalScores, expected: reference.Retrieval):
    per_query = scores.per_query
    assert per_query.first_match.tolist() == expected.first_match
    np.testing.assert_allclose(per_query.average_precision, expected.average_precision, rtol=1e-12)
    np.testing.assert_allclose(per_query.inverse_negative_penalty, expected.inverse_negative_penalty, rtol=1e-12)
    np.testing.assert_allclose(scores.cmc, expected.cmc, rtol=1e-12)
    assert (scores.mAP, scores.mINP) == pytest.approx((expected.mAP, expected.mINP), rel=1e-12)
    assert (scores.num_valid_queries, scores.num_queries) == (expected.num_valid_queries, len(expected.first_match))


def assert_equal(one: RetrievalScores, other: RetrievalScores):
    """Assert the same ranking; sums of precisions may be rounded in another order."""
    assert torch.equal(one.per_query.first_match, other.per_query.first_match)
    for name in ("average_precision", "inverse_negative_penalty"):
        ours, theirs = getattr(one.per_query, name), getattr(other.per_query, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0, equal_nan=True)
    assert torch.equal(one.cmc, other.cmc)
    assert (one.mAP, one.mINP) == pytest.approx((other.mAP, other.mINP), rel=1e-14)
    assert (one.num_valid_queries, one.num_queries) == (other.num_valid_queries, other.num_queries)


# ---- what is computed ----


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_scores_agree_with_the_recorded_ones(golden, distance):
    scores = retrieval_scores(*sides(golden), distance=distance)
    assert scores.mAP == pytest.approx(golden[f"{distance}_map"].item(), rel=1e-9)
    np.testing.assert_allclose(scores.cmc, golden[f"{distance}_cmc"], atol=1e-6)
    assert scores.num_queries == 120
    assert 0 < scores.num_valid_queries < 120


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_embeddings_are_compared_by_their_distances(golden, distance):
    q, q_pids, q_camids, g, g_pids, g_camids = sides(golden)
    if distance == "cosine":
        q, g = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (q, g))
    distmat = np.linalg.norm(q[:, None] - g[None], axis=2)
    expected = reference.retrieval(distmat, q_pids, q_camids, g_pids, g_camids)
    assert_agrees(retrieval_scores(*sides(golden), distance=distance), expected)
    assert_agrees(scores_from_distmat(distmat, q_pids, q_camids, g_pids, g_camids), expected)


@given(retrievals(TIED), st.integers(1, 30))
def test_scores_agree_with_the_loop_whatever_ties_and_infinities(case, max_rank):
    assert_agrees(scores_from_distmat(*case, max_rank=max_rank), reference.retrieval(*case, max_rank=max_rank))


@given(retrievals(st.floats(-10, 10)))
def test_scores_agree_with_the_loop(case):
    assert_agrees(scores_from_distmat(*case), reference.retrieval(*case))


def test_scores_agree_with_the_loop_over_several_query_blocks():
    case = without_ties(num_queries=metrics.QUERY_BLOCK + 44, num_gallery=60)
    assert_agrees(scores_from_distmat(*case), reference.retrieval(*case))


def test_a_ranking_small_enough_to_read():
    """Query 1 on camera 0; the closest is left out, then wrong, right, wrong (a distractor), right."""
    scores = scores_from_distmat([[0.1, 0.5, 0.2, 0.4, 0.3]], [1], [0], [1, 1, 2, 0, 1], [0, 1, 0, 0, 2], max_rank=4)
    assert scores.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores.mINP == pytest.approx(2 / 4)
    assert scores.cmc.tolist() == [0, 1, 1, 1]


def test_tied_distances_keep_the_gallery_order():
    first = scores_from_distmat([[0.5, 0.5, 0.5]], [1], [0], [1, 2, 2], [1, 1, 1])
    last = scores_from_distmat([[0.5, 0.5, 0.5]], [1], [0], [2, 2, 1], [1, 1, 1])
    assert (first.mAP, last.mAP) == pytest.approx((1, 1 / 3))


def test_a_query_without_a_match_counts_nowhere():
    with_it = scores_from_distmat([[0.2, 0.1], [0.1, 0.2]], [1, 5], [0, 0], [1, 2], [1, 1])
    alone = scores_from_distmat([[0.2, 0.1]], [1], [0], [1, 2], [1, 1])
    assert (with_it.num_queries, with_it.num_valid_queries) == (2, 1)
    assert with_it.per_query.first_match.tolist() == [1, -1]
    assert with_it.per_query.average_precision.isnan().tolist() == [False, True]
    assert with_it.per_query.inverse_negative_penalty.isnan().tolist() == [False, True]
    assert (with_it.mAP, with_it.mINP) == (alone.mAP, alone.mINP)
    assert torch.equal(with_it.cmc, alone.cmc)


@pytest.mark.parametrize("max_rank", [1, 3, 5, 10, 50])
def test_cmc_stays_constant_beyond_a_small_gallery(max_rank):
    scores = scores_from_distmat([[0.1, 0.2, 0.3]], [1], [0], [2, 2, 1], [1, 1, 1], max_rank=max_rank)
    assert scores.cmc.tolist() == [float(k >= 3) for k in range(1, max_rank + 1)]


def test_the_summary_holds_the_keys_of_result_json():
    case = without_ties()
    scores = scores_from_distmat(*case)
    assert scores.summary() == {
        "mAP": scores.mAP,
        "mINP": scores.mINP,
        "rank-1": scores.cmc[0],
        "rank-5": scores.cmc[4],
        "rank-10": scores.cmc[9],
        "num_valid_queries": scores.num_valid_queries,
        "num_queries": 40,
    }
    assert [key for key in scores_from_distmat(*case, max_rank=9).summary() if "rank" in key] == ["rank-1", "rank-5"]


# ---- what must not change it ----


@given(retrievals(TIED))
def test_cmc_never_decreases_and_scores_are_fractions(case):
    scores = scores_from_distmat(*case)
    assert (scores.cmc.diff() >= 0).all()
    assert 0 <= scores.cmc[0] <= scores.cmc[-1] <= 1
    assert 0 < scores.mAP <= 1
    assert 0 < scores.mINP <= 1


@pytest.mark.parametrize(
    "increasing",
    [pytest.param(np.exp, id="exp"), pytest.param(lambda d: d**3 - 7, id="cube"), pytest.param(np.sqrt, id="sqrt")],
)
def test_increasing_maps_of_the_distance_change_nothing(increasing):
    distmat, *both = without_ties()
    assert_equal(scores_from_distmat(increasing(distmat), *both), scores_from_distmat(distmat, *both))


def test_the_gallerys_order_changes_nothing():
    distmat, q_pids, q_camids, g_pids, g_camids = without_ties()
    order = np.random.default_rng(1).permutation(len(g_pids))
    permuted = scores_from_distmat(distmat[:, order], q_pids, q_camids, g_pids[order], g_camids[order])
    assert_equal(permuted, scores_from_distmat(distmat, q_pids, q_camids, g_pids, g_camids))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [1, 7, 119, 120])
def test_the_size_of_the_blocks_of_queries_changes_nothing(golden, monkeypatch, distance, size):
    complete = retrieval_scores(*sides(golden), distance=distance)
    monkeypatch.setattr(metrics, "QUERY_BLOCK", size)
    assert_equal(retrieval_scores(*sides(golden), distance=distance), complete)


@given(retrievals(TIED), st.integers(1, 5))
def test_block_size_does_not_change_scores_with_ties(case, size):
    complete = scores_from_distmat(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "QUERY_BLOCK", size)
        assert_equal(scores_from_distmat(*case), complete)


def test_cosine_ignores_length_and_euclidean_does_not(golden):
    q, q_pids, q_camids, g, g_pids, g_camids = sides(golden)
    stretched = g * np.random.default_rng(0).uniform(0.1, 10, (len(g), 1))
    for distance, same in (("cosine", True), ("euclidean", False)):
        one, other = (
            retrieval_scores(q, q_pids, q_camids, side, g_pids, g_camids, distance=distance) for side in (g, stretched)
        )
        assert (abs(one.mAP - other.mAP) < 1e-12) == same


# ---- types of input ----


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(torch.from_numpy, id="torch"),
        pytest.param(lambda values: values.astype(np.int32) if values.ndim == 1 else values, id="int32 labels"),
        pytest.param(lambda values: values.astype(np.int16) if values.ndim == 1 else values, id="int16 labels"),
        pytest.param(lambda values: values.tolist() if values.ndim == 1 else values, id="lists of labels"),
        pytest.param(np.asfortranarray, id="column by column"),
    ],
)
def test_arrays_of_any_kind_give_the_same(golden, kind):
    assert_equal(retrieval_scores(*map(kind, sides(golden))), retrieval_scores(*sides(golden)))
    assert_equal(scores_from_distmat(*map(kind, without_ties())), scores_from_distmat(*without_ties()))


def test_integers_are_distances_too():
    distmat = [[3, 1, 2], [1, 2, 3]]
    both = [1, 2], [0, 0], [1, 2, 1], [1, 1, 2]
    assert_equal(scores_from_distmat(distmat, *both), scores_from_distmat(np.array(distmat) / 1.0, *both))


def test_a_transposed_matrix_is_ranked_without_complaint():
    distmat, *both = without_ties()
    transposed = torch.from_numpy(distmat.T.copy()).T
    assert not transposed.is_contiguous()
    assert_equal(scores_from_distmat(transposed, *both), scores_from_distmat(distmat, *both))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_half_precision_is_computed_in_float32(golden, distance):
    halves = [values.astype(np.float16) if values.dtype == np.float64 else values for values in sides(golden)]
    singles = [values.astype(np.float32) if values.dtype == np.float16 else values for values in halves]
    assert_equal(retrieval_scores(*halves, distance=distance), retrieval_scores(*singles, distance=distance))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_bfloat16_is_computed_in_float32(golden, distance):
    halves = [torch.from_numpy(values) for values in sides(golden)]
    halves = [values.bfloat16() if values.is_floating_point() else values for values in halves]
    singles = [values.float() if values.is_floating_point() else values for values in halves]
    options = {"distance": distance, "fprs": [0.01, 0.1]}
    one, other = (retrieval_scores(*given, **options) for given in (halves, singles))
    assert_equal(one, other)
    assert one.tpr_at_fpr == other.tpr_at_fpr


@pytest.mark.parametrize("pid", [0, 2**31, 2**62, 2**63 - 1, -(2**63)])
def test_any_integer_is_a_pid(pid):
    """The next integer, equal as a float, is another person."""
    neighbour = pid - 1 if pid > 0 else pid + 1
    scores = scores_from_distmat([[0.1, 0.2]], [pid], [0], [neighbour, pid], [1, 1])
    assert scores.per_query.first_match.tolist() == [1]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_one_query_and_one_gallery_image(distance):
    scores = retrieval_scores([[3.0]], [1], [0], [[2.0]], [1], [1], distance=distance, fprs=[0.1], max_rank=3)
    assert (scores.mAP, scores.mINP, scores.cmc.tolist(), scores.tpr_at_fpr) == (1, 1, [1, 1, 1], {0.1: 1})


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_copies_of_an_image_come_in_the_gallerys_order(distance):
    """Query and gallery hold one image 60 times, of length 8, so that nothing is rounded; one in the middle matches."""
    embedding = np.tile(np.random.default_rng(0).choice([-1.0, 1.0], 64), (60, 1))
    g_pids = np.where(np.arange(60) == 30, 1, 2)
    scores = retrieval_scores(
        embedding, np.ones(60), np.zeros(60), embedding, g_pids, np.ones(60), distance=distance, fprs=[0.0, 0.99]
    )
    assert scores.per_query.first_match.tolist() == [30] * 60
    assert scores.tpr_at_fpr == {0.0: 0, 0.99: 0}


def test_float64_embeddings_are_ranked_in_float64():
    g_embedding = np.array([[1 + 1e-12], [1.0]])
    scores = retrieval_scores(np.zeros((1, 1)), [1], [0], g_embedding, [2, 1], [1, 1], distance="euclidean")
    assert scores.mAP == 1


def test_the_two_sides_may_differ_in_precision(golden):
    q, q_pids, q_camids, g, g_pids, g_camids = sides(golden)
    q = q.astype(np.float32)
    mixed = retrieval_scores(q, q_pids, q_camids, g, g_pids, g_camids)
    assert_equal(mixed, retrieval_scores(q.astype(np.float64), q_pids, q_camids, g, g_pids, g_camids))


def test_examples_in_the_docstrings_are_right():
    assert doctest.testmod(metrics) == (0, 3)


# ---- what is refused ----


def inputs(**changes):
    given = {
        "q_embedding": np.eye(3)[:2],
        "q_pids": [1, 2],
        "q_camids": [0, 0],
        "g_embedding": np.eye(3),
        "g_pids": [1, 2, 3],
        "g_camids": [1, 1, 1],
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"q_embedding": np.eye(3)}, r"got \[3, 3\]", id="more queries than labels"),
        pytest.param({"q_embedding": np.eye(3)[:1]}, r"got \[1, 3\]", id="fewer queries than labels"),
        pytest.param({"g_embedding": np.eye(3)[:2]}, r"\[2, 3\] and \[2, 3\]", id="fewer gallery images than labels"),
        pytest.param({"g_embedding": np.eye(3)[:1]}, r"\[2, 3\] and \[1, 3\]", id="one gallery image, many labels"),
        pytest.param({"g_embedding": np.eye(4)[:3]}, r"\[2, 3\] and \[3, 4\]", id="features of another length"),
        pytest.param({"q_embedding": np.ones(2)}, r"\[2\]", id="a vector"),
        pytest.param({"g_embedding": np.ones((3, 3, 1))}, r"\[3, 3, 1\]", id="feature maps"),
        pytest.param({"q_pids": [1]}, "of one length", id="fewer pids than camids"),
        pytest.param({"g_camids": [[1, 1, 1]]}, "of one length", id="a matrix of camids"),
        pytest.param({"q_embedding": np.full((2, 3), np.nan)}, "finite", id="NaN"),
        pytest.param({"g_embedding": np.full((3, 3), -np.inf)}, "finite", id="infinity"),
        pytest.param({"g_embedding": np.full((3, 3), 1e200)}, "squared lengths", id="squares overflow"),
        pytest.param({"q_pids": [4, 5]}, "none of 2 queries", id="no identity in common"),
        pytest.param({"g_camids": [0, 0, 0]}, "none of 2 queries", id="no other camera"),
        pytest.param({"g_embedding": np.ones((0, 3)), "g_pids": [], "g_camids": []}, "none of 2", id="no gallery"),
        pytest.param({"q_embedding": np.ones((0, 3)), "q_pids": [], "q_camids": []}, "none of 0", id="no queries"),
    ],
)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_embeddings_that_cannot_be_ranked_are_rejected(changes, message, distance):
    retrieval_scores(**inputs(), distance=distance)
    with pytest.raises(ValueError, match=message):
        retrieval_scores(**inputs(**changes), distance=distance)


def test_an_unknown_distance_is_rejected():
    with pytest.raises(ValueError, match="'manhattan'"):
        retrieval_scores(**inputs(), distance="manhattan")


@pytest.mark.parametrize(
    ("distmat", "message"),
    [
        (np.ones((3, 2)), r"\[2, 3\], got \[3, 2\]"),
        (np.ones(3), r"\[2, 3\], got \[3\]"),
        (np.ones((2, 4)), r"\[2, 3\], got \[2, 4\]"),
        ([[0.1, math.nan, 0.2], [0.1, 0.2, 0.3]], "NaN"),
    ],
    ids=["transposed", "a row", "too wide", "NaN"],
)
def test_distances_that_cannot_be_ranked_are_rejected(distmat, message):
    with pytest.raises(ValueError, match=message):
        scores_from_distmat(distmat, [1, 2], [0, 0], [1, 2, 3], [1, 1, 1])


def test_an_array_in_any_layout_will_do():
    distmat = np.random.default_rng(0).random((3, 5))
    labels = (np.arange(3), np.zeros(3), np.arange(5) % 3, np.ones(5))
    backwards = (labels[0][::-1], labels[1], labels[2][::-1], labels[3])
    turned = scores_from_distmat(distmat[::-1, ::-1], *backwards)
    assert turned.mAP == pytest.approx(scores_from_distmat(distmat, *labels).mAP)


def test_a_curve_without_a_point_is_rejected():
    with pytest.raises(ValueError, match="max_rank"):
        scores_from_distmat([[0.0]], [1], [0], [1], [1], max_rank=0)


# ---- labels ----


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint64, np.int32, np.float32, np.float64, list, torch.tensor])
def test_labels_may_be_whole_numbers_of_any_type(kind):
    values = [3, 1, 200]
    labels = Labels.of(kind(values), np.array(values))
    assert labels.pids.dtype == labels.camids.dtype == torch.int64
    assert labels.pids.tolist() == values


@pytest.mark.parametrize("values", [["a", "b"], [0.5, 1], [float("nan"), 1], torch.tensor([0.5, 1]), [None, 1]])
def test_other_labels_are_refused(values):
    with pytest.raises(ValueError, match="pids must be whole numbers"):
        Labels.of(values, [0, 1])
