"""What several tests of this folder have in common: batches with padding, and pairs as plain sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paqdetr.paq import Pairs, QualityAwareAssigner
from paqdetr.paq.costs import MatchingCosts
from paqdetr.structures import Targets

Maps = list[Tensor]  # one image, per level (d, h, w), all of it valid
PairSet = set[tuple[int, int]]


def pad_batch(images: list[Maps], extra: int = 0) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """Lay images out as tokens: each level padded right and below to the largest image's size and `extra` cells more.

    The padding holds large garbage. Returns tokens (B, S, d), shapes, mask (B, S).
    """
    shapes, tokens, masks = [], [], []
    for level in zip(*images, strict=True):
        height, width = (max(x.shape[axis] for x in level) + extra for axis in (1, 2))
        plane = 100 * torch.randn(len(level), level[0].shape[0], height, width, dtype=level[0].dtype)
        mask = torch.ones(len(level), height, width, dtype=torch.bool)
        for i, x in enumerate(level):
            plane[i, :, : x.shape[1], : x.shape[2]] = x
            mask[i, : x.shape[1], : x.shape[2]] = False
        shapes.append((height, width))
        tokens.append(plane.flatten(2).transpose(1, 2))
        masks.append(mask.flatten(1))
    return torch.cat(tokens, dim=1), shapes, torch.cat(masks, dim=1)


def as_set(pairs: Pairs) -> PairSet:
    assert pairs.query_indices.dtype == pairs.target_indices.dtype == torch.int64
    queries = pairs.query_indices.tolist()
    assert queries == sorted(set(queries)), "ascending, no query twice"
    assert len(pairs) == len(queries) == len(pairs.target_indices)
    return set(zip(queries, pairs.target_indices.tolist(), strict=True))


def solve(assigner: Any, logits: Tensor, boxes: Tensor, target: Targets) -> PairSet:
    (pairs,) = assigner(logits[None], boxes[None], [target])
    return as_set(pairs)


def counts(assigner: QualityAwareAssigner, logits: Tensor, boxes: Tensor, target: Targets) -> list[int]:
    (found,) = assigner.num_positives(logits[None], boxes[None], [target])
    assert found.dtype == torch.int64
    return found.tolist()


def image_of(cost: list[list[float]], iou: list[list[float]]) -> MatchingCosts:
    """The costs and IoUs (Q, G) of one image, with nothing else."""
    table = np.array(iou, dtype=float)
    return MatchingCosts(np.array(cost, dtype=float), table, np.zeros_like(table), np.zeros(len(table)))
