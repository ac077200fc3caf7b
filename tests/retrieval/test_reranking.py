"""Tests of re-ranking against recorded figures and the dense algorithm, of blocks and ranks, and of errors.

Also covers reid.retrieval.neighbours and reid.retrieval.sparse_rows.
"""

from __future__ import annotations

import doctest
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from program import TIMEOUT
from torch.utils._python_dispatch import TorchDispatchMode

from reid.retrieval import metrics, neighbours, reranking, sparse_rows
from reid.retrieval.neighbours import row_blocks
from reid.retrieval.reranking import KReciprocal, k_reciprocal

GOLDEN = [(20, 6, 0.3), (10, 3, 0.5), (25, 1, 0.0)]


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parents[1] / "golden" / "reranking.npz")


def people(num_images: int, num_features: int = 16, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Return embeddings of length 1 around one center for every five images."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_images // 5 + 1, num_features))
    x = centres[rng.integers(len(centres), size=num_images)] + spread * rng.standard_normal((num_images, num_features))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def expected(q: np.ndarray, g: np.ndarray, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    distances = reference.squared_distances(np.concatenate([q, g]))
    return reference.k_reciprocal(distances, len(q), k1, k2, lambda_value)


def assert_close(actual: torch.Tensor, wanted: np.ndarray, atol: float = 1e-6):
    np.testing.assert_allclose(actual.cpu().numpy(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), GOLDEN)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recorded_distances(golden, k1, k2, lambda_value, dtype):
    q, g = (golden[f"{side}_feats"].astype(dtype) for side in ("query", "gallery"))
    distmat = k_reciprocal(q, g, k1, k2, lambda_value)
    wanted = golden[f"k1_{k1}_k2_{k2}_lambda_{lambda_value}"]
    assert distmat.dtype == torch.from_numpy(q).dtype
    assert_close(distmat, wanted, atol=2e-3)
    assert_close(distmat, expected(q, g, k1, k2, lambda_value))
    labels = [golden[f"{side}_{what}"] for side in ("query", "gallery") for what in ("pids", "camids")]
    ours, theirs = (metrics.scores_from_distmat(d, *labels) for d in (distmat, wanted))
    assert ours.mAP == pytest.approx(theirs.mAP, abs=1e-3)


def test_published_values_are_the_defaults(golden):
    q, g = golden["query_feats"], golden["gallery_feats"]
    assert torch.equal(k_reciprocal(q, g), k_reciprocal(q, g, k1=20, k2=6, lambda_value=0.3))


KINDS = {
    "random": lambda rng, shape: rng.standard_normal(shape),
    "unit": lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=1, keepdims=True),
    # Sums of these are exact, so that ties are ties in any order of computation.
    "ties": lambda rng, shape: rng.choice([-1.0, 0.0, 0.5, 1.0], shape),
    "far ties": lambda rng, shape: 1000 + rng.choice([-1.0, 0.0, 0.5, 1.0], shape),
    "duplicates": lambda rng, shape: rng.standard_normal(shape)[rng.integers(max(1, shape[0] // 4), size=shape[0])],
    "identical": lambda rng, shape: np.repeat(rng.standard_normal((1, shape[1])), shape[0], axis=0),
    "zeros": lambda rng, shape: np.zeros(shape),
    "some zeros": lambda rng, shape: rng.standard_normal(shape) * (rng.random((shape[0], 1)) < 0.5),
    "outlier": lambda rng, shape: rng.standard_normal(shape) * np.where(np.arange(shape[0]) == 0, 1e5, 1)[:, None],
    "shifted": lambda rng, shape: 1e4 + rng.standard_normal(shape),
}


@given(
    kind=st.sampled_from(sorted(KINDS)),
    num_queries=st.integers(1, 8),
    num_gallery=st.integers(1, 60),
    num_features=st.integers(1, 5),
    k1=st.integers(1, 30),
    k2=st.integers(1, 12),
    lambda_value=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    spare=st.sampled_from([0, 1, neighbours.SPARE]),
    block_rows=st.sampled_from([1, 7, neighbours.PRODUCT_ROWS]),
    portion=st.sampled_from([1, 100, sparse_rows.PORTION]),
)
@example("zeros", 1, 1, 1, 1, 1, 0.3, 0, 16, 512, 2**20)
@example("identical", 3, 60, 2, 5, 12, 0.3, 0, 16, 512, 2**20)  # most have no mutual neighbour at all
@example("ties", 8, 60, 1, 1, 1, 0.3, 0, 0, 7, 1)
def test_as_the_dense_algorithm(
    kind, num_queries, num_gallery, num_features, k1, k2, lambda_value, seed, spare, block_rows, portion
):
    x = KINDS[kind](np.random.default_rng(seed), (num_queries + num_gallery, num_features))
    q, g = x[:num_queries], x[num_queries:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "SPARE", spare)
        patch.setattr(neighbours, "PRODUCT_ROWS", block_rows)
        patch.setattr(sparse_rows, "PORTION", portion)
        distmat = k_reciprocal(q, g, k1, k2, lambda_value)
    assert distmat.shape == (num_queries, num_gallery)
    assert_close(distmat, expected(x[:num_queries], x[num_queries:], k1, k2, lambda_value))


class Ranks:
    """Threads that gather rows as ranks do."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=TIMEOUT)
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def gather(self, rank: int):
        def gather(rows, ids, num_rows):
            self._given[rank] = rows, ids
            self._barrier.wait()
            rows, ids = (torch.cat([self._given[r][part] for r in range(self.num_ranks)]) for part in (0, 1))
            self._barrier.wait()
            assert torch.equal(ids.sort().values, torch.arange(num_rows))
            return torch.empty_like(rows).index_copy_(0, ids, rows)

        return gather

    def distances(self, q, g, blocks_of) -> list[torch.Tensor]:
        """Return the distances of all queries on each rank."""

        def work(rank: int) -> torch.Tensor:
            blocks = blocks_of(rank)
            reranked = KReciprocal(q, g, 20, 6, 0.3, blocks=blocks, gather=self.gather(rank))
            return torch.cat([reranked.distances(slice(i, i + 16)) for i in range(0, len(q), 16)])

        with ThreadPoolExecutor(self.num_ranks) as pool:
            return list(pool.map(work, range(self.num_ranks)))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_ranks_gives_the_same_bits(monkeypatch, num_ranks, dtype):
    monkeypatch.setattr(neighbours, "PRODUCT_ROWS", 64)
    x = people(250).astype(dtype)
    q, g = x[:40], x[40:]  # 4 blocks, so that one of 5 ranks has none
    blocks = row_blocks(len(x))
    assert len(blocks) == 4
    alone = KReciprocal(q, g, 20, 6, 0.3)
    wanted = torch.cat([alone.distances(slice(i, i + 16)) for i in range(0, 40, 16)])
    for distances in Ranks(num_ranks).distances(q, g, lambda rank: blocks[rank::num_ranks]):
        assert torch.equal(distances, wanted)


@pytest.mark.parametrize("num_images", [1, 2, 511, 512, 513, 32_769, 93_820])
def test_blocks_cover_all_rows_once(num_images):
    blocks = row_blocks(num_images)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == num_images
    assert all(block.start < block.stop for block in blocks)


def test_neighbours_do_not_depend_on_blocks(monkeypatch):
    # Duplicates and a lattice: the product alone would order them by its rounding.
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(-1, 2, (300, 40)) / 7).float()
    x[100:150] = x[:50]
    points = neighbours.Points.of(x.clone())
    together = neighbours.nearest(points, slice(0, 300), 30)[0]
    for size in (1, 7, 128):
        parts = [neighbours.nearest(points, slice(i, min(i + size, 300)), 30)[0] for i in range(0, 300, size)]
        assert torch.equal(torch.cat(parts), together)
    assert (together[:50, 0] == torch.arange(50)).all()
    assert (together[100:150, :2] == torch.stack([torch.arange(50), torch.arange(100, 150)], dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["unit", "ties", "far ties", "duplicates", "identical", "zeros", "outlier"])
def test_neighbours_as_sorted_distances(kind, dtype):
    x = torch.from_numpy(KINDS[kind](np.random.default_rng(1), (200, 3))).to(dtype)
    distances = reference.squared_distances(x.numpy())
    indices, farthest = neighbours.nearest(neighbours.Points.of(x.clone()), slice(0, 200), 20)
    is_right = (indices.numpy() == distances.argsort(axis=1, kind="stable")[:, :20]).all(axis=1)
    assert is_right[1 if kind == "outlier" else 0 :].all()  # distances of the outlier are nearly equal
    assert_close(farthest / farthest.max().clamp(min=1e-30), distances.max(axis=1) / max(distances.max(), 1e-30))


def test_both_ways_to_measure_pairs_agree():
    points = neighbours.Points.of(torch.from_numpy(people(50)))
    columns = torch.arange(50).repeat(10)
    arguments = points.part(slice(5, 15)), points, torch.full((10,), 50), columns
    one, other = neighbours.pair_distances(*arguments), neighbours._gathered_distances(*arguments)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    for distances in (one, other):
        assert (distances.view(10, 50)[torch.arange(10), torch.arange(5, 15)] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neither_origin_nor_scale_matters(dtype):
    x = people(120).astype(dtype)
    wanted = k_reciprocal(x[:20], x[20:])
    # Powers of 2 are exact, even where squares are not: 2**-70 squared is no float32.
    small = (x * 2.0 ** (-70 if dtype == np.float32 else -600)).astype(dtype)
    assert torch.equal(k_reciprocal(small[:20], small[20:]), wanted)
    moved = x.astype(np.float64) + 3
    assert_close(k_reciprocal(moved[:20], moved[20:]), wanted.double().numpy(), atol=1e-6)


def test_float32_is_near_float64():
    for seed in range(5):
        x = people(400, 64, seed=seed).astype(np.float32)
        single, double = (k_reciprocal(x[:60].astype(t), x[60:].astype(t)) for t in (np.float32, np.float64))
        assert single.dtype == torch.float32
        assert_close(single.double(), double.numpy(), atol=1e-6)


def test_the_order_of_the_gallery_does_not_matter():
    x = people(150)
    order = np.random.default_rng(3).permutation(120)
    assert_close(k_reciprocal(x[:30], x[30:][order]), k_reciprocal(x[:30], x[30:]).numpy()[:, order], atol=1e-12)


def test_reranking_helps_where_identities_are_clusters():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 8))
    pids, camids = np.repeat(np.arange(20), 8), np.tile(np.arange(4), 40)
    x = centres[pids] + 0.9 * rng.standard_normal((160, 8))
    is_query = np.arange(160) % 8 == 0
    labels = pids[is_query], camids[is_query], pids[~is_query], camids[~is_query]
    q, g = x[is_query], x[~is_query]
    original = metrics.scores_from_distmat(((q[:, None] - g) ** 2).sum(2), *labels)
    reranked = metrics.scores_from_distmat(k_reciprocal(q, g, k1=7, k2=3), *labels)
    assert reranked.mAP > original.mAP + 0.02


def test_lambda_of_one_is_the_original_distance():
    x = people(80)
    q, g = x[:10], x[10:]
    farthest = ((q[:, None] - x) ** 2).sum(2).max(1, keepdims=True)
    assert_close(k_reciprocal(q, g, lambda_value=1), ((q[:, None] - g) ** 2).sum(2) / farthest, atol=1e-12)


def test_example_in_the_docstring_is_right():
    assert doctest.testmod(reranking) == (0, 2)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_tensor_grows_with_the_square_of_the_images(monkeypatch):
    monkeypatch.setattr(neighbours, "PRODUCT_ELEMENTS", 2**16)
    monkeypatch.setattr(sparse_rows, "PORTION", 2**16)
    largest = []
    for num_images in (1500, 3000):
        x = people(num_images, 8, spread=0.3)
        with LargestTensor() as made:
            reranked = KReciprocal(x[:200], x[200:], 20, 6, 0.3)
            for block in range(0, 200, 10):
                reranked.distances(slice(block, block + 10))
        largest.append(made.elements)
    assert largest[1] < 2.2 * largest[0]
    assert largest[1] < 3000**2 / 20


def test_forms_of_input():
    x = people(60)
    q, g = x[:10], x[10:]
    wanted = k_reciprocal(q, g)
    tensors = [torch.from_numpy(part).requires_grad_() for part in (q, g)]
    copies = [part.detach().clone() for part in tensors]
    for given_q, given_g in (tensors, (q[::-1][::-1], np.asfortranarray(g)), (q.tolist(), g.tolist()), (tensors[0], g)):
        distmat = k_reciprocal(given_q, given_g)
        assert torch.equal(distmat, wanted)
        assert not distmat.requires_grad
    assert all(torch.equal(part, copy) for part, copy in zip(tensors, copies, strict=True))
    assert k_reciprocal(q.astype(np.float32), g).dtype == torch.float64
    assert k_reciprocal(tensors[0].half(), tensors[1].half()).dtype == torch.float32
    assert torch.equal(k_reciprocal(q, g, np.int64(20), np.int64(6), np.float64(0.3)), wanted)
    assert torch.equal(k_reciprocal(q, g, k1=10**9), k_reciprocal(q, g, k1=59 * 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k1": 0}, "k1.* got 0"),
        ({"k1": 2.5}, r"k1.* got 2\.5"),
        ({"k2": 0}, "k2.* got 0"),
        ({"k2": -3}, "k2.* got -3"),
        ({"lambda_value": -0.1}, r"lambda_value.* got -0\.1"),
        ({"lambda_value": 1.1}, r"lambda_value.* got 1\.1"),
        ({"lambda_value": float("nan")}, "lambda_value.* got nan"),
        ({"q_embedding": np.ones((2, 4))}, r"got \[2, 4\] and \[3, 5\]"),
        ({"q_embedding": np.ones((0, 5))}, r"got \[0, 5\] and \[3, 5\]"),
        ({"g_embedding": np.ones((0, 5))}, r"got \[2, 5\] and \[0, 5\]"),
        ({"q_embedding": np.ones(5)}, r"\[5\]"),
        ({"q_embedding": np.full((2, 5), np.nan)}, "finite"),
        ({"g_embedding": np.full((3, 5), np.inf)}, "finite"),
        ({"g_embedding": np.full((3, 5), 1e200)}, "finite"),
    ],
)
def test_invalid_input_is_rejected(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        k_reciprocal(**{"q_embedding": np.ones((2, 5)), "g_embedding": np.ones((3, 5)), **arguments})
    assert "\n" not in str(caught.value)
