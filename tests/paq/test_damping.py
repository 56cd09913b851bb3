"""Weights of pairs by their rank, and caps on positives, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.paq import (
    FixedKAssigner,
    Matchables,
    OneToOneAssigner,
    Pairs,
    QualityAwareAssigner,
    RankDamping,
    SimOTAAssigner,
    Targets,
)
from paqdetr.paq.damping import ranks_within


class Given:
    """Pairs as told."""

    def __init__(self, *rows: tuple[int, int]) -> None:
        self.rows = rows

    def solve(self, image: Matchables) -> Pairs:
        queries, boxes = torch.tensor(self.rows, dtype=torch.int64).view(-1, 2).unbind(1)
        return Pairs(queries, boxes)


def image(iou: list[list[float]], probability: list[list[float]]) -> Matchables:
    of_class = np.array(probability)
    return Matchables(
        cost=-np.array(iou), iou=np.array(iou), class_confidence=of_class, max_confidence=of_class.max(1)
    )


def test_weights_fall_with_the_rank_in_the_box() -> None:
    # Box 0 has queries 0, 2 and 3, of qualities sqrt(p * IoU) = .3, .6, .4; box 1 has query 1 alone.
    found = RankDamping(Given((0, 0), (1, 1), (2, 0), (3, 0)), tau=2.0, alpha=0.5).solve(
        image([[0.9, 0], [0, 0.2], [0.6, 0], [0.2, 0]], [[0.1, 0], [0, 0.5], [0.6, 0], [0.8, 0]])
    )
    assert found.query_indices.tolist() == [0, 1, 2, 3] and found.target_indices.tolist() == [0, 1, 0, 0]
    assert found.weights is not None
    assert found.weights.tolist() == pytest.approx([math.exp(-1), 1, 1, math.exp(-1 / 2)])


@pytest.mark.parametrize(("alpha", "best"), [(0.0, 0), (1.0, 1)])
def test_alpha_weighs_probability_against_overlap(alpha: float, best: int) -> None:
    found = RankDamping(Given((0, 0), (1, 0)), alpha=alpha).solve(image([[0.9], [0.1]], [[0.1], [0.9]]))
    assert found.weights is not None
    assert found.weights.argmax() == best
    assert found.weights.min() == pytest.approx(math.exp(-1 / 1.5))


def test_one_to_one_pairs_are_whole() -> None:
    targets = [
        Targets(torch.tensor([0, 1]), torch.rand(2, 4)),
        Targets(torch.zeros(0).long(), torch.rand(0, 4)),
    ]
    logits, boxes = torch.randn(2, 6, 3), torch.rand(2, 6, 4)
    plain, damped = (
        rule(logits, boxes, targets) for rule in (OneToOneAssigner(), RankDamping(OneToOneAssigner()))
    )
    for one, other in zip(plain, damped, strict=True):
        assert torch.equal(one.query_indices, other.query_indices)
        assert other.weights is not None and (other.weights == 1).all()


def test_who_is_paired_stays_the_rules_affair() -> None:
    targets = [Targets(torch.tensor([0, 1]), torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]))]
    logits, boxes = torch.randn(1, 12, 3), targets[0].boxes.repeat(6, 1)[None] + 0.01 * torch.rand(1, 12, 4)
    (plain,), (damped,) = (
        rule(logits, boxes, targets) for rule in (FixedKAssigner(3), RankDamping(FixedKAssigner(3)))
    )
    assert torch.equal(plain.query_indices, damped.query_indices) and plain.weights is None
    assert damped.weights is not None
    for box in range(2):
        own = damped.weights[damped.target_indices == box].sort(descending=True).values
        assert own.tolist() == pytest.approx([math.exp(-r / 1.5) for r in range(3)])


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5, 1.0])), max_size=12))
def test_ranks_are_counted_one_by_one(rows: list[tuple[int, float]]) -> None:
    groups = np.array([group for group, _ in rows], dtype=np.int64)
    scores = np.array([score for _, score in rows])
    expected = [
        sum(g == group and (s > score or (s == score and j < i)) for j, (g, s) in enumerate(rows))
        for i, (group, score) in enumerate(rows)
    ]
    assert ranks_within(groups, scores).tolist() == expected


@pytest.mark.parametrize("wrong", [dict(tau=0.0), dict(alpha=1.5), dict(alpha=-0.1)])
def test_wrong_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RankDamping(OneToOneAssigner(), **wrong)


# --- fewer positives than the sum asks for


def test_a_cap_cuts_the_claims_and_not_the_sum() -> None:
    """Sums of the 4 best s are 3.6 and 0.9: claims 4 and 1 without a cap."""
    iou = [[0.9, 0.0]] * 4 + [[0.0, 0.3]] * 3 + [[0.0, 0.0]] * 5
    sure = image(iou, [[0.0, 0.0]] * 12)
    for most, expected in ((4, [4, 1]), (3, [3, 1]), (1, [1, 1])):
        rules = (
            QualityAwareAssigner(gamma=0.0, top_k=4, max_positives=most),
            SimOTAAssigner(top_k=4, max_positives=most),
        )
        for rule, counts in zip(rules, (expected, [min(most, 3), 1]), strict=True):  # floor(3.6) = 3
            found = rule.solve(sure)
            assert torch.bincount(found.target_indices).tolist() == counts


@pytest.mark.parametrize("rule", [QualityAwareAssigner, SimOTAAssigner])
@pytest.mark.parametrize("most", [1, 5])
def test_a_cap_lies_between_the_least_and_the_sum(rule: type, most: int) -> None:
    with pytest.raises(ValueError, match="max_positives"):
        rule(top_k=4, min_positives=2, max_positives=most)
