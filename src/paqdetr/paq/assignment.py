"""Which queries learn from which box: one-to-one, PaQ's quality-aware one-to-many assignment, and the rules it is compared with.

The rules share their steps, which work on numpy arrays of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from paqdetr.paq.costs import CostWeights, MatchingCosts, matching_costs, require_predictions
from paqdetr.structures import Targets
from paqdetr.values import is_whole

# A sum of IoUs that is 2 but for the rounding of float32 is 2, whichever way it is rounded.
_ROUNDING = 1e-6


def linear_sum_assignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scipy's, imported at the first call: it takes 0.3 seconds."""
    from scipy.optimize import linear_sum_assignment as solve

    return solve(cost)


def ceil_of_best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Sum of the `top_k` largest scores of each box, rounded up."""
    return np.ceil(_best(scores, top_k).sum(axis=0) - _ROUNDING).astype(np.int64)


def floor_of_best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """The same, rounded down."""
    return np.floor(_best(scores, top_k).sum(axis=0) + _ROUNDING).astype(np.int64)


def limit_positives(wanted: np.ndarray, scores: np.ndarray, *, least: int, most: int) -> np.ndarray:
    """Numbers of positives held within [least, most] and n, and lowered until they sum to at most max(G, n // 2).

    The r-th positive of a box stands for its r-th best query. Those of the lowest scores go first, though never a box's last one.
    """
    num_queries, num_boxes = scores.shape
    num_positives = np.minimum(np.clip(wanted, least, most), num_queries)
    surplus = int(num_positives.sum()) - max(num_boxes, num_queries // 2)
    if num_boxes == 0 or surplus <= 0:
        return num_positives
    best = _best(scores, most)
    ranks, boxes = np.nonzero(np.arange(1, len(best))[:, None] < num_positives[None, :])
    weakest = np.lexsort((boxes, -ranks, best[ranks + 1, boxes]))[:surplus]
    return num_positives - np.bincount(boxes[weakest], minlength=num_boxes)


def select_by_hungarian(cost: np.ndarray, num_positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way to give every box its number of positives: column j repeated num_positives[j] times, solved once.

    Returns:
        query and box of each pair; no query twice.
    """
    columns = np.repeat(np.arange(len(num_positives)), num_positives)
    rows, chosen = linear_sum_assignment(cost[:, columns])
    return rows, columns[chosen]


def select_by_score(scores: np.ndarray, num_positives: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The num_positives[j] best queries of each box; one that two boxes want goes to the larger score.

    A box left empty gets a free query, by a Hungarian match of the cost. There are always enough of these if the numbers are
    those of `limit_positives` and n >= G. Either n // 2 >= G: at most n // 2 queries are taken, so at least n // 2 >= G are free.
    Or n // 2 < G: the numbers sum to G, so each box wants one query and holds at most one; with e boxes empty,
    n - (G - e) >= e are free.

    Returns:
        query and box of each pair; no query twice, no box without one.
    """
    num_queries, num_boxes = scores.shape
    owner = np.full(num_queries, -1)
    queries, boxes = _best_queries(scores, num_positives)
    order = np.lexsort((boxes, -scores[queries, boxes], queries))  # of each query the best score first
    queries, boxes = queries[order], boxes[order]
    first = np.ones(len(queries), dtype=bool)
    first[1:] = queries[1:] != queries[:-1]
    owner[queries[first]] = boxes[first]
    empty = np.setdiff1d(np.arange(num_boxes), owner)
    free = np.nonzero(owner < 0)[0]
    rows, columns = linear_sum_assignment(cost[np.ix_(free, empty)])
    owner[free[rows]] = empty[columns]
    rows = np.nonzero(owner >= 0)[0]
    return rows, owner[rows]


def without_weak_extras(
    rows: np.ndarray, columns: np.ndarray, *, cost: np.ndarray, iou: np.ndarray, min_iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of an IoU below `min_iou` go, except for the cheapest pair of each box.

    Args:
        rows, columns: query and box of each pair.

    Returns:
        query and box of the pairs that stay.
    """
    order = np.lexsort((cost[rows, columns], columns))  # box by box, the cheapest first
    rows, columns = rows[order], columns[order]
    stays = iou[rows, columns] >= min_iou
    stays[np.searchsorted(columns, np.unique(columns))] = True
    return rows[stays], columns[stays]


def _best_queries(scores: np.ndarray, num_positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Query and box of each box's num_positives[j] best queries; of equal scores the first ones."""
    num_queries, num_boxes = scores.shape
    most = int(num_positives.max(initial=0))
    if most == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    # Whatever is as good as the `most`-th best of its box: a superset, larger only where scores are equal.
    least = np.partition(scores, num_queries - most, axis=0)[num_queries - most]
    boxes, queries = np.nonzero((scores >= least).T)
    order = np.lexsort((queries, -scores[queries, boxes], boxes))
    boxes, queries = boxes[order], queries[order]
    starts = np.searchsorted(boxes, np.arange(num_boxes))
    chosen = np.arange(len(boxes)) - starts[boxes] < num_positives[boxes]
    return queries[chosen], boxes[chosen]


def _best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """(min(top_k, n), G), descending."""
    rest = max(len(scores) - top_k, 0)
    best = np.partition(scores, rest, axis=0)[rest:] if 0 < rest < len(scores) else scores
    return -np.sort(-best, axis=0)[:top_k]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Matches of one image: query_indices[p] learns box target_indices[p].

    Attributes:
        query_indices: (P,) int64, ascending, no query twice.
        target_indices: (P,) int64.
        weights: (P,) float64 in [0, 1], how much of a positive each pair is; None if all are whole ones.
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
        num_positives: (G,) int64, k_j; with more boxes than queries 1 or 0, by the one-to-one match.
    """

    scores: np.ndarray
    confidence: np.ndarray
    num_positives: np.ndarray


class Assigner(Protocol):
    """What every assignment rule offers."""

    def solve(self, image: MatchingCosts) -> Pairs:
        """Pairs of one image of one layer."""
        ...


class _Rule(Assigner):
    """A rule that can be called by itself.

    Args:
        cost_weights: of the matching cost; the DETR family's by default.
    """

    def __init__(self, *, cost_weights: CostWeights | None = None) -> None:
        self.cost_weights = cost_weights or CostWeights()

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """Pairs of every image.

        Args:
            pred_logits: (B, n, C) float.
            pred_boxes: (B, n, 4) cxcywh in [0, 1].
            targets: B of them.

        Raises:
            ValueError: predictions of another shape, or targets that are not what `Targets` says.
            NonFiniteError: a prediction is NaN or infinite.
        """
        return [self.solve(image) for image in self._costs(pred_logits, pred_boxes, targets)]

    def _costs(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[MatchingCosts]:
        """Of every image; shapes as in the call."""
        require_predictions(pred_logits, pred_boxes, "B", "n")
        return matching_costs(pred_logits[None], pred_boxes[None], targets, weights=self.cost_weights)[0]


def _require_whole(**counts: object) -> None:
    """Raise ValueError unless all are whole numbers."""
    for name, count in counts.items():
        if not is_whole(count):
            raise ValueError(f"{name}: expected a whole number, found {count!r}")


class OneToOneAssigner(_Rule):
    """The Hungarian match of DETR: min(n, G) distinct pairs of least total cost."""

    def solve(self, image: MatchingCosts) -> Pairs:
        return to_pairs(*linear_sum_assignment(image.cost))


class QualityAwareAssigner(_Rule):
    """PaQ's one-to-many assignment: every box gets as many queries as its good predictions deserve.

    Source: PaQ-DETR (arXiv 2603.06917). With s_ij = IoU_ij - gamma * c_i, box j gets
    k_j = max(ceil(sum of its top_k largest s_ij), min_positives), at most top_k. If the k_j sum to more than
    max(G, n // 2), those of least s are left out, though never a box's last one.

    Args:
        gamma: weight of confidence: the surer a query already is, the less it needs another box.
        top_k: how many of the best s are summed, and the most positives a box may get.
        min_positives: the fewest positives a box gets, where queries suffice.
        select: "hungarian" repeats column j of the cost k_j times and solves once; "score" takes the k_j best s, a
            query that two boxes want going to the larger s.
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
        _require_whole(top_k=top_k, min_positives=min_positives)
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
        super().__init__(cost_weights=cost_weights)
        self.gamma, self.top_k, self.min_positives, self.min_iou = gamma, top_k, min_positives, min_iou
        self.select, self.confidence = select, confidence

    def num_positives(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Tensor]:
        """k_j of every box, how many queries it is to get: B tensors (G,) int64. Shapes as in the call.

        In an image with more boxes than queries, whose match is one-to-one, it is 1 for boxes of that match and 0 for the others.
        """
        rows = self._costs(pred_logits, pred_boxes, targets)
        return [torch.from_numpy(self.qualities(image).num_positives) for image in rows]

    def solve(self, image: MatchingCosts) -> Pairs:
        num_queries, num_boxes = image.cost.shape
        if num_boxes == 0 or num_boxes > num_queries:
            return to_pairs(*linear_sum_assignment(image.cost))
        scores = self._scores(image)
        num_positives = self._num_positives(scores)
        if self.select == "hungarian":
            rows, columns = select_by_hungarian(image.cost, num_positives)
        else:
            rows, columns = select_by_score(scores, num_positives, image.cost)
        if self.min_iou > 0:
            rows, columns = without_weak_extras(rows, columns, cost=image.cost, iou=image.iou, min_iou=self.min_iou)
        return to_pairs(rows, columns)

    def qualities(self, image: MatchingCosts) -> Qualities:
        """What the rule goes by in one image of one layer, for those who want to show it."""
        scores = self._scores(image)
        num_queries, num_boxes = scores.shape
        if num_boxes > num_queries:
            num_positives = np.bincount(linear_sum_assignment(image.cost)[1], minlength=num_boxes)
        else:
            num_positives = self._num_positives(scores)
        return Qualities(scores=scores, confidence=self._confident(image), num_positives=num_positives)

    def _scores(self, image: MatchingCosts) -> np.ndarray:
        """s_ij, (n, G)."""
        return image.iou - self.gamma * self._confident(image)

    def _confident(self, image: MatchingCosts) -> np.ndarray:
        """c, (n, G)."""
        if self.confidence == "gt_class":
            return image.class_confidence
        return np.broadcast_to(image.max_confidence[:, None], image.iou.shape)

    def _num_positives(self, scores: np.ndarray) -> np.ndarray:
        """k_j, (G,) int64."""
        wanted = ceil_of_best(scores, self.top_k)
        return limit_positives(wanted, scores, least=self.min_positives, most=self.top_k)


def match_layers(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    targets: Sequence[Targets],
    assigners: Sequence[Assigner],
    *,
    weights: CostWeights | None = None,
    names: Sequence[str] | None = None,
    counted: Tensor | None = None,
) -> list[list[Pairs]]:
    """Pairs of every layer and image, each layer by its own assigner, with one transfer to the host, two with `counted`.

    Shapes as in `matching_costs`; `assigners` has K entries; `counted` is (K, B, n) bool, the queries that take part (None: all).
    Returns Pairs on the CPU, a list of images for each layer.

    Raises:
        ValueError: another number of assigners than layers, `counted` of another shape, or as `matching_costs` does.
        NonFiniteError: as `matching_costs` does.
    """
    rows = matching_costs(pred_logits, pred_boxes, targets, weights=weights, names=names)
    if len(assigners) != len(rows):
        raise ValueError(f"assigners: expected one for each of {len(rows)} layers, found {len(assigners)}")
    if counted is None:
        return [[assigner.solve(image) for image in row] for assigner, row in zip(assigners, rows, strict=True)]
    if counted.shape != pred_logits.shape[:-1]:
        raise ValueError(f"counted: expected {tuple(pred_logits.shape[:-1])}, found {tuple(counted.shape)}")
    taking_part = counted.cpu().numpy()
    return [
        [_solve_among(assigner, image, taking_part[layer, i]) for i, image in enumerate(row)]
        for layer, (assigner, row) in enumerate(zip(assigners, rows, strict=True))
    ]


def _solve_among(assigner: Assigner, image: MatchingCosts, counted: np.ndarray) -> Pairs:
    """Pairs of the queries that are marked in (n,), as if there were no others."""
    queries = np.flatnonzero(counted)
    pairs = assigner.solve(image.only(queries))
    return replace(pairs, query_indices=torch.from_numpy(queries)[pairs.query_indices])


def to_pairs(rows: np.ndarray, columns: np.ndarray) -> Pairs:
    """Queries (P,) and boxes (P,) in any order -> pairs in the order of their queries."""
    order = np.argsort(rows, kind="stable")
    return Pairs(torch.from_numpy(rows[order].astype(np.int64)), torch.from_numpy(columns[order].astype(np.int64)))


class FixedKAssigner(_Rule):
    """The same number of queries for every box: each box repeated k times, matched once.

    Source: the one-to-many branch of H-DETR (arXiv 2207.13080), without its own queries. Where k * G exceeds n // 2, positives go
    by the rule of all assigners, `limit_positives`, the costliest first.

    Args:
        k: positives of a box.
        cost_weights: of the matching cost.
    """

    def __init__(self, k: int = 4, *, cost_weights: CostWeights | None = None) -> None:
        _require_whole(k=k)
        if k < 1:
            raise ValueError(f"k: expected at least 1, found {k}")
        super().__init__(cost_weights=cost_weights)
        self.k = k

    def solve(self, image: MatchingCosts) -> Pairs:
        num_queries, num_boxes = image.cost.shape
        if num_boxes == 0 or num_boxes > num_queries:
            return to_pairs(*linear_sum_assignment(image.cost))
        num_positives = limit_positives(np.full(num_boxes, self.k), -image.cost, least=1, most=self.k)
        return to_pairs(*select_by_hungarian(image.cost, num_positives))


class AlignedAssigner(_Rule):
    """The same number of queries for every box, matched once, each a positive by how well it fits in class and place.

    Source: the auxiliary loss of DDQ (arXiv 2303.12776), after TOOD (arXiv 2108.07755). With a_ij = p_i^alpha * IoU_ij^beta, of
    the probability of the box's class, the weight of a pair is a_ij over the largest a of its box's pairs, times the largest IoU
    of these. Where k * G exceeds n, k is lowered for all boxes alike.

    Args:
        k: positives of a box.
        alpha: exponent of the probability.
        beta: exponent of the IoU.
        cost_weights: of the matching cost.
    """

    def __init__(
        self, k: int = 4, alpha: float = 1.0, beta: float = 6.0, *, cost_weights: CostWeights | None = None
    ) -> None:
        _require_whole(k=k)
        if k < 1:
            raise ValueError(f"k: expected at least 1, found {k}")
        super().__init__(cost_weights=cost_weights)
        self.k, self.alpha, self.beta = k, alpha, beta

    def solve(self, image: MatchingCosts) -> Pairs:
        num_queries, num_boxes = image.cost.shape
        k = max(min(self.k, num_queries // max(num_boxes, 1)), 1)
        rows, columns = select_by_hungarian(image.cost, np.full(num_boxes, k))
        iou = image.iou[rows, columns]
        alignment = image.class_confidence[rows, columns] ** self.alpha * iou**self.beta
        best, best_iou = np.zeros(num_boxes), np.zeros(num_boxes)
        np.maximum.at(best, columns, alignment)
        np.maximum.at(best_iou, columns, iou)
        weights = alignment / (best[columns] + 1e-7) * best_iou[columns]
        return replace(to_pairs(rows, columns), weights=torch.from_numpy(weights[np.argsort(rows, kind="stable")]))


class SimOTAAssigner(_Rule):
    """As many queries as the box has good predictions: k_j = max(floor(sum of its top_k largest IoU), min_positives).

    Source: YOLOX (arXiv 2107.08430), section 2.1, without its prior on centres. It differs from the quality-aware rule in that
    confidence is not subtracted and that the sum is rounded down.

    Args:
        top_k: how many of the largest IoU are summed, and the most positives a box may get.
        min_positives: the fewest positives a box gets, where queries suffice.
        select: "cost", the k_j queries of least cost, one that two boxes want going to the cheaper (the original's); or
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
        _require_whole(top_k=top_k, min_positives=min_positives)
        if not 1 <= min_positives <= top_k:
            raise ValueError(f"expected 1 <= min_positives <= top_k, found {min_positives} and {top_k}")
        if select not in ("cost", "hungarian"):
            raise ValueError(f"select: expected 'cost' or 'hungarian', found {select!r}")
        super().__init__(cost_weights=cost_weights)
        self.top_k, self.min_positives, self.select = top_k, min_positives, select

    def solve(self, image: MatchingCosts) -> Pairs:
        num_queries, num_boxes = image.cost.shape
        if num_boxes == 0 or num_boxes > num_queries:
            return to_pairs(*linear_sum_assignment(image.cost))
        wanted = floor_of_best(image.iou, self.top_k)
        num_positives = limit_positives(wanted, image.iou, least=self.min_positives, most=self.top_k)
        if self.select == "hungarian":
            return to_pairs(*select_by_hungarian(image.cost, num_positives))
        return to_pairs(*select_by_score(-image.cost, num_positives, image.cost))


# By the names that settings give them; a rule takes each of its arguments from the setting of that name.
ASSIGNERS: dict[str, Callable[[Any, CostWeights], Assigner]] = {
    "one_to_one": lambda settings, weights: OneToOneAssigner(cost_weights=weights),
    "quality_aware": lambda settings, weights: settings.build(QualityAwareAssigner, cost_weights=weights),
    "fixed_k": lambda settings, weights: FixedKAssigner(settings.top_k, cost_weights=weights),
    "simota": lambda settings, weights: settings.build(
        SimOTAAssigner, select="cost" if settings.select == "score" else settings.select, cost_weights=weights
    ),
}
