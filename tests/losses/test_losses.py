"""Losses, their gradients and the centers' step against recorded figures, loops and autograd.

Covers reid.losses.identity, reid.losses.triplet, reid.losses.center.
"""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reid.losses.center import center_loss, center_step
from reid.losses.identity import label_smoothed_cross_entropy
from reid.losses.triplet import batch_hard_distances, batch_hard_triplet

EXACT = {"rtol": 1e-9, "atol": 1e-12}
MARGINS = pytest.mark.parametrize("margin", [0.3, 0.0, None], ids=["margin 0.3", "margin 0", "soft margin"])


@pytest.fixture(scope="module")
def golden():
    file = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
    return {name: torch.from_numpy(file[name]) for name in file.files}


def leaf(values):
    return values.detach().clone().requires_grad_()


def value_and_gradient(loss, feat, *others):
    """Return the gradient of the mean over the anchors that count."""
    feat = leaf(feat)
    total, count = loss(feat, *others)
    (gradient,) = torch.autograd.grad(total / count, feat)
    return (total / count).detach(), gradient


def features(num_images, num_features=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_images, num_features)))


UNEVEN = [3, 3, 3, 3, 0, 0, 7, 5, 5]  # identity 7 has no positive


# ---- identity ----


def test_label_smoothing_equals_recorded_loss_and_gradient(golden):
    value, gradient = value_and_gradient(label_smoothed_cross_entropy, golden["logits"], golden["labels"])
    # The original holds its targets in float32, 0.905 and 0.005 here: hence the eighth digit.
    torch.testing.assert_close(value, golden["ce_label_smooth_0.1"], rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient, golden["ce_label_smooth_0.1_grad"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_label_smoothing_agrees_with_the_loop_and_with_torch(epsilon):
    logits, pids = 3 * features(9, 6), torch.tensor([5, 0, 3, 3, 1, 2, 4, 0, 5])
    total, count = label_smoothed_cross_entropy(logits, pids, epsilon)
    expected, expected_count = reference.label_smoothed_cross_entropy(logits, pids.tolist(), epsilon)
    assert count == expected_count == 9
    torch.testing.assert_close(total, expected, **EXACT)
    torch.testing.assert_close(total / count, F.cross_entropy(logits, pids, label_smoothing=epsilon), **EXACT)


def test_label_smoothing_stays_finite_for_large_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, -1e4]])
    value, gradient = value_and_gradient(label_smoothed_cross_entropy, logits, torch.tensor([1, 1]))
    assert value.isfinite()
    assert gradient.isfinite().all()


# ---- batch-hard triplet ----


@pytest.mark.parametrize(
    ("name", "margin"),
    [("triplet_margin_0.3", 0.3), ("triplet_soft_margin", None), ("triplet_margin_0.3_normalized", 0.3)],
)
def test_triplet_equals_recorded_loss_distances_and_gradient(golden, name, margin):
    def loss(feat, pids):
        return batch_hard_triplet(prepared(feat), pids, margin)

    def prepared(feat):
        return feat / (feat.norm(dim=1, keepdim=True) + 1e-12) if "normalized" in name else feat

    positive, negative, counts = batch_hard_distances(prepared(golden["feats"]), golden["labels"])
    torch.testing.assert_close(positive, golden[f"{name}_dist_ap"], **EXACT)
    torch.testing.assert_close(negative, golden[f"{name}_dist_an"], **EXACT)
    assert counts.all()
    value, gradient = value_and_gradient(loss, golden["feats"], golden["labels"])
    torch.testing.assert_close(value, golden[name], **EXACT)
    torch.testing.assert_close(gradient, golden[f"{name}_grad"], **EXACT)


@MARGINS
@given(pids=st.lists(st.integers(0, 4), min_size=1, max_size=12), seed=st.integers(0, 2**32 - 1))
def test_triplet_equals_loop_for_any_identity_counts(margin, pids, seed):
    feat = leaf(features(len(pids), seed=seed))
    total, count = batch_hard_triplet(feat, torch.tensor(pids), margin)
    expected, expected_count = reference.batch_hard_triplet(feat, pids, margin)
    assert count == expected_count
    torch.testing.assert_close(total, expected, **EXACT)
    (gradient,) = torch.autograd.grad(total, feat)
    if expected_count:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, feat)[0], **EXACT)
    else:
        assert not gradient.any()


@MARGINS
def test_triplet_gradient_is_that_of_the_loss(margin):
    pids = torch.tensor(UNEVEN)
    assert torch.autograd.gradcheck(lambda feat: batch_hard_triplet(feat, pids, margin)[0], leaf(features(len(pids))))


def test_anchors_without_positive_still_serve_as_negatives():
    feat = torch.tensor([[0.0], [1.0], [1.5]])
    total, count = batch_hard_triplet(feat, torch.tensor([0, 0, 1]), 1.0)
    assert count == 2
    assert total.item() == pytest.approx((1 - 1.5 + 1) + (1 - 0.5 + 1))


@MARGINS
@pytest.mark.parametrize("pids", [[4, 4, 4], [0, 1, 2], [1]], ids=["one identity", "all different", "one image"])
def test_batch_without_triplets_has_zero_loss_and_zero_gradient(margin, pids):
    feat = leaf(features(len(pids)))
    total, count = batch_hard_triplet(feat, torch.tensor(pids), margin)
    assert (total.item(), count.item()) == (0, 0)
    (gradient,) = torch.autograd.grad(total, feat)
    assert not gradient.any()


@MARGINS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_features_have_a_finite_gradient(margin, dtype):
    feat = features(6).to(dtype)
    feat[1], feat[3] = feat[0], feat[2]  # a positive and two of different identities
    feat[4] = feat[0]
    for values in (feat, torch.ones(6, 5, dtype=dtype)):
        value, gradient = value_and_gradient(batch_hard_triplet, values, torch.tensor([0, 0, 0, 1, 1, 1]), margin)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_rounding_never_swaps_negatives_with_equal_positives():
    feat = (3 + features(16, num_features=64)).repeat_interleave(4, 0)
    positive, negative, _ = batch_hard_distances(feat, torch.arange(16).repeat_interleave(4))
    torch.testing.assert_close(positive, torch.full((64,), 1e-6, dtype=torch.float64))
    assert (negative > 1).all()


@MARGINS
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_feature_never_gives_a_finite_loss(margin, broken):
    feat = features(len(UNEVEN))
    feat[2, 1] = broken
    assert not batch_hard_triplet(feat, torch.tensor(UNEVEN), margin)[0].isfinite()


@MARGINS
def test_float32_agrees_with_float64(margin):
    feat = features(64, num_features=512).abs()  # as after a ReLU: far from the origin, close to each other
    pids = torch.arange(16).repeat_interleave(4)
    exact, gradient = value_and_gradient(batch_hard_triplet, feat, pids, margin)
    single, single_gradient = value_and_gradient(batch_hard_triplet, feat.float(), pids, margin)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(single_gradient.double(), gradient, rtol=1e-4, atol=1e-7)


def test_float32_distances_are_exact_far_from_the_origin():
    """Squared distances of about 1e-4 would be lost in the matrix product's rounding errors of 1e-2."""
    feat = 50 + 0.001 * features(6, num_features=64)
    positive, negative, _ = batch_hard_distances(feat.float(), torch.tensor([0, 0, 1, 1, 2, 2]))
    for hardest in (positive, negative):
        distances = torch.cdist(feat.float().double(), feat.float().double())
        assert (distances - hardest[:, None].double()).abs().min(1).values.max() < 1e-6


# ---- centers ----


def test_center_loss_agrees_with_the_recorded_loss_and_gradients(golden):
    feat, centers = leaf(golden["feats"]), leaf(golden["centers"])
    total, count = center_loss(feat, golden["labels"], centers)
    assert count == len(feat)
    torch.testing.assert_close((total / count).detach(), golden["center"], **EXACT)
    to_feat, to_centers = torch.autograd.grad(total / count, (feat, centers))
    torch.testing.assert_close(to_feat, golden["center_grad_feats"], **EXACT)
    torch.testing.assert_close(to_centers, golden["center_grad_centers"], **EXACT)


def test_center_loss_equals_loop_and_passes_gradcheck():
    feat, centers, pids = leaf(features(6)), leaf(features(4, seed=1)), torch.tensor([2, 0, 0, 3, 0, 2])
    total, count = center_loss(feat, pids, centers)
    expected, expected_count = reference.center_loss(feat, pids.tolist(), centers)
    assert count == expected_count
    torch.testing.assert_close(total, expected, **EXACT)
    assert torch.autograd.gradcheck(lambda feat, centers: center_loss(feat, pids, centers)[0], (feat, centers))


def test_a_center_step_is_sgd_on_the_mean_center_loss(golden):
    feat, pids = golden["feats"], golden["labels"]
    expected = leaf(golden["centers"])
    optimizer = torch.optim.SGD([expected], lr=0.5)
    total, count = center_loss(feat, pids, expected)
    (total / count).backward()
    optimizer.step()
    centers = golden["centers"].clone()
    center_step(feat, pids, centers, learning_rate=0.5)
    torch.testing.assert_close(centers, expected.detach(), **EXACT)
    is_absent = ~torch.isin(torch.arange(len(centers)), pids)
    assert is_absent.any()
    assert torch.equal(centers[is_absent], golden["centers"][is_absent])


def test_center_step_sums_over_identity_and_ignores_order():
    feat, pids, start = features(7), torch.tensor([1, 0, 1, 1, 0, 1, 2]), features(4, seed=1)
    centers = start.clone()
    center_step(feat, pids, centers, learning_rate=0.25)
    for pid in range(4):
        pull = sum((feat[i] - start[pid] for i in range(7) if pids[i] == pid), torch.zeros(5, dtype=torch.float64))
        torch.testing.assert_close(centers[pid], start[pid] + 0.25 * 2 / 7 * pull, **EXACT)
    order = torch.tensor([6, 2, 0, 5, 4, 3, 1])
    shuffled = start.clone()
    center_step(feat[order], pids[order], shuffled, learning_rate=0.25)
    torch.testing.assert_close(shuffled, centers, **EXACT)


def test_a_center_step_leaves_no_trace_in_autograd():
    feat, centers = leaf(features(4)), features(3, seed=1)
    center_step(feat, torch.tensor([0, 1, 1, 2]), centers, learning_rate=0.5)
    assert not centers.requires_grad
    assert torch.equal(feat, features(4))


# ---- (sum, count) ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_counts_are_scalars_of_the_inputs_dtype(dtype):
    feat, pids, centers = features(4).to(dtype), torch.tensor([0, 0, 1, 1]), features(2, seed=1).to(dtype)
    for pair in (
        label_smoothed_cross_entropy(feat, pids),
        batch_hard_triplet(feat, pids, 0.3),
        batch_hard_triplet(feat, pids, None),
        center_loss(feat, pids, centers),
    ):
        assert [(part.shape, part.dtype) for part in pair] == [((), dtype)] * 2
        assert pair[1] == 4
