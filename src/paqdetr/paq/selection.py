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
    order = np.argsort(-scores, axis=0, kind="stable")
    owner = np.full(num_queries, -1)
    for box in range(num_boxes):
        for query in order[: claims[box], box]:
            if owner[query] < 0 or scores[query, box] > scores[query, owner[query]]:
                owner[query] = box
    empty = np.setdiff1d(np.arange(num_boxes), owner)
    free = np.nonzero(owner < 0)[0]
    rows, columns = linear_sum_assignment(cost[np.ix_(free, empty)])
    owner[free[rows]] = empty[columns]
    rows = np.nonzero(owner >= 0)[0]
    return rows, owner[rows]


def _best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """(min(top_k, n), G), descending."""
    return -np.sort(-scores, axis=0)[:top_k]
