"""Reference results: slow loops in float64, written from the definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- losses: (sum, count), differentiable ----


def label_smoothed_cross_entropy(logits: Tensor, pids: Sequence[int], epsilon: float) -> tuple[Tensor, int]:
    """Cross entropy against (1 - epsilon) * one-hot + epsilon / C."""
    num_classes = logits.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for row, pid in zip(logits.double(), pids, strict=True):
        log_sum = row.exp().sum().log()
        for label in range(num_classes):
            target = (1 - epsilon) * (label == pid) + epsilon / num_classes
            total = total - target * (row[label] - log_sum)
    return total, len(pids)


def batch_hard_triplet(feat: Tensor, pids: Sequence[int], margin: float | None) -> tuple[Tensor, int]:
    """Farthest positive minus nearest negative of every anchor that has both; margin None: log(1 + exp(.))."""
    feat = feat.double()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for anchor, pid in enumerate(pids):
        distances = [(feat[anchor] - other).square().sum().sqrt() for other in feat]
        positives = [distances[i] for i, other in enumerate(pids) if other == pid and i != anchor]
        negatives = [distances[i] for i, other in enumerate(pids) if other != pid]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            total = total + ((1 + gap.exp()).log() if margin is None else (gap + margin).clamp(min=0))
            count += 1
    return total, count


def center_loss(feat: Tensor, pids: Sequence[int], centers: Tensor) -> tuple[Tensor, int]:
    """Squared distance of every feature to its identity's center."""
    total = torch.zeros((), dtype=torch.float64)
    for row, pid in zip(feat.double(), pids, strict=True):
        for a, b in zip(row, centers.double()[pid], strict=True):
            total = total + (a - b) ** 2
    return total, len(pids)


# ---- retrieval ----


class Retrieval(NamedTuple):
    """Scores of every query, NaN and -1 without a match, and the means over the others."""

    average_precision: list[float]
    inverse_negative_penalty: list[float]
    first_match: list[int]  # position from 0
    mAP: float
    mINP: float
    cmc: list[float]
    num_valid_queries: int


def retrieval(distmat, q_pids, q_camids, g_pids, g_camids, max_rank: int = 50) -> Retrieval:
    """Market-1501's protocol, query by query; among equal distances the gallery's order decides."""
    precisions, penalties, first = [], [], []
    for row, pid, camid in zip(distmat, q_pids, q_camids, strict=True):
        kept = [g for g in range(len(g_pids)) if not (g_pids[g] == pid and g_camids[g] == camid)]
        ranking = sorted(kept, key=lambda g: row[g])
        positions = [position for position, g in enumerate(ranking, start=1) if g_pids[g] == pid]
        if positions:
            precisions.append(sum(n / position for n, position in enumerate(positions, start=1)) / len(positions))
            penalties.append(len(positions) / positions[-1])
            first.append(positions[0] - 1)
        else:
            precisions.append(math.nan)
            penalties.append(math.nan)
            first.append(-1)
    valid = [q for q, position in enumerate(first) if position >= 0]
    return Retrieval(
        precisions,
        penalties,
        first,
        mAP=sum(precisions[q] for q in valid) / len(valid),
        mINP=sum(penalties[q] for q in valid) / len(valid),
        cmc=[sum(first[q] < k for q in valid) / len(valid) for k in range(1, max_rank + 1)],
        num_valid_queries=len(valid),
    )


def tpr_at_fpr(distmat, q_pids, q_camids, g_pids, g_camids, fpr: float) -> float:
    """Every distance is tried as the threshold, none of them included."""
    same, other = [], []
    for row, pid, camid in zip(distmat, q_pids, q_camids, strict=True):
        for distance, g_pid, g_camid in zip(row, g_pids, g_camids, strict=True):
            if g_pid != pid:
                other.append(distance)
            elif g_camid != camid:
                same.append(distance)
    accepted = 0
    for threshold in same + other:
        if not other or sum(d <= threshold for d in other) / len(other) <= fpr:
            accepted = max(accepted, sum(d <= threshold for d in same))
    return accepted / len(same)


def single_shot_positions(distmat, q_pids, q_camids, g_pids, g_camids, num_repeats: int, draw) -> list[list[int]]:
    """Return every query's positions among one image of each; draw(repeat, query, identity) is in [0, 1)."""
    result = []
    for query, (row, pid, camid) in enumerate(zip(distmat, q_pids, q_camids, strict=True)):
        kept = [g for g in range(len(g_pids)) if not (g_pids[g] == pid and g_camids[g] == camid)]
        positions = []
        for repeat in range(num_repeats):
            chosen = []
            for number, identity in enumerate(sorted(set(g_pids))):
                images = [g for g in kept if g_pids[g] == identity]
                if images:
                    chosen.append(images[int(draw(repeat, query, number) * len(images))])
            ranking = [g_pids[g] for g in sorted(chosen, key=lambda g: (row[g], g))]
            positions.append(ranking.index(pid) if pid in ranking else -1)
        result.append(positions)
    return result


def squared_distances(x: np.ndarray) -> np.ndarray:
    """[N, D] to [N, N], without cancellation."""
    return np.array([np.square(row - x).sum(1) for row in x.astype(np.float64)])


def mutual_neighbours(ranking: np.ndarray, i: int, k: int) -> np.ndarray:
    """R(i, k): of the k nearest images besides i itself those that have i among theirs."""
    forward = ranking[i, : k + 1]
    return np.array([j for j in forward if i in ranking[j, : k + 1]], dtype=int)


def k_reciprocal(distances: np.ndarray, num_queries: int, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Re-rank by Zhong et al., CVPR 2017, with N x N matrices; queries first, equal distances in order of position."""
    ranking = np.argsort(distances, axis=1, kind="stable")
    farthest = distances.max(axis=1, keepdims=True)
    original = np.divide(distances, farthest, out=np.zeros_like(distances), where=farthest > 0)
    weights = np.zeros_like(distances)
    for i in range(len(distances)):
        reciprocal = mutual_neighbours(ranking, i, k1)
        expanded = set(reciprocal)
        for candidate in reciprocal:
            half = mutual_neighbours(ranking, candidate, int(np.around(k1 / 2)))
            if len(np.intersect1d(half, reciprocal)) > 2 / 3 * len(half):
                expanded |= set(half)
        members = np.array(sorted(expanded), dtype=int)
        gauss = np.exp(-original[i, members])
        weights[i, members] = gauss / gauss.sum()
    if k2 > 1:
        weights = np.array([weights[nearest[:k2]].mean(axis=0) for nearest in ranking])
    jaccard = np.zeros_like(distances[:num_queries])
    for i in range(num_queries):
        common = np.minimum(weights[i], weights).sum(axis=1)
        jaccard[i] = 1 - common / (2 - common)
    final = jaccard * (1 - lambda_value) + original[:num_queries] * lambda_value
    return final[:, num_queries:]


# ---- batches ----


def identity_epoch(pids: Sequence[int], num_pids: int, num_instances: int, rng: random.Random) -> list[list[list[int]]]:
    """Return one epoch of reid-strong-baseline's RandomIdentitySampler: batches of P groups of K images."""
    images_of: dict[int, list[int]] = {}
    for image, pid in enumerate(pids):
        images_of.setdefault(pid, []).append(image)
    groups = {}
    for pid, images in images_of.items():
        drawn = rng.choices(images, k=num_instances) if len(images) < num_instances else list(images)
        rng.shuffle(drawn)
        groups[pid] = [drawn[i : i + num_instances] for i in range(0, len(drawn) - num_instances + 1, num_instances)]
    available = list(groups)
    batches = []
    while len(available) >= num_pids:
        chosen = rng.sample(available, num_pids)
        batches.append([groups[pid].pop(0) for pid in chosen])
        available = [pid for pid in available if groups[pid]]
    return batches


@cache
def possible_lengths(num_groups: tuple[int, ...], num_pids: int) -> frozenset[int]:
    """Every number of batches that the original's rule can give: it stops when fewer than P identities are left."""
    left = sorted(n for n in num_groups if n)
    if len(left) < num_pids:
        return frozenset({0})
    return frozenset(
        1 + length
        for chosen in combinations(range(len(left)), num_pids)
        for length in possible_lengths(tuple(sorted(n - (i in chosen) for i, n in enumerate(left))), num_pids)
    )


def most_batches(num_groups: Sequence[int], num_pids: int) -> int:
    """Return the largest T for which T batches of P distinct identities exist at all."""
    length = 0
    while sum(min(n, length + 1) for n in num_groups) >= num_pids * (length + 1):
        length += 1
    return length


# ---- augmentation ----


def augmented(image: np.ndarray, drawn: Sequence[int], padding: int, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return one uint8 image [H, W, 3] as float64 [3, H, W]: flip, pad, crop, normalize, erase."""
    flip, top, left, erase_top, erase_left, erase_height, erase_width = drawn
    height, width, _ = image.shape
    if flip:
        image = image[:, ::-1]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    cropped = padded[top : top + height, left : left + width]
    result = ((cropped / 255 - mean) / std).transpose(2, 0, 1)
    for channel in range(3):
        result[channel, erase_top : erase_top + erase_height, erase_left : erase_left + erase_width] = mean[channel]
    return result


def erasing_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height, width of reid-strong-baseline's RandomErasing; zeros where 100 attempts fail."""
    for _ in range(100):
        area = rng.uniform(0.02, 0.4) * height * width
        ratio = rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < width and h < height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return 0, 0, 0, 0
