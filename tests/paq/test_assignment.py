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
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from paqdetr.paq import OneToOneAssigner, Pairs, QualityAwareAssigner
from paqdetr.paq.assignment import _select_by_score
from paqdetr.paq.costs import Matchables
from paqdetr.structures import Targets

PairSet = set[tuple[int, int]]


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
        self.rule = (
            dict(gamma=0.4, top_k=4, min_positives=1, select="hungarian", confidence="gt_class") | rule
        )
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
        claims = self.uncapped()
        while sum(claims) > max(self.boxes, self.n / 2):
            # The least s among the last claims of boxes that have more than one.
            weakest = min((self.s[self.ranking(j)[k - 1]][j], -k, j) for j, k in enumerate(claims) if k > 1)[
                2
            ]
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
        for j in empty:
            if j not in owner.values():
                surplus = [i for i in owner if list(owner.values()).count(owner[i]) > 1]
                owner[max(surplus, key=lambda i: self.s[i][j])] = j
        return set(owner.items())


# --- problems


def scene(
    seed: int, queries: int, boxes: int, closeness: float, classes: int = 3
) -> tuple[Tensor, Tensor, Targets]:
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


def solve(assigner: Any, logits: Tensor, boxes: Tensor, target: Targets) -> PairSet:
    (pairs,) = assigner(logits[None], boxes[None], [target])
    return as_set(pairs)


def as_set(pairs: Pairs) -> PairSet:
    assert pairs.query_indices.dtype == pairs.target_indices.dtype == torch.int64
    queries = pairs.query_indices.tolist()
    assert queries == sorted(set(queries)), "ascending, no query twice"
    assert len(pairs) == len(queries) == len(pairs.target_indices)
    return set(zip(queries, pairs.target_indices.tolist(), strict=True))


def counts(assigner: QualityAwareAssigner, logits: Tensor, boxes: Tensor, target: Targets) -> list[int]:
    (found,) = assigner.num_positives(logits[None], boxes[None], [target])
    assert found.dtype == torch.int64
    return found.tolist()


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
    wanted = Reference(logits, predicted, target, **rule).uncapped()
    assert all(1 <= k <= min(rule["top_k"], max(queries, 1)) for k in claims)
    assert sum(claims) <= max(boxes, queries // 2)
    assert all(k <= full for k, full in zip(claims, wanted, strict=True))
    if sum(wanted) <= max(boxes, queries // 2):
        assert claims == wanted and all(k >= min(rule["min_positives"], queries) for k in claims)

    found = Counter(j for _, j in solve(assigner, logits, predicted, target))
    if boxes > queries:
        assert len(found) == queries and set(found.values()) == {1}
    else:
        assert set(found) == set(range(boxes)), "no box goes without"
        if rule["select"] == "hungarian":
            assert [found[j] for j in range(boxes)] == claims


@settings(max_examples=150)
@given(rule=rules, order=st.randoms(use_true_random=False), **problems)
def test_order_of_truth_does_not_matter(
    rule: dict, order: Any, seed: int, queries: int, boxes: int, closeness: float
) -> None:
    logits, predicted, target = scene(seed, queries, boxes, closeness)
    # With gamma 0 all pairs without overlap tie; k_j may then be lowered at any of them.
    assigner = QualityAwareAssigner(**(rule | {"gamma": max(rule["gamma"], 0.1)}))
    shuffled = list(range(boxes))
    order.shuffle(shuffled)
    moved = Targets(target.labels[shuffled], target.boxes[shuffled])
    scores = Reference(logits, predicted, target, **(rule | {"gamma": assigner.gamma})).s
    if len({round(s, 9) for row in scores for s in row}) < queries * boxes:
        return  # ties
    before = solve(assigner, logits, predicted, target)
    assert before == {(i, shuffled[j]) for i, j in solve(assigner, logits, predicted, moved)}


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


# --- k_j by hand


def stack(count: int, shift: float = 0.0) -> list[list[float]]:
    return [[0.5 + shift, 0.5, 0.2, 0.2]] * count


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


def image_of(cost: list[list[float]], iou: list[list[float]]) -> Matchables:
    table = np.array(iou, dtype=float)
    return Matchables(np.array(cost, dtype=float), table, np.zeros_like(table), np.zeros(len(table)))


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


def test_score_takes_a_surplus_query_when_none_is_free() -> None:
    # The cap on the k_j leaves a query free for every empty box, so only claims beyond it come here.
    scores = np.array([[0.9, 0.1], [0.8, 0.4], [0.7, 0.3]])
    rows, columns = _select_by_score(scores, np.array([3, 1]), np.zeros((3, 2)))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 0)]


def test_as_many_boxes_as_queries_obeys_the_rule_of_selection() -> None:
    # By score box 0 takes query 0 and box 1 takes query 1, though the costs say the opposite.
    image = image_of([[9.0, 0.0], [0.0, 9.0]], [[0.9, 0.1], [0.1, 0.9]])
    assert as_set(QualityAwareAssigner(gamma=0.0, select="score").solve(image)) == {(0, 0), (1, 1)}
    assert as_set(QualityAwareAssigner(gamma=0.0).solve(image)) == {(0, 1), (1, 0)}


# --- edges

SELECTS = ["hungarian", "score"]


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
    assert counts(assigner, logits, boxes, two) == [1, 1]


@pytest.mark.parametrize("select", SELECTS)
def test_more_boxes_than_queries(select: Any) -> None:
    logits, boxes, target = scene(3, queries=4, boxes=9, closeness=1.0)
    found = solve(QualityAwareAssigner(select=select, min_positives=2), logits, boxes, target)
    assert len(found) == len({i for i, _ in found}) == len({j for _, j in found}) == 4
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
        assert solve(assigner, logits, boxes, target) == solve(
            assigner, logits.float(), boxes.float(), target
        )
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
    ],
)
def test_wrong_settings(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityAwareAssigner(**rule)
