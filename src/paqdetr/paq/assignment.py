"""Who learns from which box: one-to-one, and PaQ's quality-aware one-to-many.

An assigner solves one image of one layer. `match_layers` feeds it all of a step; calling it directly serves one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from paqdetr.paq.costs import CostWeights, Matchables, matchables
from paqdetr.paq.selection import (
    ceil_of_best,
    limit_claims,
    select_by_hungarian,
    select_by_score,
    without_weak_extras,
)
from paqdetr.structures import Targets


@dataclass(frozen=True, slots=True)
class Pairs:
    """Matches of one image: query_indices[p] learns box target_indices[p].

    Attributes:
        query_indices: (P,) int64, ascending, no query twice.
        target_indices: (P,) int64.
        weights: (P,) float64 in (0, 1], how much of a positive each pair is; None if all are whole ones.
    """

    query_indices: Tensor
    target_indices: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.query_indices.shape[0]


@dataclass(frozen=True, slots=True)
class Qualities:
    """What PaQ's assignment goes by.

    Attributes:
        scores: (n, G) float64, s_ij = IoU_ij - gamma * c_ij.
        confidence: (n, G) float64 in [0, 1], c_ij.
        claims: (G,) int64, k_j; with more boxes than queries 1 or 0, by the one-to-one match.
    """

    scores: np.ndarray
    confidence: np.ndarray
    claims: np.ndarray


class Assigner(Protocol):
    """What every assignment rule offers."""

    def solve(self, image: Matchables) -> Pairs:
        """Pairs of one image of one layer."""
        ...


class OneToOneAssigner:
    """The Hungarian match of DETR: min(n, G) distinct pairs of least total cost."""

    def __init__(self, *, cost_weights: CostWeights | None = None) -> None:
        self.cost_weights = cost_weights or CostWeights()

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """(B, n, C) logits, (B, n, 4) cxcywh in [0, 1], B targets -> pairs of every image."""
        return solve_batch(self, pred_logits, pred_boxes, targets, self.cost_weights)

    def solve(self, image: Matchables) -> Pairs:
        """Pairs of one image of one layer."""
        return to_pairs(*linear_sum_assignment(image.cost))


class QualityAwareAssigner:
    """PaQ's one-to-many assignment: every box gets as many queries as its good predictions deserve.

    Source: PaQ-DETR (arXiv 2603.06917). With s_ij = IoU_ij - gamma * c_i, box j gets
    k_j = max(ceil(sum of its top_k largest s_ij), min_positives), at most top_k. If the k_j sum to more than
    max(G, n // 2), the claims of least s are withdrawn, though never a box's last one.

    Args:
        gamma: weight of confidence: the surer a query already is, the less it needs another box.
        top_k: how many of the best s are summed, and the most positives a box may get.
        min_positives: the fewest positives a box gets, where queries suffice.
        select: "hungarian" repeats column j of the cost k_j times and solves once; "score" takes the k_j best s, a
            query that two boxes claim going to the larger s.
        confidence: "gt_class", the probability of the box's class; "max", of the likeliest.
        cost_weights: of the matching cost.
        min_iou: positives of a box beyond its cheapest one need at least this IoU; otherwise the box gets fewer than k_j, or than
            `min_positives`. 0 asks for nothing. Ours.
    """

    def __init__(
        self,
        gamma: float = 0.4,
        top_k: int = 4,
        min_positives: int = 1,
        select: Literal["hungarian", "score"] = "hungarian",
        confidence: Literal["gt_class", "max"] = "gt_class",
        *,
        cost_weights: CostWeights | None = None,
        min_iou: float = 0.0,
    ) -> None:
        if not 1 <= min_positives <= top_k:
            raise ValueError(f"expected 1 <= min_positives <= top_k, found {min_positives} and {top_k}")
        if select not in ("hungarian", "score"):
            raise ValueError(f"select: expected 'hungarian' or 'score', found {select!r}")
        if confidence not in ("gt_class", "max"):
            raise ValueError(f"confidence: expected 'gt_class' or 'max', found {confidence!r}")
        if not math.isfinite(gamma):
            raise ValueError(f"gamma: expected a finite number, found {gamma}")
        if not 0 <= min_iou <= 1:
            raise ValueError(f"min_iou: expected a number in [0, 1], found {min_iou}")
        self.gamma = gamma
        self.min_iou = min_iou
        self.top_k = top_k
        self.min_positives = min_positives
        self.select = select
        self.confidence = confidence
        self.cost_weights = cost_weights or CostWeights()

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """Pairs of every image.

        Args:
            pred_logits: (B, n, C) float.
            pred_boxes: (B, n, 4) cxcywh in [0, 1].
            targets: B of them.

        Raises:
            NonFiniteError: a prediction is NaN or infinite.
        """
        return solve_batch(self, pred_logits, pred_boxes, targets, self.cost_weights)

    def num_positives(
        self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]
    ) -> list[Tensor]:
        """k_j of every box, how many queries it is to get: B tensors (G,) int64. Shapes as in the call.

        In an image with more boxes than queries, whose match is one-to-one, it is 1 for boxes of that match and 0 for the others.
        """
        rows = matchables(pred_logits[None], pred_boxes[None], targets, weights=self.cost_weights)[0]
        return [torch.from_numpy(self.qualities(image).claims) for image in rows]

    def solve(self, image: Matchables) -> Pairs:
        """Pairs of one image of one layer."""
        num_queries, num_boxes = image.cost.shape
        if num_boxes == 0 or num_boxes > num_queries:
            return to_pairs(*linear_sum_assignment(image.cost))
        scores = self._scores(image)
        claims = self._claims(scores)
        if self.select == "hungarian":
            rows, columns = select_by_hungarian(image.cost, claims)
        else:
            rows, columns = select_by_score(scores, claims, image.cost)
        if self.min_iou > 0:
            rows, columns = without_weak_extras(
                rows, columns, cost=image.cost, iou=image.iou, min_iou=self.min_iou
            )
        return to_pairs(rows, columns)

    def qualities(self, image: Matchables) -> Qualities:
        """What the rule goes by in one image of one layer, for those who want to show it."""
        scores = self._scores(image)
        num_queries, num_boxes = scores.shape
        if num_boxes > num_queries:
            claims = np.bincount(linear_sum_assignment(image.cost)[1], minlength=num_boxes)
        else:
            claims = self._claims(scores)
        return Qualities(scores=scores, confidence=self._confident(image), claims=claims)

    def _scores(self, image: Matchables) -> np.ndarray:
        """s_ij, (n, G)."""
        return image.iou - self.gamma * self._confident(image)

    def _confident(self, image: Matchables) -> np.ndarray:
        """c, (n, G)."""
        if self.confidence == "gt_class":
            return image.class_confidence
        return np.broadcast_to(image.max_confidence[:, None], image.iou.shape)

    def _claims(self, scores: np.ndarray) -> np.ndarray:
        """k_j, (G,) int64."""
        wanted = ceil_of_best(scores, self.top_k)
        return limit_claims(wanted, scores, least=self.min_positives, most=self.top_k)


def match_layers(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    targets: Sequence[Targets],
    assigners: Sequence[Assigner],
    *,
    weights: CostWeights | None = None,
    names: Sequence[str] | None = None,
) -> list[list[Pairs]]:
    """Pairs of every layer and image, each layer by its own assigner, with one transfer to the host.

    Shapes as in `matchables`; `assigners` has K entries. Returns [layer][image] -> Pairs on the CPU.
    """
    rows = matchables(pred_logits, pred_boxes, targets, weights=weights, names=names)
    return [[assigner.solve(image) for image in row] for assigner, row in zip(assigners, rows, strict=True)]


def solve_batch(
    assigner: Assigner,
    pred_logits: Tensor,
    pred_boxes: Tensor,
    targets: Sequence[Targets],
    weights: CostWeights,
) -> list[Pairs]:
    """Pairs of every image of one layer: what calling an assigner means. Shapes as in `QualityAwareAssigner.__call__`."""
    rows = matchables(pred_logits[None], pred_boxes[None], targets, weights=weights)[0]
    return [assigner.solve(image) for image in rows]


def to_pairs(rows: np.ndarray, columns: np.ndarray) -> Pairs:
    """Queries (P,) and boxes (P,) in any order -> pairs in the order of their queries."""
    order = np.argsort(rows, kind="stable")
    return Pairs(
        torch.from_numpy(rows[order].astype(np.int64)), torch.from_numpy(columns[order].astype(np.int64))
    )
