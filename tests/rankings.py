"""Retrievals to score: drawn by hypothesis, made up, and the recorded one."""

import math

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st


def sides(file):
    return [file[f"{side}_{what}"] for side in ("query", "gallery") for what in ("feats", "pids", "camids")]


def labels(draw, num_images):
    """Draw few identities and cameras, so that matches, images to leave out and queries without a match all occur."""
    pids = draw(st.lists(st.integers(0, 3), min_size=num_images, max_size=num_images))
    camids = draw(st.lists(st.integers(0, 2), min_size=num_images, max_size=num_images))
    return pids, camids


@st.composite
def retrievals(draw, distances):
    """Draw distances [Q, G] and the labels of both sides, at least one query with a match."""
    num_queries, num_gallery = draw(st.integers(1, 6)), draw(st.integers(1, 25))
    rows = st.lists(distances, min_size=num_gallery, max_size=num_gallery)
    distmat = np.array(draw(st.lists(rows, min_size=num_queries, max_size=num_queries)))
    q_pids, q_camids = labels(draw, num_queries)
    g_pids, g_camids = labels(draw, num_gallery)
    has_match = (np.equal.outer(q_pids, g_pids) & np.not_equal.outer(q_camids, g_camids)).any()
    assume(has_match)
    return distmat, q_pids, q_camids, g_pids, g_camids


TIED = st.sampled_from([-1.0, 0.0, 0.5, 1.0, math.inf])


def without_ties(num_queries=40, num_gallery=120, seed=0):
    """Return distances that all differ, as do the numbers of matches."""
    rng = np.random.default_rng(seed)
    distmat = rng.permuted(np.tile(np.arange(num_gallery) / num_gallery, (num_queries, 1)), axis=1)
    q, g = ((rng.integers(0, 12, size), rng.integers(0, 3, size)) for size in (num_queries, num_gallery))
    return distmat, *q, *g
