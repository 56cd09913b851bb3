"""One-to-many rules that PaQ's is compared with: a fixed number of queries a box, and SimOTA's dynamic number.

Both obey the limits of the quality-aware rule (claims sum to at most max(G, n // 2); with more boxes than queries the match is
one-to-one), so that a comparison differs in the rule alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from paqdetr.paq.assignment import Pairs, solve_batch, to_pairs
from paqdetr.paq.costs import CostWeights, Matchables
from paqdetr.paq.selection import floor_of_best, limit_claims, select_by_hungarian, select_by_score
from paqdetr.structures import Targets


class FixedKAssigner:
    """The same number of queries for every box: each box repeated k times, matched once.

    Source: the one-to-many branch of H-DETR (arXiv 2207.13080), without its own queries. Where k * G exceeds n // 2, k is
    lowered for all boxes alike.

    Args:
        k: positives of a box.
        cost_weights: of the matching cost.
    """

    def __init__(self, k: int = 4, *, cost_weights: CostWeights | None = None) -> None:
        if k < 1:
            raise ValueError(f"k: expected at least 1, found {k}")
        self.k = k
        self.cost_weights = cost_weights or CostWeights()

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """(B, n, C) logits, (B, n, 4) cxcywh in [0, 1], B targets -> pairs of every image."""
        return solve_batch(self, pred_logits, pred_boxes, targets, self.cost_weights)

    def solve(self, image: Matchables) -> Pairs:
        """Pairs of one image of one layer."""
        num_queries, num_boxes = image.cost.shape
        if num_boxes == 0 or num_boxes > num_queries:
            return to_pairs(*linear_sum_assignment(image.cost))
        k = max(min(self.k, num_queries // 2 // num_boxes), 1)
        return to_pairs(*select_by_hungarian(image.cost, np.full(num_boxes, k)))


class SimOTAAssigner:
    """As many queries as the box has good predictions: k_j = max(floor(sum of its top_k largest IoU), min_positives).

    Source: YOLOX (arXiv 2107.08430), section 2.1, without its prior on centres. It differs from the quality-aware rule in that
    confidence is not subtracted and that the sum is rounded down.

    Args:
        top_k: how many of the largest IoU are summed, and the most positives a box may get.
        min_positives: the fewest positives a box gets, where queries suffice.
        select: "cost", the k_j queries of least cost, one that two boxes claim going to the cheaper (the original's); or
            "hungarian", as in `QualityAwareAssigner`.
        cost_weights: of the matching cost.
    """

    def __init__(
        self,
        top_k: int = 10,
        min_positives: int = 1,
        select: Literal["cost", "hungarian"] = "cost",
        *,
        cost_weights: CostWeights | None = None,
    ) -> None:
        if not 1 <= min_positives <= top_k:
            raise ValueError(f"expected 1 <= min_positives <= top_k, found {min_positives} and {top_k}")
        if select not in ("cost", "hungarian"):
            raise ValueError(f"select: expected 'cost' or 'hungarian', found {select!r}")
        self.top_k = top_k
        self.min_positives = min_positives
        self.select = select
        self.cost_weights = cost_weights or CostWeights()

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """(B, n, C) logits, (B, n, 4) cxcywh in [0, 1], B targets -> pairs of every image."""
        return solve_batch(self, pred_logits, pred_boxes, targets, self.cost_weights)

    def solve(self, image: Matchables) -> Pairs:
        """Pairs of one image of one layer."""
        num_queries, num_boxes = image.cost.shape
        if num_boxes == 0 or num_boxes > num_queries:
            return to_pairs(*linear_sum_assignment(image.cost))
        wanted = floor_of_best(image.iou, self.top_k)
        claims = limit_claims(wanted, image.iou, least=self.min_positives, most=self.top_k)
        if self.select == "hungarian":
            return to_pairs(*select_by_hungarian(image.cost, claims))
        return to_pairs(*select_by_score(-image.cost, claims, image.cost))
