"""The single-gallery-shot protocol against choosing images one by one; how often each is chosen."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from rankings import TIED, retrievals, without_ties

from reid.randomness import uniform
from reid.retrieval import metrics, single_gallery_shot
from reid.retrieval.metrics import scores_from_distmat
from reid.retrieval.single_gallery_shot import NUM_REPEATS


def draw(repeat, query, identity):
    return float(uniform(single_gallery_shot._STREAM, repeat, query, identity)[0])


@given(retrievals(TIED))
def test_positions_agree_with_choosing_images_one_by_one(case):
    scores = scores_from_distmat(*case, single_gallery_shot=True)
    expected = reference.single_shot_positions(*case, NUM_REPEATS, draw)
    assert scores.per_query.single_shot.tolist() == expected
    valid = [positions for positions in expected if positions[0] >= 0]
    for k in range(1, 11):
        assert scores.cmc[k - 1] == pytest.approx(np.mean([[p < k for p in positions] for positions in valid]))


def test_all_but_the_curve_stays_over_the_complete_gallery():
    complete, single = (scores_from_distmat(*without_ties(), single_gallery_shot=on) for on in (False, True))
    assert (single.mAP, single.mINP) == (complete.mAP, complete.mINP)
    assert torch.equal(single.per_query.first_match, complete.per_query.first_match)
    assert not torch.equal(single.cmc, complete.cmc)
    assert complete.per_query.single_shot.shape == (40, 0)


def test_every_image_is_chosen_with_the_same_probability():
    """Match 0 or 1, against one of three: they are first with probability 1/2 * 1 + 1/2 * 1/3."""
    distmat = np.tile([0.1, 0.3, 0.2, 0.2, 0.4, 0.0], (4000, 1))
    pids = np.full(4000, 7), np.array([7, 7, 8, 8, 8, 7])
    camids = np.zeros(4000, dtype=int), np.array([1, 2, 1, 1, 1, 0])
    scores = scores_from_distmat(distmat, pids[0], camids[0], pids[1], camids[1], single_gallery_shot=True)
    assert scores.cmc[0] == pytest.approx(2 / 3, abs=0.01)  # five standard deviations are 0.012
    by_repeat = (scores.per_query.single_shot == 0).double().mean(0)
    assert len(set(by_repeat.tolist())) > 1


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_size_of_the_blocks_of_queries_changes_nothing(monkeypatch, size):
    complete = scores_from_distmat(*without_ties(), single_gallery_shot=True)
    monkeypatch.setattr(metrics, "QUERY_BLOCK", size)
    parts = scores_from_distmat(*without_ties(), single_gallery_shot=True)
    assert torch.equal(parts.per_query.single_shot, complete.per_query.single_shot)
    assert torch.equal(parts.cmc, complete.cmc)


def test_pids_may_be_any_numbers():
    """The choice depends on their order alone."""
    distmat, q_pids, q_camids, g_pids, g_camids = without_ties()
    plain, large = (
        scores_from_distmat(distmat, q_pids * by + to, q_camids, g_pids * by + to, g_camids, single_gallery_shot=True)
        for by, to in ((1, 0), (2**58, -(2**60)))
    )
    assert torch.equal(plain.per_query.single_shot, large.per_query.single_shot)


def test_one_query_and_one_image():
    assert scores_from_distmat([[0.5]], [1], [0], [1], [1], single_gallery_shot=True).cmc.tolist() == [1.0] * 50
