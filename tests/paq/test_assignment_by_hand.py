"""The assigners' rules by hand: how many positives a box gets, and which queries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from plain import as_set, counts, image_of, solve

from paqdetr.paq import OneToOneAssigner, QualityAwareAssigner
from paqdetr.structures import Targets

# --- k_j by hand


def of_iou(iou: float) -> list[float]:
    """A box inside [.4, .6]^2, of full height."""
    return [0.5, 0.5, 0.2 * iou, 0.2]


TARGET = Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
FAR = [0.05, 0.05, 0.1, 0.1]


def k_of(boxes: list[list[float]], probability: float = 1e-6, **rule: Any) -> int:
    logit = math.log(probability / (1 - probability))
    logits = torch.full((len(boxes), 3), logit)
    (k,) = counts(QualityAwareAssigner(**rule), logits, torch.tensor(boxes), TARGET)
    return k


@pytest.mark.parametrize(
    ("ious", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 1),  # at least l
        ([0.9, 0.0, 0.0, 0.0], 1),
        ([0.9, 0.3, 0.0, 0.0], 2),  # 1.2 is rounded up
        ([0.9, 0.8, 0.7, 0.0], 3),
        ([0.9, 0.8, 0.7, 0.7], 4),
        ([1.0, 1.0, 1.0, 1.0], 4),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 4),  # the best four alone are summed
        ([0.5, 0.5, 0.0, 0.0], 1),  # exactly 1, not 2
        ([1 / 3, 1 / 3, 1 / 3, 0.0], 1),  # exactly 1, whatever float32 makes of it
        ([2 / 3, 2 / 3, 2 / 3, 0.0], 2),
        ([0.7, 0.3, 0.6, 0.4], 2),
    ],
)
def test_k_is_the_sum_of_the_best_ious_rounded_up(ious: list[float], expected: int) -> None:
    boxes = [of_iou(iou) if iou else FAR for iou in ious]
    assert k_of(boxes + [FAR] * 10, gamma=0.0) == expected


def test_confidence_lowers_k() -> None:
    boxes = [of_iou(0.9)] * 4 + [FAR] * 10  # 4 (0.9 - gamma c)
    assert k_of(boxes, gamma=0.4) == 4
    assert k_of(boxes, probability=0.5, gamma=0.4) == 3  # 2.8
    assert k_of(boxes, probability=0.999, gamma=0.4) == 3  # 2.0016
    assert k_of(boxes, probability=0.999, gamma=0.8) == 1  # .4
    assert k_of(boxes, probability=0.999, gamma=2.0) == 1  # negative
    assert k_of(boxes, probability=0.999, gamma=2.0, min_positives=3) == 3


def test_which_confidence() -> None:
    # Class 1 is the truth's, with p = .01; class 0 has p = .99.
    logits = torch.tensor([[math.log(99), -math.log(99), -9.0]]).repeat(12, 1)
    boxes = torch.tensor([of_iou(0.9)] * 4 + [FAR] * 8)

    def k(confidence: Any) -> list[int]:
        return counts(QualityAwareAssigner(gamma=0.8, confidence=confidence), logits, boxes, TARGET)

    assert k("gt_class") == [4]  # 4 (.9 - .008) = 3.57
    assert k("max") == [1]  # 4 (.9 - .792) = .43


def test_top_k_bounds_the_sum_and_the_result() -> None:
    boxes = [of_iou(0.9)] * 10 + [FAR] * 10
    assert [k_of(boxes, gamma=0.0, top_k=k) for k in (1, 2, 3, 8)] == [1, 2, 3, 8]
    assert k_of(boxes[:9], gamma=0.0, top_k=8) == 4  # max(G, n / 2) = 4


def test_claims_are_withdrawn_weakest_first() -> None:
    # Three boxes far apart, 10 queries: at most 5 positives. Each wants 3: IoUs (1, 1, .9), (.9, .8, .7), (1, .95, .5).
    # Of the claims beyond the first, .5, .7, .8 and .9 go.
    centres, ious = [0.2, 0.5, 0.8], [(1.0, 1.0, 0.9), (0.9, 0.8, 0.7), (1.0, 0.95, 0.5)]
    boxes = [[c, 0.5, 0.2 * iou, 0.2] for c, row in zip(centres, ious, strict=True) for iou in row]
    target = Targets(torch.tensor([0, 1, 2]), torch.tensor([[c, 0.5, 0.2, 0.2] for c in centres]))
    assigner = QualityAwareAssigner(gamma=0.0, top_k=3)
    wide = torch.tensor(boxes + [FAR] * 9)
    assert counts(assigner, torch.zeros(18, 3), wide, target) == [3, 3, 3]
    narrow = torch.tensor([*boxes, FAR])
    assert counts(assigner, torch.zeros(10, 3), narrow, target) == [2, 1, 2]
    found = solve(assigner, torch.zeros(10, 3), narrow, target)
    assert found == {(0, 0), (1, 0), (3, 1), (6, 2), (7, 2)}
    # The lower bound yields too.
    strict = QualityAwareAssigner(gamma=0.0, top_k=3, min_positives=3)
    assert counts(strict, torch.zeros(10, 3), narrow, target) == [2, 1, 2]


# --- which queries, by hand


def test_one_to_one_on_a_hand_made_cost() -> None:
    # Greedy takes (0, 0) and pays 1 + 9; the best is 2 + 3.
    cost = [[1.0, 2.0], [3.0, 9.0], [8.0, 8.0]]
    assert as_set(OneToOneAssigner().solve(image_of(cost, np.zeros((3, 2)).tolist()))) == {(0, 1), (1, 0)}


def test_score_gives_a_contested_query_to_the_larger_score() -> None:
    # Each box claims its best; both want query 0, which box 1 gets. Box 0 is empty: the cheapest free query is 3.
    iou = [[0.8, 0.9], [0.1, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    cost = [[0.0, 0.0], [5.0, 9.0], [4.0, 9.0], [2.0, 9.0], [3.0, 9.0]]
    image = image_of(cost, iou)
    assert as_set(QualityAwareAssigner(gamma=0.0, select="score").solve(image)) == {(0, 1), (3, 0)}


def test_score_fills_all_boxes_that_lost_their_claim() -> None:
    # All three claim query 0; box 0 gets it, the others the cheapest of the rest, solved together.
    iou = [[0.9, 0.8, 0.7]] + [[0.0] * 3] * 5
    cost = [[0.0] * 3, [9.0, 1.0, 2.0], [9.0, 5.0, 5.0], [9.0, 2.0, 9.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    found = as_set(QualityAwareAssigner(gamma=0.0, select="score").solve(image_of(cost, iou)))
    assert found == {(0, 0), (3, 1), (1, 2)}


def test_as_many_boxes_as_queries_obeys_the_rule_of_selection() -> None:
    # By score box 0 takes query 0 and box 1 takes query 1, though the costs say the opposite.
    image = image_of([[9.0, 0.0], [0.0, 9.0]], [[0.9, 0.1], [0.1, 0.9]])
    assert as_set(QualityAwareAssigner(gamma=0.0, select="score").solve(image)) == {(0, 0), (1, 1)}
    assert as_set(QualityAwareAssigner(gamma=0.0).solve(image)) == {(0, 1), (1, 0)}
