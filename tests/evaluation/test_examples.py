"""The head of a query's ranking is the one that its scores come from, ties and left-out images included."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reid.evaluation.examples import find_examples, query_table, seeded_queries, worst_queries
from reid.retrieval.distances import Distances, embedding_distances, prepare_embeddings
from reid.retrieval.metrics import QUERY_BLOCK, Labels, retrieval_scores, scores_from_distmat
from reid.retrieval.ranking import QueryScores


def labels(rng, num, num_pids, num_cameras):
    return Labels.of(rng.integers(0, num_pids, num), rng.integers(0, num_cameras, num))


@st.composite
def cases(draw):
    """Return a distance matrix with many ties, and the labels of both sides."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_queries, num_images = draw(st.integers(1, 6)), draw(st.integers(2, 30))
    distmat = rng.integers(0, draw(st.integers(1, 40)), (num_queries, num_images)).astype(float)
    return distmat, labels(rng, num_queries, 3, 2), labels(rng, num_images, 3, 2)


def of_matrix(distmat):
    matrix = torch.as_tensor(distmat)
    return Distances(lambda block: matrix[block], matrix.new_zeros(len(matrix)))


@given(cases())
def test_the_complete_ranking_is_that_of_a_slow_sort(case):
    distmat, query, gallery = case
    examples = find_examples(range(len(distmat)), of_matrix(distmat), query, gallery, num=len(distmat[0]))
    for number, example in enumerate(examples):
        is_same_pid = [pid == query.pids[number] for pid in gallery.pids]
        is_junk = [
            same and camid == query.camids[number] for same, camid in zip(is_same_pid, gallery.camids, strict=True)
        ]
        expected = sorted((i for i in range(len(is_junk)) if not is_junk[i]), key=lambda i: (distmat[number, i], i))
        assert example.query == number
        assert example.gallery == expected
        assert example.distances == [distmat[number, i] for i in expected]
        assert example.is_match == [bool(is_same_pid[i]) for i in expected]


@given(cases())
def test_ap_and_first_match_follow_from_the_ranking(case):
    distmat, query, gallery = case
    examples = find_examples(range(len(distmat)), of_matrix(distmat), query, gallery, num=len(distmat[0]))
    if not any(any(example.is_match) for example in examples):
        return  # which `scores_from_distmat` refuses
    scores = scores_from_distmat(distmat, query.pids, query.camids, gallery.pids, gallery.camids).per_query
    for number, example in enumerate(examples):
        positions = np.flatnonzero(example.is_match)
        if len(positions):
            assert scores.first_match[number] == positions[0]
            precision = np.mean(np.arange(1, len(positions) + 1) / (positions + 1))
            assert scores.average_precision[number] == pytest.approx(precision)
        else:
            assert scores.first_match[number] == -1


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_example_distances_equal_scored_distances_across_blocks(distance):
    rng = np.random.default_rng(0)
    num_queries = 2 * QUERY_BLOCK + 40
    query, gallery = labels(rng, num_queries, 50, 3), labels(rng, 300, 50, 3)
    # Few directions, hence ties that rounding may break: another shape of the product would break them otherwise.
    kinds = rng.standard_normal((12, 64), dtype=np.float32)
    q, g = (torch.from_numpy(kinds[rng.integers(0, 12, num)]) for num in (num_queries, 300))
    scores = retrieval_scores(q, query.pids, query.camids, g, gallery.pids, gallery.camids, distance=distance)
    distances = embedding_distances(prepare_embeddings(q, distance), prepare_embeddings(g, distance), distance)
    queries = [num_queries - 1, 3, QUERY_BLOCK, 5, QUERY_BLOCK - 1]
    examples = find_examples(queries, distances, query, gallery, num=300)
    assert [example.query for example in examples] == queries
    for example in examples:
        first = int(scores.per_query.first_match[example.query])
        assert first == (example.is_match.index(True) if any(example.is_match) else -1)
    if distance == "euclidean":
        exact = torch.cdist(q[queries].double(), g.double())
        for row, example in zip(exact, examples, strict=True):
            np.testing.assert_allclose(np.array(example.distances), row[example.gallery] ** 2, atol=1e-3)


def test_at_most_the_requested_and_existing_images_are_returned():
    distmat, query, gallery = np.ones((1, 3)), Labels.of([0], [0]), Labels.of([0, 1, 0], [0, 0, 1])
    assert find_examples([0], of_matrix(distmat), query, gallery, num=1)[0].gallery == [1]
    assert find_examples([0], of_matrix(distmat), query, gallery)[0].gallery == [1, 2]
    assert find_examples([], of_matrix(distmat), query, gallery) == []


def scores_of(precisions) -> QueryScores:
    """NaN: a query without a match."""
    precision = torch.tensor(precisions, dtype=torch.float64)
    first = torch.where(precision.isnan(), -1, 4)
    return QueryScores(precision, precision / 2, first, (first >= 0).long(), torch.zeros((len(first), 0)))


def test_the_worst_queries_have_a_match_and_the_lowest_ap():
    scores = scores_of([0.5, np.nan, 0.1, 0.9, 0.1])
    assert worst_queries(scores, 3) == [2, 4, 0]
    assert worst_queries(scores, 9) == [2, 4, 0, 3]
    assert worst_queries(scores, 0) == []


def test_random_queries_have_a_match_and_depend_on_seed_only():
    some = scores_of([0.5, np.nan, *np.linspace(0, 1, 50)])
    other = scores_of([0.1, np.nan, *np.linspace(1, 0.5, 50)])
    drawn = seeded_queries(some, 8, seed=3)
    assert drawn == seeded_queries(other, 8, seed=3) == sorted(set(drawn))
    assert drawn != seeded_queries(some, 8, seed=4)
    assert len(drawn) == 8
    assert 1 not in drawn
    assert seeded_queries(some, 99, seed=3) == [0, *range(2, 52)]


def test_every_query_is_drawn_equally_often():
    scores, counts = scores_of([0.5] * 10), np.zeros(10)
    for seed in range(400):
        counts[seeded_queries(scores, 3, seed)] += 1
    assert counts.sum() == 1200
    assert abs(counts - 120).max() < 4 * np.sqrt(400 * 0.3 * 0.7)


def test_the_table_has_every_query_with_a_match_the_worst_first():
    columns, rows = query_table(scores_of([0.5, np.nan, 0.25]), Labels.of([7, 8, 9], [0, 1, 2]), ["a", "b", "c"])
    assert columns == ["query", "pid", "camid", "AP", "INP", "first_match_rank"]
    assert rows == [["c", 9, 2, 0.25, 0.125, 5], ["a", 7, 0, 0.5, 0.25, 5]]
