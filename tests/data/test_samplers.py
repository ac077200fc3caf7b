"""The global plan of an epoch against reid-strong-baseline's sampler, and how it is shared out among ranks."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import identity_epoch, most_batches, possible_lengths

from reid.data.samplers import EvaluationBatches, IdentityPlan, ShufflePlan, TrainBatches, rank_part


def pids_of(counts, seed=0):
    """Return pids with these numbers of images, in mixed order, with gaps between the pids."""
    pids = np.repeat(np.arange(len(counts)) * 3 + 7, counts)
    return np.random.default_rng(seed).permutation(pids)


def market_like_counts():
    """751 identities with 12,936 images, 2 at least, as uneven as Market-801's."""
    weights = np.random.default_rng(0).gamma(2.5, size=751)
    counts = 2 + np.floor(weights / weights.sum() * (12_936 - 2 * 751)).astype(int)
    counts[: 12_936 - counts.sum()] += 1
    return counts


@st.composite
def identity_cases(draw):
    counts = draw(st.lists(st.integers(1, 24), min_size=1, max_size=12))
    num_pids = draw(st.integers(1, len(counts)))
    return counts, num_pids, draw(st.integers(1, 5))


def groups_of(counts, num_instances):
    return tuple(max(count // num_instances, 1) for count in counts)


# ---- P x K ----


@given(identity_cases(), st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_batches_have_distinct_identities_and_no_repeated_images(case, seed, epoch):
    counts, num_pids, num_instances = case
    pids = pids_of(counts)
    plan = IdentityPlan(pids, num_pids=num_pids, num_instances=num_instances, seed=seed)
    batches = plan(epoch)
    assert batches.shape == (plan.num_batches, num_pids * num_instances)
    assert batches.dtype == np.int64
    blocks = pids[batches].reshape(-1, num_pids, num_instances)
    assert (blocks == blocks[:, :, :1]).all()
    assert all(len(set(batch)) == num_pids for batch in blocks[:, :, 0].tolist())
    count_of = dict(zip(*np.unique(pids, return_counts=True), strict=True))
    used, times = np.unique(batches, return_counts=True)
    enough_images = np.array([count_of[pid] >= num_instances for pid in pids[used]], dtype=bool)
    assert (times[enough_images] == 1).all()
    groups_used = zip(*np.unique(blocks[:, :, 0], return_counts=True), strict=True)
    assert all(num_groups <= max(count_of[pid] // num_instances, 1) for pid, num_groups in groups_used)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    num_instances=st.integers(1, 3),
    num_pids=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_epoch_length_is_one_the_original_sampler_can_give(counts, num_instances, num_pids, seed):
    num_pids = min(num_pids, len(counts))
    plan = IdentityPlan(pids_of(counts), num_pids=num_pids, num_instances=num_instances, seed=seed)
    assert plan.num_batches in possible_lengths(groups_of(counts, num_instances), num_pids)
    again = IdentityPlan(pids_of(counts, seed=1), num_pids=num_pids, num_instances=num_instances, seed=seed + 1)
    assert again.num_batches == plan.num_batches


@given(identity_cases(), st.integers(0, 2**32 - 1))
def test_even_the_longest_possible_epoch_never_runs_short(case, seed):
    counts, num_pids, num_instances = case
    plan = IdentityPlan(pids_of(counts), num_pids=num_pids, num_instances=num_instances, seed=seed)
    plan.num_batches = most_batches(groups_of(counts, num_instances), num_pids)
    batches = plan(1)
    assert len(batches) == plan.num_batches
    pids = pids_of(counts)[batches].reshape(len(batches), num_pids, num_instances)[:, :, 0]
    assert all(len(set(batch)) == num_pids for batch in pids.tolist())


def test_epoch_length_is_constant_where_the_original_falls_short():
    counts = [8, 1, 1, 1, 1, 1, 1, 1, 1]
    plan = IdentityPlan(pids_of(counts), num_pids=2, num_instances=1, seed=0)
    originals = [len(identity_epoch(pids_of(counts).tolist(), 2, 1, random.Random(seed))) for seed in range(100)]
    assert sum(length < plan.num_batches for length in originals) > 10
    assert {len(plan(epoch)) for epoch in range(1, 101)} == {plan.num_batches}


def test_what_must_be_used_up_is_taken_in_every_batch():
    """Five batches of two out of groups 5, 1, 1, 1, 1, 1 exist only if the big identity is in all of them."""
    pids = pids_of([5, 1, 1, 1, 1, 1])
    plan = IdentityPlan(pids, num_pids=2, num_instances=1, seed=0)
    plan.num_batches = 5
    for epoch in range(1, 21):
        assert (pids[plan(epoch)] == 7).sum(1).tolist() == [1] * 5


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([4000, *[4] * 40], id="one identity with thousands of images"),
        pytest.param([40, 8, 8, 8], id="as many identities as a batch holds"),
        pytest.param([30, 25, 3, 9, 14], id="one more"),
        pytest.param([1] * 9, id="single images"),
        pytest.param([1, 2, 3, 4, 5, 400, 400], id="few and many"),
    ],
)
def test_uneven_identities_give_complete_epochs_of_valid_length(counts):
    plan = IdentityPlan(pids_of(counts), num_pids=4, num_instances=4, seed=0)
    originals = {len(identity_epoch(pids_of(counts).tolist(), 4, 4, random.Random(seed))) for seed in range(30)}
    assert min(originals) <= plan.num_batches <= max(originals)
    for epoch in range(1, 6):
        batches = pids_of(counts)[plan(epoch)].reshape(plan.num_batches, 4, 4)
        assert all(len(set(batch)) == 4 for batch in batches[:, :, 0].tolist())


def test_identity_with_too_few_images_is_drawn_with_replacement():
    pids = pids_of([2, 2])
    plan = IdentityPlan(pids, num_pids=2, num_instances=4, seed=0)
    first = [sorted(plan(epoch)[0, :4].tolist()) for epoch in range(1, 201)]
    picked = np.array([len(set(images)) for images in first])
    assert set(picked) == {1, 2}
    assert abs((picked == 1).mean() - 2 * 0.5**4) < 5 * np.sqrt(0.125 * 0.875 / 200)


def test_market_epochs_match_original_length_and_identity_use():
    counts = market_like_counts()
    pids = np.repeat(np.arange(751), counts)
    assert (len(counts), len(pids)) == (751, 12_936)
    plan = IdentityPlan(pids, num_pids=16, num_instances=4, seed=0)
    num_epochs = 24
    originals = [identity_epoch(pids.tolist(), 16, 4, random.Random(seed)) for seed in range(num_epochs)]
    lengths = np.array([len(batches) for batches in originals])
    assert abs(plan.num_batches - lengths.mean()) < 0.01 * lengths.mean()

    ours, theirs = np.zeros((2, num_epochs, 751))  # groups used of every identity
    for epoch in range(num_epochs):
        ours[epoch] = np.bincount(pids[plan(epoch + 1)][:, ::4].ravel(), minlength=751)
        for batch in originals[epoch]:
            theirs[epoch] += np.bincount([pids[group[0]] for group in batch], minlength=751)
    num_groups = np.maximum(counts // 4, 1)
    for size in np.unique(num_groups):
        members = num_groups == size
        difference = ours[:, members].mean() - theirs[:, members].mean()
        spread = theirs[:, members].std() / np.sqrt(members.sum() * num_epochs)
        assert abs(difference) < 0.01 * size + 5 * spread, f"identities with {size} groups"


def test_remaining_identities_are_drawn_uniformly():
    plan = IdentityPlan(pids_of([4] * 3 + [16] * 3), num_pids=2, num_instances=2, seed=0)
    pids = pids_of([4] * 3 + [16] * 3)
    first = np.stack([pids[plan(epoch)[0]] for epoch in range(1, 201)])[:, ::2]
    counts = np.array([(first == pid).sum(0) for pid in np.unique(pids)])  # [6, 2] by position in the batch
    np.testing.assert_allclose(counts / 200, 1 / 6, atol=5 * np.sqrt(5 / 36 / 200))


def test_every_image_of_an_identity_is_drawn_equally_often():
    plan = IdentityPlan(np.array([0] * 6 + [1] * 6), num_pids=2, num_instances=2, seed=0)
    first = np.stack([plan(epoch)[0] for epoch in range(1, 201)])
    counts = np.array([(first == image).sum() for image in range(12)])
    np.testing.assert_allclose(counts / 200, 1 / 3, atol=5 * np.sqrt(2 / 9 / 200))


@pytest.mark.parametrize(
    "build",
    [
        lambda seed: IdentityPlan(pids_of([9] * 20), num_pids=4, num_instances=2, seed=seed),
        lambda seed: ShufflePlan(200, batch_size=8, seed=seed),
    ],
    ids=["identities", "shuffle"],
)
def test_plans_are_reproducible_and_differ_by_seed_and_epoch(build):
    assert np.array_equal(build(0)(3), build(0)(3))
    assert (build(0)(3) != build(0)(4)).mean() > 0.9
    assert (build(0)(3) != build(1)(3)).mean() > 0.9
    assert (build(0)(2) != build(2)(0)).mean() > 0.9


def test_too_few_identities_are_rejected():
    with pytest.raises(ValueError, match=r" 3 identities, got 4"):
        IdentityPlan(pids_of([9] * 3), num_pids=4, num_instances=2, seed=0)


PINNED = "the global batches have changed: runs are no longer comparable seed by seed, nor resumable across the change"


def test_the_first_identity_batches_are_pinned():
    plan = IdentityPlan(np.repeat(np.arange(5), [6, 4, 1, 5, 4]), num_pids=2, num_instances=2, seed=0)
    assert plan.num_batches == 5, PINNED
    assert plan(1)[:2].tolist() == [[6, 9, 10, 10], [15, 11, 7, 8]], PINNED
    assert plan(2)[:2].tolist() == [[10, 10, 15, 13], [3, 5, 14, 12]], PINNED


def test_the_batches_of_a_long_epoch_are_pinned():
    """Random numbers are drawn for 1,024 batches at a time."""
    batches = IdentityPlan(np.repeat(np.arange(3), 600), num_pids=1, num_instances=1, seed=0)(1)
    assert batches[[1023, 1024, 1025, 1799], 0].tolist() == [1412, 737, 1415, 1585], PINNED


def test_the_first_shuffled_batches_are_pinned():
    assert ShufflePlan(10, batch_size=4, seed=0)(1).tolist() == [[3, 0, 8, 1], [5, 7, 9, 6]], PINNED


# ---- all images ----


@given(num_images=st.integers(1, 300), batch_size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_shuffle_has_each_image_once_without_incomplete_batch(num_images, batch_size, seed):
    batch_size = min(batch_size, num_images)
    plan = ShufflePlan(num_images, batch_size=batch_size, seed=seed)
    batches = plan(5)
    assert batches.shape == (num_images // batch_size, batch_size) == (plan.num_batches, batch_size)
    assert len(set(batches.ravel().tolist())) == batches.size
    assert set(batches.ravel().tolist()) <= set(range(num_images))


def test_a_shuffle_leaves_out_every_image_equally_often():
    plan = ShufflePlan(10, batch_size=4, seed=0)
    used = np.mean([np.bincount(plan(epoch).ravel(), minlength=10) for epoch in range(1, 1001)], axis=0)
    np.testing.assert_allclose(used, 8 / 10, atol=5 * np.sqrt(0.16 / 1000))


def test_too_few_images_are_rejected():
    with pytest.raises(ValueError, match=r" 7 images, got 8"):
        ShufflePlan(7, batch_size=8, seed=0)


# ---- ranks ----


@pytest.fixture
def plan():
    return IdentityPlan(pids_of([9] * 20), num_pids=8, num_instances=4, seed=3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_rank_parts_form_global_batch_of_complete_identities(plan, num_ranks):
    parts = [list(TrainBatches(plan, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert len(parts[0]) == len(TrainBatches(plan, rank=0, num_ranks=num_ranks)) == plan.num_batches
    for step, batch in enumerate(plan(1)):
        assert np.concatenate([part[step].sample_ids for part in parts]).tolist() == batch.tolist()
        positions = np.concatenate([part[step].positions for part in parts])
        assert positions.tolist() == list(range(step * 32, (step + 1) * 32))
        assert {part[step].epoch for part in parts} == {1}
        for part in parts:
            blocks = pids_of([9] * 20)[part[step].sample_ids].reshape(-1, 4)
            assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_every_rank_knows_the_first_global_batch(plan, num_ranks):
    ranks = [TrainBatches(plan, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    firsts = [next(iter(rank)) for rank in ranks]
    for rank in ranks:
        rank.set_position(3, 1)  # at any position
        batch = rank.first_global_batch()
        assert batch.epoch == firsts[0].epoch
        assert batch.sample_ids.tolist() == np.concatenate([first.sample_ids for first in firsts]).tolist()
        assert batch.positions.tolist() == np.concatenate([first.positions for first in firsts]).tolist()


def test_a_batch_that_cannot_be_shared_out_is_rejected():
    assert rank_part(12, 2, 3) == slice(8, 12)
    with pytest.raises(ValueError, match=r"12 .* 5 ranks"):
        rank_part(12, 0, 5)


@pytest.mark.parametrize("step", [0, 1, 3, "all"])
def test_resuming_at_a_step_gives_exactly_the_rest(plan, step):
    step = plan.num_batches if step == "all" else step
    complete, resumed = (TrainBatches(plan, rank=1, num_ranks=2) for _ in range(2))
    complete.set_position(4, 0)
    resumed.set_position(4, step)
    rest, expected = list(resumed), list(complete)[step:]
    assert len(rest) == len(expected) == plan.num_batches - step
    for ours, theirs in zip(rest, expected, strict=True):
        assert ours.epoch == theirs.epoch == 4
        assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
        assert ours.positions.tolist() == theirs.positions.tolist()


def test_length_is_that_of_a_complete_epoch_after_resume(plan):
    batches = TrainBatches(plan, rank=0, num_ranks=1)
    batches.set_position(2, 3)
    assert len(batches) == plan.num_batches


@given(num_images=st.integers(1, 200), batch_size=st.integers(1, 50), num_ranks=st.integers(1, 9))
def test_evaluation_batches_are_equal_on_any_number_of_ranks(num_images, batch_size, num_ranks):
    shares = [
        EvaluationBatches(num_images, batch_size=batch_size, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    dealt = [[batch.sample_ids.tolist() for batch in share] for share in shares]
    assert [len(share) for share in shares] == [len(batches) for batches in dealt]
    expected = [list(range(start, min(start + batch_size, num_images))) for start in range(0, num_images, batch_size)]
    assert [batch for batches in dealt for batch in batches] == expected
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
