"""The assigners against a plainly written reference, exhaustive search, and their promises."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import PairSet, as_set, counts, solve
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from paqdetr.paq import (
    AlignedAssigner,
    FixedKAssigner,
    OneToOneAssigner,
    QualityAwareAssigner,
    SimOTAAssigner,
    match_layers,
)
from paqdetr.paq.costs import MatchingCosts
from paqdetr.structures import Targets

# --- the reference, one loop after another


def corners(box: list[float]) -> tuple[float, float, float, float]:
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and GIoU."""
    ax, ay, aX, aY = corners(a)
    bx, by, bX, bY = corners(b)
    inside = max(min(aX, bX) - max(ax, bx), 0) * max(min(aY, bY) - max(ay, by), 0)
    union = (aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inside
    if union <= 0:
        return 0.0, -1.0
    hull = (max(aX, bX) - min(ax, bx)) * (max(aY, bY) - min(ay, by))
    return inside / union, inside / union - (hull - union) / hull


class Reference:
    """METHOD of the paper for one image: scores, claims and pairs."""

    def __init__(self, logits: Tensor, boxes: Tensor, target: Targets, **rule: Any) -> None:
        self.rule = dict(gamma=0.4, top_k=4, min_positives=1, select="hungarian", confidence="gt_class") | rule
        self.n, self.boxes = len(boxes), len(target)
        p = [[1 / (1 + math.exp(-x)) for x in row] for row in logits.tolist()]
        truth, labels = target.boxes.tolist(), target.labels.tolist()
        self.s = [[0.0] * self.boxes for _ in range(self.n)]
        self.cost = [[0.0] * self.boxes for _ in range(self.n)]
        for i, box in enumerate(boxes.tolist()):
            for j in range(self.boxes):
                iou, giou = overlap(box, truth[j])
                sure = p[i][labels[j]]
                focal = 0.25 * (1 - sure) ** 2 * -math.log(sure + 1e-8)
                focal -= 0.75 * sure**2 * -math.log(1 - sure + 1e-8)
                l1 = sum(abs(a - b) for a, b in zip(box, truth[j], strict=True))
                self.cost[i][j] = 2 * focal + 5 * l1 - 2 * giou
                c = sure if self.rule["confidence"] == "gt_class" else max(p[i])
                self.s[i][j] = iou - self.rule["gamma"] * c

    def ranking(self, j: int) -> list[int]:
        return sorted(range(self.n), key=lambda i: -self.s[i][j])

    def uncapped(self) -> list[int]:
        claims = []
        for j in range(self.boxes):
            total = sum(self.s[i][j] for i in self.ranking(j)[: self.rule["top_k"]])
            wanted = max(math.ceil(total - 1e-6), self.rule["min_positives"])
            claims.append(min(wanted, self.rule["top_k"], self.n))
        return claims

    def claims(self) -> list[int]:
        if self.boxes > self.n:
            served = {j for _, j in self.pairs()}
            return [int(j in served) for j in range(self.boxes)]
        claims = self.uncapped()
        while sum(claims) > max(self.boxes, self.n / 2):
            # The least s among the last claims of boxes that have more than one.
            weakest = min((self.s[self.ranking(j)[k - 1]][j], -k, j) for j, k in enumerate(claims) if k > 1)[2]
            claims[weakest] -= 1
        return claims

    def pairs(self) -> PairSet:
        if self.boxes == 0:
            return set()
        if self.boxes > self.n:
            rows, columns = linear_sum_assignment(np.array(self.cost))
            return set(zip(rows.tolist(), columns.tolist(), strict=True))
        return self.by_score() if self.rule["select"] == "score" else self.by_hungarian()

    def by_hungarian(self) -> PairSet:
        copies = [j for j, k in enumerate(self.claims()) for _ in range(k)]
        rows, columns = linear_sum_assignment(np.array([[row[j] for j in copies] for row in self.cost]))
        return {(int(i), copies[c]) for i, c in zip(rows, columns, strict=True)}

    def by_score(self) -> PairSet:
        wanting: dict[int, list[int]] = {}
        for j, k in enumerate(self.claims()):
            for i in self.ranking(j)[:k]:
                wanting.setdefault(i, []).append(j)
        owner = {i: max(boxes, key=lambda j: self.s[i][j]) for i, boxes in wanting.items()}
        empty = [j for j in range(self.boxes) if j not in owner.values()]
        free = [i for i in range(self.n) if i not in owner]
        if empty and free:
            rows, columns = linear_sum_assignment(np.array([[self.cost[i][j] for j in empty] for i in free]))
            owner |= {free[i]: empty[j] for i, j in zip(rows, columns, strict=True)}
        # The cap leaves a free query for every empty box: see `select_by_score`.
        assert len(set(owner.values())) == self.boxes
        return set(owner.items())


# --- problems


def scene(seed: int, queries: int, boxes: int, closeness: float, classes: int = 3) -> tuple[Tensor, Tensor, Targets]:
    """Predictions of which a share lies on a box or near it; float64."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    truth = torch.cat([0.2 + 0.6 * rand(boxes, 2), 0.05 + 0.35 * rand(boxes, 2)], dim=1)
    predicted = torch.cat([0.2 + 0.6 * rand(queries, 2), 0.05 + 0.35 * rand(queries, 2)], dim=1)
    if boxes:
        near = truth[torch.randint(boxes, (queries,), generator=g)] + 0.03 * (rand(queries, 4) - 0.5)
        predicted = torch.where(rand(queries, 1) < closeness, near, predicted)
    logits = 3 * torch.randn(queries, classes, generator=g, dtype=torch.float64) - 1
    return logits, predicted, Targets(torch.randint(classes, (boxes,), generator=g), truth)


problems = dict(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 14),
    boxes=st.integers(0, 9),
    closeness=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
rules = st.fixed_dictionaries(
    dict(
        gamma=st.sampled_from([0.0, 0.4, 1.5]),
        top_k=st.integers(3, 6),
        min_positives=st.integers(1, 3),
        select=st.sampled_from(["hungarian", "score"]),
        confidence=st.sampled_from(["gt_class", "max"]),
    )
)


# --- properties


@settings(max_examples=300)
@given(rule=rules, **problems)
def test_equals_the_reference(rule: dict, seed: int, queries: int, boxes: int, closeness: float) -> None:
    logits, predicted, target = scene(seed, queries, boxes, closeness)
    reference, assigner = Reference(logits, predicted, target, **rule), QualityAwareAssigner(**rule)
    assert counts(assigner, logits, predicted, target) == reference.claims()
    assert solve(assigner, logits, predicted, target) == reference.pairs()


@settings(max_examples=200)
@given(rule=rules, **problems)
def test_promises(rule: dict, seed: int, queries: int, boxes: int, closeness: float) -> None:
    logits, predicted, target = scene(seed, queries, boxes, closeness)
    assigner = QualityAwareAssigner(**rule)
    claims = counts(assigner, logits, predicted, target)
    found = Counter(j for _, j in solve(assigner, logits, predicted, target))
    if boxes > queries:
        assert len(found) == queries and set(found.values()) == {1}
        assert claims == [found[j] for j in range(boxes)], "no box claims what it cannot get"
        return
    wanted = Reference(logits, predicted, target, **rule).uncapped()
    assert all(1 <= k <= min(rule["top_k"], max(queries, 1)) for k in claims)
    assert sum(claims) <= max(boxes, queries // 2)
    assert all(k <= full for k, full in zip(claims, wanted, strict=True))
    if sum(wanted) <= max(boxes, queries // 2):
        assert claims == wanted and all(k >= min(rule["min_positives"], queries) for k in claims)

    assert set(found) == set(range(boxes)), "no box goes without"
    if rule["select"] == "hungarian":
        assert [found[j] for j in range(boxes)] == claims


@settings(max_examples=150)
@given(rule=rules, order=st.randoms(use_true_random=False), **problems)
def test_order_of_truth_does_not_matter(
    rule: dict, order: Any, seed: int, queries: int, boxes: int, closeness: float
) -> None:
    random = np.random.default_rng(seed)
    cost, iou, sure = random.random((3, queries, boxes))  # no two alike
    shuffled = list(range(boxes))
    order.shuffle(shuffled)
    assigner, highest = QualityAwareAssigner(**rule), random.random(queries)
    before = as_set(assigner.solve(MatchingCosts(cost, iou, sure, highest)))
    moved = MatchingCosts(cost[:, shuffled], iou[:, shuffled], sure[:, shuffled], highest)
    assert before == {(i, shuffled[j]) for i, j in as_set(assigner.solve(moved))}


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(3, 1), (4, 2), (5, 2), (6, 2), (6, 3), (7, 3), (2, 3), (3, 4)]),
    gamma=st.sampled_from([0.0, 0.4]),
)
def test_hungarian_with_repeated_columns_is_the_cheapest_of_all(
    seed: int, shape: tuple[int, int], gamma: float
) -> None:
    queries, boxes = shape
    logits, predicted, target = scene(seed, queries, boxes, closeness=0.8)
    assigner = QualityAwareAssigner(gamma=gamma)
    cost = Reference(logits, predicted, target).cost
    claims = counts(assigner, logits, predicted, target)
    copies = [j for j, k in enumerate(claims) for _ in range(k)]
    cheapest = math.inf
    if len(copies) <= queries:
        for rows in itertools.permutations(range(queries), len(copies)):
            cheapest = min(cheapest, sum(cost[i][j] for i, j in zip(rows, copies, strict=True)))
    else:
        for columns in itertools.permutations(copies, queries):
            cheapest = min(cheapest, sum(cost[i][j] for i, j in enumerate(columns)))
    found = solve(assigner, logits, predicted, target)
    assert len(found) == min(queries, len(copies))
    assert sum(cost[i][j] for i, j in found) == pytest.approx(cheapest, abs=1e-9)


@settings(max_examples=100)
@given(**problems)
def test_one_to_one_is_scipy_on_the_plain_cost(seed: int, queries: int, boxes: int, closeness: float) -> None:
    logits, predicted, target = scene(seed, queries, boxes, closeness)
    found = solve(OneToOneAssigner(), logits, predicted, target)
    assert len(found) == len({j for _, j in found}) == min(queries, boxes)
    if boxes:
        rows, columns = linear_sum_assignment(np.array(Reference(logits, predicted, target).cost))
        assert found == set(zip(rows.tolist(), columns.tolist(), strict=True))


# --- edges

SELECTS = ["hungarian", "score"]
TARGET = Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
FAR = [0.05, 0.05, 0.1, 0.1]


@pytest.mark.parametrize("select", SELECTS)
def test_no_boxes(select: Any) -> None:
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    for assigner in (QualityAwareAssigner(select=select), OneToOneAssigner()):
        pairs = assigner(torch.zeros(2, 5, 3), torch.rand(2, 5, 4), [empty, empty])
        assert [as_set(found) for found in pairs] == [set(), set()]
    assert counts(QualityAwareAssigner(), torch.zeros(5, 3), torch.rand(5, 4), empty) == []


@pytest.mark.parametrize("select", SELECTS)
def test_one_query(select: Any) -> None:
    assigner = QualityAwareAssigner(select=select, min_positives=3)
    logits, boxes = torch.zeros(1, 3), torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    assert solve(assigner, logits, boxes, TARGET) == {(0, 0)}
    two = Targets(torch.tensor([1, 1]), torch.tensor([FAR, [0.5, 0.5, 0.2, 0.2]]))
    assert solve(assigner, logits, boxes, two) == {(0, 1)}
    assert counts(assigner, logits, boxes, two) == [0, 1]


@pytest.mark.parametrize("select", SELECTS)
def test_more_boxes_than_queries(select: Any) -> None:
    logits, boxes, target = scene(3, queries=4, boxes=9, closeness=1.0)
    found = solve(QualityAwareAssigner(select=select, min_positives=2), logits, boxes, target)
    assert len(found) == len({i for i, _ in found}) == len({j for _, j in found}) == 4
    claimed = counts(QualityAwareAssigner(select=select, min_positives=2), logits, boxes, target)
    assert claimed == [int(j in {j for _, j in found}) for j in range(9)], "no box claims what it cannot get"
    assert found == solve(OneToOneAssigner(), logits, boxes, target)


@pytest.mark.parametrize("select", SELECTS)
def test_duplicate_boxes_each_get_their_own_queries(select: Any) -> None:
    logits, boxes, target = scene(5, queries=20, boxes=2, closeness=0.5)
    twice = Targets(target.labels.repeat(3), target.boxes.repeat(3, 1))
    assigner = QualityAwareAssigner(select=select)
    found = Counter(j for _, j in solve(assigner, logits, boxes, twice))
    assert set(found) == set(range(6))
    if select == "hungarian":
        assert [found[j] for j in range(6)] == counts(assigner, logits, boxes, twice)


@pytest.mark.parametrize("select", SELECTS)
def test_zero_area_boxes(select: Any) -> None:
    point = [0.5, 0.5, 0.0, 0.0]
    target = Targets(torch.tensor([0, 1]), torch.tensor([point, [0.2, 0.2, 0.0, 0.3]]))
    boxes = torch.tensor([point, [0.2, 0.2, 0.0, 0.3], *[FAR] * 6])
    assigner = QualityAwareAssigner(select=select, gamma=0.0)
    assert counts(assigner, torch.zeros(8, 3), boxes, target) == [1, 1]
    found = solve(assigner, torch.zeros(8, 3), boxes, target)
    assert {j for _, j in found} == {0, 1}
    if select == "hungarian":
        assert found == {(0, 0), (1, 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("select", SELECTS)
def test_half_precision(select: Any, dtype: torch.dtype) -> None:
    for seed in range(10):
        logits, boxes, target = scene(seed, queries=12, boxes=3, closeness=0.8)
        logits, boxes = logits.to(dtype), boxes.to(dtype)
        target = Targets(target.labels, target.boxes.float())
        assigner = QualityAwareAssigner(select=select)
        assert solve(assigner, logits, boxes, target) == solve(assigner, logits.float(), boxes.float(), target)
        reference = Reference(logits.double(), boxes.double(), target, select=select)
        assert counts(assigner, logits, boxes, target) == reference.claims()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(min_positives=0), "min_positives"),
        (dict(min_positives=5), "min_positives <= top_k, found 5 and 4"),
        (dict(top_k=0), "top_k"),
        (dict(select="greedy"), "select.*'greedy'"),
        (dict(confidence="mean"), "confidence.*'mean'"),
        (dict(top_k=2.5), "top_k: expected a whole number, found 2.5"),
        (dict(min_positives=1.5), "min_positives: expected a whole number, found 1.5"),
        (dict(gamma=float("nan")), "gamma: expected a finite number, found nan"),
        (dict(gamma=float("inf")), "gamma: .*found inf"),
    ],
)
def test_wrong_settings(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityAwareAssigner(**rule)


def test_numbers_of_positives_are_whole() -> None:
    for rule, name in ((FixedKAssigner, "k"), (AlignedAssigner, "k"), (SimOTAAssigner, "top_k")):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number, found 2.5"):
            rule(2.5)


def test_predictions_and_rules_of_other_shapes_are_named() -> None:
    logits, boxes, one = torch.zeros(2, 1, 5, 3), torch.full((2, 1, 5, 4), 0.5), OneToOneAssigner()
    target = [Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
    with pytest.raises(ValueError, match=r"logits \(B, n, C\) and boxes \(B, n, 4\), found \(5, 3\) and \(5, 4\)"):
        one(logits[0, 0], boxes[0, 0], target)
    with pytest.raises(ValueError, match=r"found \(1, 5, 3\) and \(1, 4, 4\)"):
        QualityAwareAssigner().num_positives(logits[0], boxes[0, :, :4], target)
    with pytest.raises(ValueError, match=r"logits \(K, B, n, C\) .*found \(1, 5, 3\) and \(1, 5, 4\)"):
        match_layers(logits[0], boxes[0], target, [one])
    with pytest.raises(ValueError, match=r"counted: expected \(2, 1, 5\), found \(1, 5\)"):
        match_layers(logits, boxes, target, [one] * 2, counted=torch.ones(1, 5, dtype=torch.bool))
