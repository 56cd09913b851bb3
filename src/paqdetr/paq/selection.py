"""How many queries a box gets, and which: the steps that assignment rules share, on numpy arrays of one image.

Throughout, n is the number of queries and G of boxes; scores and costs are (n, G), claims (G,) int64.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

# A sum of IoUs that is 2 but for the rounding of float32 is 2, whichever way it is rounded.
_ROUNDING = 1e-6


def ceil_of_best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Sum of the `top_k` largest scores of each box, rounded up."""
    return np.ceil(_best(scores, top_k).sum(axis=0) - _ROUNDING).astype(np.int64)


def floor_of_best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """The same, rounded down."""
    return np.floor(_best(scores, top_k).sum(axis=0) + _ROUNDING).astype(np.int64)


def limit_claims(wanted: np.ndarray, scores: np.ndarray, *, least: int, most: int) -> np.ndarray:
    """Claims held within [least, most] and n, and lowered until they sum to at most max(G, n // 2).

    Claims are withdrawn by ascending score, though never a box's last one: the r-th claim of a box stands for its r-th best
    query.
    """
    num_queries, num_boxes = scores.shape
    claims = np.minimum(np.clip(wanted, least, most), num_queries)
    surplus = int(claims.sum()) - max(num_boxes, num_queries // 2)
    if num_boxes == 0 or surplus <= 0:
        return claims
    best = _best(scores, most)
    ranks, boxes = np.nonzero(np.arange(1, len(best))[:, None] < claims[None, :])
    weakest = np.lexsort((boxes, -ranks, best[ranks + 1, boxes]))[:surplus]
    return claims - np.bincount(boxes[weakest], minlength=num_boxes)


def select_by_hungarian(cost: np.ndarray, claims: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way to give every box as many queries as it claims: column j repeated claims[j] times, solved once.

    Returns:
        query and box of each pair; no query twice.
    """
    columns = np.repeat(np.arange(len(claims)), claims)
    rows, chosen = linear_sum_assignment(cost[:, columns])
    return rows, columns[chosen]


def select_by_score(
    scores: np.ndarray, claims: np.ndarray, cost: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The claims[j] best queries of each box; one that two boxes claim goes to the larger score.

    A box left empty gets a query that nobody claimed, by a Hungarian match of the cost. There are always enough of these if the
    claims are those of `limit_claims` and n >= G. Either n // 2 >= G: at most n // 2 queries are claimed, so at least
    n // 2 >= G are free. Or n // 2 < G: the claims sum to G, so each box claims one query and holds at most one; with e boxes
    empty, n - (G - e) >= e are free.

    Returns:
        query and box of each pair; no query twice, no box without one.
    """
    num_queries, num_boxes = scores.shape
    owner = np.full(num_queries, -1)
    queries, boxes = _claimed(scores, claims)
    order = np.lexsort((boxes, -scores[queries, boxes], queries))  # of each query the best claim first
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


def _claimed(scores: np.ndarray, claims: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Query and box of each box's claims[j] best queries; of equal scores the first ones."""
    num_queries, num_boxes = scores.shape
    most = int(claims.max(initial=0))
    if most == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    # Whatever is as good as the `most`-th best of its box: a superset, larger only where scores are equal.
    least = np.partition(scores, num_queries - most, axis=0)[num_queries - most]
    boxes, queries = np.nonzero((scores >= least).T)
    order = np.lexsort((queries, -scores[queries, boxes], boxes))
    boxes, queries = boxes[order], queries[order]
    starts = np.searchsorted(boxes, np.arange(num_boxes))
    chosen = np.arange(len(boxes)) - starts[boxes] < claims[boxes]
    return queries[chosen], boxes[chosen]


def _best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """(min(top_k, n), G), descending."""
    rest = max(len(scores) - top_k, 0)
    best = np.partition(scores, rest, axis=0)[rest:] if 0 < rest < len(scores) else scores
    return -np.sort(-best, axis=0)[:top_k]
