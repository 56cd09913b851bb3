"""Extra positives that count less: of the queries that learn one box, the best is a whole positive, the next are parts of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from paqdetr.paq.assignment import Assigner, Pairs, solve_batch
from paqdetr.paq.costs import CostWeights, Matchables
from paqdetr.structures import Targets


class RankDamping:
    """Another assigner's pairs, each weighted by its rank among the pairs of its box.

    Source: Align-DETR (arXiv 2304.07527), prime sample weighting: with t = p^alpha * IoU^(1 - alpha), p the probability of the
    box's class, the pair with the r-th largest t of a box, r = 0, 1, ..., has weight exp(-r / tau). One-to-one pairs all have
    weight 1. What a loss makes of the weights is its own affair; `paqdetr.losses` follows the source.

    Args:
        assigner: who is paired.
        tau: how slowly weights fall; the source takes 1.5, where they are 1, 0.51, 0.26, 0.14.
        alpha: share of the probability in t; the source takes 0.25.
        cost_weights: of the matching cost, when called by itself.
    """

    def __init__(
        self,
        assigner: Assigner,
        tau: float = 1.5,
        alpha: float = 0.25,
        *,
        cost_weights: CostWeights | None = None,
    ) -> None:
        if tau <= 0:
            raise ValueError(f"tau: expected a positive number, found {tau}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], found {alpha}")
        self.assigner, self.tau, self.alpha = assigner, tau, alpha
        self.cost_weights = cost_weights or CostWeights()

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """(B, n, C) logits, (B, n, 4) cxcywh in [0, 1], B targets -> pairs of every image, with weights."""
        return solve_batch(self, pred_logits, pred_boxes, targets, self.cost_weights)

    def solve(self, image: Matchables) -> Pairs:
        """Pairs of one image of one layer, with weights."""
        pairs = self.assigner.solve(image)
        queries, boxes = pairs.query_indices.numpy(), pairs.target_indices.numpy()
        probability, iou = image.class_confidence[queries, boxes], image.iou[queries, boxes]
        quality = probability**self.alpha * iou ** (1 - self.alpha)  # (P,)
        weights = np.exp(-ranks_within(boxes, quality) / self.tau)
        return replace(pairs, weights=torch.from_numpy(weights))


def ranks_within(groups: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Rank of each entry among those of its group, 0 for the largest score; of equal ones the first is first.

    (P,) int64 groups, (P,) scores -> (P,) int64.
    """
    order = np.lexsort((-scores, groups))  # group by group, in each from the best
    sorted_groups = groups[order]
    starts = np.searchsorted(sorted_groups, sorted_groups)  # where the group of each begins
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - starts
    return ranks
