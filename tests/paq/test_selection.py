"""Selections without sorting everything: equal to the plain loops, ties included."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from paqdetr.paq.assignment import ceil_of_best, limit_positives, select_by_score, without_weak_extras


def plain_select(scores: np.ndarray, claims: np.ndarray, cost: np.ndarray) -> dict[int, int]:
    """Query -> box, claim by claim."""
    owner: dict[int, int] = {}
    for box in range(scores.shape[1]):
        for query in sorted(range(len(scores)), key=lambda q: -scores[q, box])[: claims[box]]:
            if query not in owner or scores[query, box] > scores[query, owner[query]]:
                owner[query] = box
    empty = [box for box in range(scores.shape[1]) if box not in owner.values()]
    free = [query for query in range(len(scores)) if query not in owner]
    rows, columns = linear_sum_assignment(cost[np.ix_(free, empty)])
    return owner | {free[row]: empty[column] for row, column in zip(rows, columns, strict=True)}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([2, 10**6]))
def test_the_best_are_those_of_a_full_sort(n: int, boxes: int, top_k: int, seed: int, values: int) -> None:
    """With two values nearly all scores are tied."""
    rng = np.random.default_rng(seed)
    boxes = min(boxes, n)
    scores, cost = rng.integers(0, values, (n, boxes)) / values, rng.normal(size=(n, boxes))
    best = np.sort(scores, axis=0)[::-1][:top_k].sum(axis=0)
    assert ceil_of_best(scores, top_k).tolist() == np.ceil(best - 1e-6).tolist()
    claims = limit_positives(rng.integers(0, 9, boxes), scores, least=1, most=top_k)
    queries, chosen = select_by_score(scores, claims, cost)
    assert dict(zip(queries.tolist(), chosen.tolist(), strict=True)) == plain_select(scores, claims, cost)


def test_the_cheapest_pair_of_a_box_stays_whatever_its_iou() -> None:
    rows, columns = np.array([0, 1, 2, 3, 4, 5]), np.array([1, 0, 1, 0, 1, 2])
    cost, iou = np.zeros((6, 3)), np.zeros((6, 3))
    cost[rows, columns] = [3, 5, 1, 4, 2, 9]
    iou[rows, columns] = [0.9, 0.5, 0.1, 0.2, 0.4, 0.0]

    def kept(min_iou: float) -> set[tuple[int, int]]:
        found = without_weak_extras(rows, columns, cost=cost, iou=iou, min_iou=min_iou)
        return set(zip(*(side.tolist() for side in found), strict=True))

    # Cheapest: 3 of box 0, 2 of box 1, 5 of box 2. Of the others 0 has an IoU of .9, 1 of .5, 4 of .4.
    assert kept(0.4) == {(3, 0), (2, 1), (5, 2), (0, 1), (1, 0), (4, 1)}
    assert kept(0.5) == {(3, 0), (2, 1), (5, 2), (0, 1), (1, 0)}
    assert kept(0.95) == {(3, 0), (2, 1), (5, 2)}
    nothing = without_weak_extras(rows[:0], columns[:0], cost=cost, iou=iou, min_iou=0.5)
    assert [len(side) for side in nothing] == [0, 0]
