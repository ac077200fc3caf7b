"""Single-gallery-shot protocol of CUHK03: a query is ranked against one gallery image of every identity.

For every query and repeat the images are drawn uniformly from the images of an identity that the query's protocol
keeps. Distractors (pid 0) count as one identity. The draws are a function of repeat, query and identity, so they are
equal for every model and on any number of ranks.

Source: Li et al., DeepReID, CVPR 2014; ten repeats for each query, as in Open-ReID and torchreid.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reid.randomness import uniform

NUM_REPEATS = 10
_STREAM = 0x51  # separates these random numbers from those of training


def single_shot_positions(
    distances: Tensor, is_match: Tensor, q_pids: Tensor, query_ids: NDArray[np.int64], g_pids: Tensor
) -> Tensor:
    """Return the position of the query's identity among one image of each, from 0; -1 for a query without a match.

    Args:
        distances: [b, G] distances; gallery order decides between equal ones.
        is_match: bool [b, G], matches.
        q_pids: [b] identities of the queries.
        query_ids: [b] indices of the queries among all queries.
        g_pids: [G] identities of the gallery.

    Returns:
        int64 [b, NUM_REPEATS].
    """
    pids, identity = g_pids.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # [P], [G]
    num_images = identity.bincount(minlength=len(pids))  # [P]
    images = identity.argsort(stable=True)  # images of identity p: num_images[p] of them from first_image[p]
    first_image = num_images.cumsum(0) - num_images
    is_match_pid = q_pids[:, None] == pids  # [b, P], at most one in a row

    queries, matches = is_match.nonzero(as_tuple=True)  # query by query
    num_matches = is_match.sum(1)  # [b]
    first_match = num_matches.cumsum(0) - num_matches
    is_valid = num_matches > 0

    positions = num_matches.new_full((len(q_pids), NUM_REPEATS), -1)
    if not len(queries):
        return positions
    for repeat in range(NUM_REPEATS):
        drawn = uniform(_STREAM, repeat, query_ids[:, None], np.arange(len(pids)))
        share = torch.from_numpy(drawn).to(distances.device)  # [b, P]
        others = images[first_image + (share * num_images).long()]  # [b, P]
        chosen = ((share * is_match_pid).sum(1) * num_matches).long()  # [b]
        match = matches[(first_match + chosen).clamp(max=len(matches) - 1)][:, None]  # [b, 1]
        other_distance, distance = distances.gather(1, others), distances.gather(1, match)
        is_closer = (other_distance < distance) | ((other_distance == distance) & (others < match))
        positions[:, repeat] = (is_closer & ~is_match_pid).sum(1).masked_fill(~is_valid, -1)
    return positions
