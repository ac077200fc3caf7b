"""Nearest gallery images against sorting all distances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reid.retrieval import metrics, neighbours
from reid.retrieval.neighbours import nearest_in_gallery


def all_sorted(q, g, top, distance):
    """Return the result by definition, one query at a time, in float64."""
    q, g = q.astype(np.float64), g.astype(np.float64)
    rows = []
    for query in q:
        costs = [1 - sum(query * image) if distance == "cosine" else np.sqrt(sum((query - image) ** 2)) for image in g]
        order = sorted(range(len(g)), key=lambda position: (round(costs[position], 12), position))[:top]
        rows.append(([costs[position] for position in order], order))
    return np.array([costs for costs, _ in rows]), np.array([order for _, order in rows])


def search(q, g, top, distance):
    return nearest_in_gallery(torch.from_numpy(q), torch.from_numpy(g), top, distance=distance)


def assert_sorted(q, g, top, distance):
    distances, positions = search(q, g, top, distance)
    expected_distances, expected_positions = all_sorted(q, g, top, distance)
    assert np.array_equal(positions, expected_positions)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-7)


def normalized(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@given(data=st.data())
def test_any_gallery_with_many_ties_in_its_order(data):
    """Small integers give many images at equal distance, which float32 computes exactly."""
    num_q, num_g = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    q, g = (rng.integers(-1, 2, (num, 3)).astype(np.float32) for num in (num_q, num_g))
    for distance in ("cosine", "euclidean"):
        assert_sorted(q, g, data.draw(st.integers(1, 70)), distance)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_random_embeddings_over_several_blocks(monkeypatch, distance):
    monkeypatch.setattr(metrics, "QUERY_BLOCK", 3)
    monkeypatch.setattr(neighbours, "GATHERED_ELEMENTS", 64)
    rng = np.random.default_rng(1)
    q, g = (normalized(rng.standard_normal((num, 32))) for num in (7, 300))
    if distance == "euclidean":  # lengths count
        g *= rng.uniform(0.2, 2, (300, 1)).astype(np.float32)
    assert_sorted(q, g, 10, distance)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_many_equal_images_come_in_gallery_order(distance):
    rng = np.random.default_rng(2)
    g = normalized(rng.standard_normal((1000, 16)))
    g[100:900] = g[500]
    _, positions = search(g[500:501], g, 5, distance)
    assert positions.tolist() == [[100, 101, 102, 103, 104]]


def test_near_ties_below_float32_precision_are_ranked_exactly():
    """Each image is one rounding step away from the next, far less than a sum of 64 terms in float32 resolves."""
    rng = np.random.default_rng(3)
    image = normalized(rng.standard_normal((1, 64)))[0]
    g = np.tile(image, (200, 1))
    for position in range(200):
        g[position, position % 64] = np.nextafter(image[position % 64], np.float32((-1) ** position), dtype=np.float32)
    assert_sorted(image[None], g, 20, "cosine")


def test_memory_mapped_gallery_can_be_searched(tmp_path):
    g = normalized(np.random.default_rng(4).standard_normal((50, 8)))
    np.save(tmp_path / "g.npy", g)
    _, positions = search(g[7:9], np.load(tmp_path / "g.npy", mmap_mode="c"), 1, "cosine")
    assert positions.tolist() == [[7], [8]]
