"""The rules PaQ is compared with: fixed k and SimOTA, by hand, against a plain loop, and under the same limits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import as_set, image_of

from paqdetr.errors import NonFiniteError
from paqdetr.paq import Assigner, FixedKAssigner, OneToOneAssigner, SimOTAAssigner, match_layers
from paqdetr.paq.costs import MatchingCosts
from paqdetr.structures import Targets

TARGET = Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))


def random_image(seed: int, queries: int, boxes: int, quality: float) -> MatchingCosts:
    """No two costs alike; `quality` near 1 makes many good predictions."""
    random = np.random.default_rng(seed)
    cost, sure = random.random((2, queries, boxes))
    iou = random.random((queries, boxes)) ** (1 / max(quality, 1e-3))
    return MatchingCosts(cost, iou, sure, random.random(queries))


problems = dict(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 16),
    boxes=st.integers(0, 9),
    quality=st.sampled_from([0.1, 1.0, 10.0]),
)
assigners = st.one_of(
    st.builds(FixedKAssigner, st.integers(1, 6)),
    st.builds(SimOTAAssigner, st.integers(3, 8), st.integers(1, 3), select=st.sampled_from(["cost", "hungarian"])),
)


@settings(max_examples=300)
@given(assigner=assigners, **problems)
def test_the_limits_of_every_rule(assigner: Any, seed: int, queries: int, boxes: int, quality: float) -> None:
    image = random_image(seed, queries, boxes, quality)
    found = as_set(assigner.solve(image))
    counts = Counter(j for _, j in found)
    if boxes > queries:
        assert found == as_set(OneToOneAssigner().solve(image))
        return
    assert set(counts) == set(range(boxes)), "no box goes without"
    assert len(found) <= max(boxes, queries // 2)
    most = assigner.k if isinstance(assigner, FixedKAssigner) else assigner.top_k
    # By cost, a box whose claims all went to others is given one query besides.
    assert all(1 <= count <= most for count in counts.values())


@settings(max_examples=150)
@given(assigner=assigners, order=st.randoms(use_true_random=False), **problems)
def test_order_of_truth_does_not_matter(
    assigner: Any, order: Any, seed: int, queries: int, boxes: int, quality: float
) -> None:
    image = random_image(seed, queries, boxes, quality)
    moved = list(range(boxes))
    order.shuffle(moved)
    shuffled = MatchingCosts(
        image.cost[:, moved], image.iou[:, moved], image.class_confidence[:, moved], image.max_confidence
    )
    found = {(i, moved[j]) for i, j in as_set(assigner.solve(shuffled))}
    assert found == as_set(assigner.solve(image))


@settings(max_examples=200)
@given(top_k=st.integers(1, 8), **problems)
def test_simota_equals_a_plain_loop(top_k: int, seed: int, queries: int, boxes: int, quality: float) -> None:
    image = random_image(seed, queries, boxes, quality)
    if boxes > queries:
        return
    wanted = []
    for j in range(boxes):
        best = sorted(image.iou[:, j].tolist(), reverse=True)[:top_k]
        wanted.append(min(max(math.floor(sum(best)), 1), top_k, queries))
    if sum(wanted) > max(boxes, queries // 2):
        return  # lowered: `test_the_limits_of_every_rule`, and test_assignment.py for which
    claims: dict[int, list[int]] = {}
    for j in range(boxes):
        for i in sorted(range(queries), key=lambda i: image.cost[i, j])[: wanted[j]]:
            claims.setdefault(i, []).append(j)
    owner = {i: min(js, key=lambda j: image.cost[i, j]) for i, js in claims.items()}
    found = dict(as_set(SimOTAAssigner(top_k).solve(image)))
    assert owner.items() <= found.items()
    # What is more are queries nobody claimed, one for each box that lost all of its claims.
    extra = {i: j for i, j in found.items() if i not in owner}
    assert sorted(extra.values()) == sorted(set(range(boxes)) - set(owner.values()))


# --- by hand


def test_fixed_k_takes_the_cheapest_k_of_a_lone_box() -> None:
    costs = [[3.0], [1.0], [7.0], [2.0], [9.0], [8.0], [5.0], [6.0]]
    image = image_of(costs, [[0.0]] * 8)
    assert as_set(FixedKAssigner(3).solve(image)) == {(1, 0), (3, 0), (0, 0)}
    assert len(FixedKAssigner(6).solve(image)) == 4  # half of the queries at the most


def test_fixed_k_loses_the_costliest_positives_of_a_crowded_image() -> None:
    # 8 queries: 4 positives at the most, of the 6 that two boxes want. The second and third of box 1 cost most.
    cost = [[1.0, 99.0], [2.0, 99.0], [3.0, 99.0], [99.0, 4.0], [99.0, 5.0], [99.0, 6.0], [99.0, 99.0], [99.0, 99.0]]
    assert as_set(FixedKAssigner(3).solve(image_of(cost, [[0.0] * 2] * 8))) == {(0, 0), (1, 0), (2, 0), (3, 1)}


def test_simota_rounds_down_and_ignores_confidence() -> None:
    iou = [[0.9], [0.8], [0.7], [0.5], *[[0.0]] * 8]
    cost = [[float(i)] for i in range(12)]
    image = image_of(cost, iou)
    assert len(SimOTAAssigner().solve(image)) == 2  # 2.9
    assert len(SimOTAAssigner(top_k=2).solve(image)) == 1  # 1.7
    assert len(SimOTAAssigner(top_k=3).solve(image)) == 2  # 2.4
    assert len(SimOTAAssigner(min_positives=4).solve(image)) == 4
    sure = MatchingCosts(image.cost, image.iou, np.ones_like(image.iou), np.ones(12))
    assert as_set(SimOTAAssigner().solve(sure)) == as_set(SimOTAAssigner().solve(image))
    thirds = image_of(cost, [[np.float32(1 / 3)], [np.float32(2 / 3)], *[[0.0]] * 10])
    assert len(SimOTAAssigner().solve(thirds)) == 1  # exactly 1, whatever float32 makes of it


def test_simota_gives_a_contested_query_to_the_cheaper_box() -> None:
    cost = [[1.0, 0.5], [2.0, 9.0], [3.0, 9.0], [4.0, 9.0]]
    found = as_set(SimOTAAssigner().solve(image_of(cost, np.zeros((4, 2)).tolist())))
    assert found == {(0, 1), (1, 0)}  # box 0 wanted query 0 too, and gets the cheapest that is free


# --- as every assigner


@pytest.mark.parametrize("assigner", [FixedKAssigner(), SimOTAAssigner(), SimOTAAssigner(select="hungarian")])
def test_calls_and_edges(assigner: Any) -> None:
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 8] * 2)
    pairs = assigner(torch.zeros(2, 8, 3), boxes, [empty, TARGET])
    assert len(pairs[0]) == 0 and set(pairs[1].target_indices.tolist()) == {0} and len(pairs[1]) == 4
    (one,) = assigner(torch.zeros(1, 1, 3), boxes[:1, :1], [TARGET])
    assert as_set(one) == {(0, 0)}
    with pytest.raises(NonFiniteError):
        assigner(torch.full((1, 8, 3), math.nan), boxes[:1], [TARGET])
    layers: list[Assigner] = [assigner, OneToOneAssigner()]
    many, lone = match_layers(torch.zeros(2, 1, 8, 3), boxes[None, :1].repeat(2, 1, 1, 1), [TARGET], layers)
    assert len(many[0]) == 4 and len(lone[0]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKAssigner(0), "k: expected at least 1, found 0"),
        (lambda: SimOTAAssigner(top_k=2, min_positives=3), "min_positives <= top_k, found 3 and 2"),
        (lambda: SimOTAAssigner(select="score"), "select: expected 'cost' or 'hungarian', found 'score'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
