"""Nearest neighbours, against sorting all distances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reid import nearest as module
from reid.nearest import nearest

LIBRARIES = pytest.mark.parametrize("use_faiss", [False, True], ids=["torch", "faiss"])


def all_sorted(q, g, top, distance):
    """From the definition, one query at a time, in float64."""
    q, g = q.astype(np.float64), g.astype(np.float64)
    rows = []
    for query in q:
        costs = [1 - sum(query * image) if distance == "cosine" else np.sqrt(sum((query - image) ** 2)) for image in g]
        order = sorted(range(len(g)), key=lambda place: (round(costs[place], 12), place))[:top]
        rows.append(([costs[place] for place in order], order))
    return np.array([costs for costs, _ in rows]), np.array([order for _, order in rows])


def check(q, g, top, distance, *, use_faiss):
    distances, places = nearest(q, g, top, distance=distance, use_faiss=use_faiss)
    expected_distances, expected_places = all_sorted(q, g, top, distance)
    assert np.array_equal(places, expected_places)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-7)


def normalised(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@LIBRARIES
@given(data=st.data())
def test_any_gallery_with_many_ties_in_its_order(use_faiss, data):
    """Small whole numbers: many images at equal distance, which float32 computes exactly."""
    num_q, num_g = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    q, g = (rng.integers(-1, 2, (num, 3)).astype(np.float32) for num in (num_q, num_g))
    for distance in ("cosine", "euclidean"):
        check(q, g, data.draw(st.integers(1, 70)), distance, use_faiss=use_faiss)


@LIBRARIES
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_random_embeddings_over_several_blocks(monkeypatch, use_faiss, distance):
    monkeypatch.setattr(module, "_BLOCK", 64)
    monkeypatch.setattr(module, "_QUERY_BLOCK", 3)
    rng = np.random.default_rng(1)
    q, g = (normalised(rng.standard_normal((num, 32))) for num in (7, 300))
    if distance == "euclidean":  # lengths count
        g *= rng.uniform(0.2, 2, (300, 1)).astype(np.float32)
    check(q, g, 10, distance, use_faiss=use_faiss)


@LIBRARIES
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_many_equal_images_come_in_gallery_order(use_faiss, distance):
    rng = np.random.default_rng(2)
    g = normalised(rng.standard_normal((1000, 16)))
    g[100:900] = g[500]
    _, places = nearest(g[500:501], g, 5, distance=distance, use_faiss=use_faiss)
    assert places.tolist() == [[100, 101, 102, 103, 104]]


@LIBRARIES
def test_near_ties_below_float32_precision_are_ranked_exactly(use_faiss):
    """Each image is one rounding step away from the next, far less than a sum of 64 terms in float32 resolves."""
    rng = np.random.default_rng(3)
    image = normalised(rng.standard_normal((1, 64)))[0]
    g = np.tile(image, (200, 1))
    for place in range(200):
        g[place, place % 64] = np.nextafter(image[place % 64], np.float32((-1) ** place), dtype=np.float32)
    check(image[None], g, 20, "cosine", use_faiss=use_faiss)


@LIBRARIES
def test_memory_mapped_gallery_can_be_searched(tmp_path, use_faiss):
    g = normalised(np.random.default_rng(4).standard_normal((50, 8)))
    np.save(tmp_path / "g.npy", g)
    _, places = nearest(g[7:9], np.load(tmp_path / "g.npy", mmap_mode="r"), 1, distance="cosine", use_faiss=use_faiss)
    assert places.tolist() == [[7], [8]]
