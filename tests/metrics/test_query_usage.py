"""The collector against numbers by hand and a slow reference; and that order and sharing out change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paqdetr.errors import NonFiniteError
from paqdetr.metrics import QueryUsage, Spread, gini
from paqdetr.paq import OneToOneAssigner
from paqdetr.structures import Targets

N, C, M, D = 6, 3, 5, 4


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def image(seed: int) -> dict[str, Any]:
    """Outputs and truth of one image."""
    draw = torch.Generator().manual_seed(seed)
    boxes = torch.rand(seed % 4, 4, generator=draw) * 0.4 + 0.2
    return {
        "pred_logits": torch.randn(1, N, C, generator=draw) * 2 - 1,
        "pred_boxes": torch.rand(1, N, 4, generator=draw) * 0.4 + 0.2,
        "targets": [Targets(torch.randint(C, (seed % 4,), generator=draw), boxes)],
        "weights": torch.randn(1, N, M, generator=draw).softmax(-1),
        "content": torch.randn(1, N, D, generator=draw),
    }


def batch(images: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {key: torch.cat([one[key] for one in images]) for key in images[0] if key != "targets"}
    return joined | {"targets": [target for one in images for target in one["targets"]]}


def collected(seeds: list[int], sizes: int = 1, **settings: Any) -> QueryUsage:
    usage = QueryUsage(num_queries=N, **settings)
    for start in range(0, len(seeds), sizes):
        usage.update(**batch([image(seed) for seed in seeds[start : start + sizes]]))
    return usage


def test_by_hand() -> None:
    """Two images, three queries; query 2 is sure of both, query 1 of one, query 0 of none."""
    usage = QueryUsage(num_queries=3)
    scores = torch.tensor([[0.1, 0.45, 0.9], [0.2, 0.2, 0.35]])
    logits = torch.stack([torch.logit(scores), torch.full_like(scores, -9)], dim=-1)
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.1, 0.3]]]).repeat(2, 1, 1)
    targets = [Targets(torch.tensor([0, 0]), boxes[0, [2, 1]] + 0.01), Targets(torch.tensor([0]), boxes[1, [2]] - 0.03)]
    weights = torch.tensor([[1.0, 0], [0.5, 0.5], [0.25, 0.75]]).expand(2, -1, -1)
    content = torch.tensor([[1.0, 0], [0, 2], [3, 0]]).expand(2, -1, -1)
    usage.update(logits, boxes, targets, weights, content=content)
    found = usage.report()

    assert (found.num_queries, found.images, found.boxes_per_image) == (3, 2, 1.5)
    assert [spread.threshold for spread in found.activations] == [0.3, 0.4, 0.5]
    assert [spread.counts.tolist() for spread in found.activations] == [[0, 1, 2], [0, 1, 1], [0, 0, 1]]
    low, middle, high = found.activations
    assert low.gini == pytest.approx(4 / 9) and low.per_image == 1.5 and (low.unused, low.half) == (1, 1)
    assert middle.gini == pytest.approx(1 / 3) and high.gini == pytest.approx(2 / 3)
    # Three activations in two images, as there are boxes: any threshold from .2 to .35, the highest that has three.
    assert found.target == 1.5 and found.equal is not None
    assert found.equal.counts.tolist() == [0, 1, 2] and 0.346 < found.equal.threshold < 0.35  # type: ignore[operator]
    assert found.positives is not None and found.positives.counts.tolist() == [0, 1, 2]
    assert found.places is not None
    assert found.places.mean[2] == pytest.approx([0.79, 0.79, 0.09, 0.29], abs=1e-6)
    assert found.places.std[2] == pytest.approx([0.02] * 4, abs=1e-6)
    assert found.places.mean[1] == pytest.approx([0.51, 0.51, 0.21, 0.21], abs=1e-6)
    assert np.isnan(found.places.mean[0]).all()
    # By index and rank of the score: query 2 is the best twice, query 1 the second once.
    assert found.places.ranks.tolist() == [[0, 0, 0], [0, 1, 0], [2, 0, 0]]
    patterns = found.patterns
    assert patterns is not None and patterns.mass == pytest.approx([1.75 / 3, 1.25 / 3])
    assert patterns.peak == pytest.approx([1, 0.75]) and patterns.leads.tolist() == [4, 2]
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert patterns.entropy == pytest.approx((0 + 1 + quarter) / 3)
    assert patterns.gini == pytest.approx((1.75 - 1.25) / 3 / 2) and patterns.dead == 0
    assert found.query_cosine == pytest.approx(1 / 3)  # one of three pairs is parallel, two are orthogonal


@pytest.mark.parametrize("sizes", [1, 3])
def test_against_a_slow_reference(sizes: int) -> None:
    seeds = list(range(12))
    found = collected(seeds, sizes).report()
    every = [image(seed) for seed in seeds]
    scores = np.array([[float(q.sigmoid().max()) for q in one["pred_logits"][0]] for one in every])
    for spread in found.activations:
        assert spread.counts.tolist() == (scores > spread.threshold).sum(0).tolist()
        assert spread.gini == gini((scores > spread.threshold).sum(0))
    assert found.equal is not None and found.equal.threshold is not None and found.target is not None
    assert found.equal.counts.tolist() == (scores > found.equal.threshold).sum(0).tolist()
    # No other threshold comes nearer to as many activations as boxes.
    distances = [abs((scores > threshold).sum() / 12 - found.target) for threshold in np.linspace(0, 1, 10_001)]
    assert abs(found.equal.per_image - found.target) == pytest.approx(min(distances))
    expected, ranks, places = [0] * N, np.zeros((N, N), dtype=int), [[] for _ in range(N)]
    for one, row in zip(every, scores, strict=True):
        pairs = OneToOneAssigner()(one["pred_logits"], one["pred_boxes"], one["targets"])[0]
        for query, box in zip(pairs.query_indices.tolist(), pairs.target_indices.tolist(), strict=True):
            expected[query] += 1
            ranks[query, int((row > row[query]).sum())] += 1
            places[query].append(one["targets"][0].boxes[box].numpy())
    assert found.positives is not None and found.places is not None
    assert found.positives.counts.tolist() == expected and sum(expected) == 18
    assert found.places.ranks.tolist() == ranks.tolist()
    for query, boxes in enumerate(places):
        if boxes:
            assert found.places.mean[query] == pytest.approx(np.mean(boxes, axis=0), abs=1e-6)
            assert found.places.std[query] == pytest.approx(np.std(boxes, axis=0), abs=1e-4)


def same(one: Any, other: Any) -> bool:
    """To the last bit."""
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


@pytest.mark.parametrize(
    ("order", "sizes", "cut", "other_sizes"),
    [([5, 2, 0, 1, 4, 3], 1, 3, 1), ([0, 1, 2, 3, 4, 5], 2, 0, 3), ([3, 4, 5, 2, 1, 0], 4, 5, 1)],
)
def test_neither_order_nor_batches_nor_sharing_out_change_anything(
    order: list[int], sizes: int, cut: int, other_sizes: int
) -> None:
    straight = collected(list(range(6))).report()
    first, second = collected(order[:cut], sizes), collected(order[cut:], other_sizes)
    first.merge(pickle.loads(pickle.dumps(second)))
    assert same(first.report(), straight) and first.images == 6
    assert not same(collected(order[1:]).report(), straight)


def test_equal_activations_make_models_comparable() -> None:
    """The same ranking of queries in two calibrations: view (a) differs, view (b) does not."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(40, N, 1, generator=draw) + torch.arange(N)[:, None] * 0.5 - 2
    boxes = torch.rand(40, N, 4, generator=draw)
    reports = []
    for shift in (0.0, -1.0):
        usage = QueryUsage(num_queries=N)
        usage.update(logits + shift, boxes)
        reports.append(usage.report(activations_per_image=2.0))
    bold, shy = reports
    assert abs(bold.activations[2].gini - shy.activations[2].gini) > 0.1
    assert bold.equal is not None and shy.equal is not None
    assert bold.equal.counts.tolist() == shy.equal.counts.tolist()
    assert bold.equal.per_image == pytest.approx(2, abs=0.05) and bold.equal.threshold > shy.equal.threshold  # type: ignore[operator]
    assert bold.positives is None and bold.places is None and bold.boxes_per_image is None
    none = QueryUsage(num_queries=N)
    none.update(logits, boxes)
    assert none.report().equal is None, "without boxes nobody can say how many"


@pytest.mark.parametrize("extreme", [-1e4, -8.0, 8.0, 1e4, -math.inf, math.inf])
def test_scores_beyond_the_histogram(extreme: float) -> None:
    usage = QueryUsage(num_queries=2)
    logits = torch.tensor([[[extreme], [0.0]]])
    usage.update(logits, torch.full((1, 2, 4), 0.5))
    found = usage.report(activations_per_image=1).equal
    assert found is not None
    assert found.counts.tolist() == ([1, 0] if extreme >= 8 else [0, 1]), "one of two, whatever its score"


def test_rank_order_alone() -> None:
    """Counts that fall with the index are explained by it; a single busy query late in the order is not."""
    falling = Spread(counts=np.array([8, 4, 2, 1]), images=10, ranked=True)
    assert falling.by_rank == pytest.approx(falling.gini)
    late = Spread(counts=np.array([0, 0, 0, 9]), images=10, ranked=True)
    assert late.by_rank == pytest.approx(0) and late.gini == 0.75
    assert Spread(counts=np.array([8, 4]), images=10).by_rank is None


def test_a_spread_says_how_few_do_half() -> None:
    assert Spread(counts=np.array([5, 1, 1, 1, 1, 1]), images=5).half == 1
    assert Spread(counts=np.array([4, 1, 1, 1, 1, 1]), images=5).half == 2
    assert Spread(counts=np.zeros(3, dtype=np.int64), images=5).half == 0
    norms = Spread(counts=np.array([0.5, 0.0]), images=2, discrete=False)
    assert norms.chance is None and norms.per_image == 0.25


def test_dead_patterns() -> None:
    usage = QueryUsage(num_queries=2)
    row = torch.tensor([0.55, 0.41, 0.03, 0.01])  # a tenth of the equal share is 0.025
    usage.update(torch.zeros(1, 2, 1), torch.full((1, 2, 4), 0.5), weights=row.expand(1, 2, 4))
    patterns = usage.report().patterns
    assert patterns is not None and (patterns.dead, patterns.never_lead) == (1, 3)
    assert usage.report(dead_share=0.2).patterns.dead == 2  # type: ignore[union-attr]
    assert usage.report(dead_share=0).patterns.dead == 0  # type: ignore[union-attr]
    uniform = QueryUsage(num_queries=2)
    uniform.update(torch.zeros(1, 2, 1), torch.full((1, 2, 4), 0.5), weights=torch.full((1, 2, 4), 0.25))
    patterns = uniform.report().patterns
    assert patterns is not None and (patterns.dead, patterns.gini) == (0, 0)
    assert patterns.entropy == pytest.approx(1) and patterns.effective == pytest.approx(4)


def test_more_boxes_than_queries_and_none_at_all() -> None:
    usage = QueryUsage(num_queries=2)
    many = Targets(torch.zeros(5, dtype=torch.int64), torch.rand(5, 4) * 0.3 + 0.3)
    none = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    usage.update(torch.zeros(2, 2, 1), torch.rand(2, 2, 4), [many, none])
    found = usage.report()
    assert found.positives is not None and found.positives.counts.tolist() == [1, 1]
    assert found.boxes_per_image == 2.5 and found.positives.per_image == 1
    nothing = QueryUsage(num_queries=2)
    nothing.update(torch.zeros(1, 2, 1), torch.rand(1, 2, 4), [none])
    found = nothing.report()
    assert found.equal is None and found.positives is not None and found.positives.gini == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_json_and_rows() -> None:
    gradients = Spread(counts=np.arange(N, dtype=np.float64), images=12, discrete=False, ranked=True)
    found = collected(list(range(12)), ranked=True).report(gradients=gradients)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["positives"]["counts"] == found.positives.counts.tolist()  # type: ignore[union-attr]
    assert len(content["equal"]["lorenz"]) == 101 and content["patterns"]["num_patterns"] == M
    rows = found.rows()
    assert [row["view"] for row in rows] == list("aaabcde")
    assert all(row["chance"] is not None and row["by_rank"] is not None for row in rows[:5])
    assert rows[5]["chance"] is None and rows[5]["by_rank"] == 0
    assert len({tuple(row) for row in rows}) == 1


def test_in_inference_mode_and_out_of_it() -> None:
    usage = QueryUsage(num_queries=N)
    with torch.inference_mode():
        usage.update(**image(1))
    usage.update(**image(2))
    assert same(usage.report(), collected([1, 2]).report())


def test_half_precision() -> None:
    usage = QueryUsage(num_queries=N)
    one = image(3)
    halves = {key: one[key].bfloat16() for key in ("pred_logits", "pred_boxes", "weights", "content")}
    usage.update(targets=one["targets"], **halves)
    found = usage.report()
    assert found.positives is not None and found.positives.counts.sum() == 3


def test_matches_that_are_known_already() -> None:
    usage, one = QueryUsage(num_queries=N), image(3)
    pairs = OneToOneAssigner()(one["pred_logits"], one["pred_boxes"], one["targets"])
    usage.update(**one, pairs=pairs)
    assert same(usage.report(), collected([3]).report())


def broken(name: str, value: Tensor | list[Targets]) -> dict[str, Any]:
    return image(3) | {name: value}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (broken("pred_logits", torch.zeros(1, N + 1, C)), r"pred_logits: expected \(B, 6, C\)"),
        (broken("pred_boxes", torch.zeros(1, N, 5)), r"pred_boxes: expected \(1, 6, 4\)"),
        (broken("targets", []), "targets: expected those of 1 images, found 0"),
        (broken("weights", torch.zeros(1, N - 1, M)), "weights: expected"),
        (broken("weights", torch.zeros(1, N, M + 1)), "weights: 5 patterns before, now 6"),
        (broken("content", torch.zeros(2, N, D)), "content: expected"),
    ],
)
def test_shapes_that_do_not_fit(arguments: dict[str, Any], words: str) -> None:
    usage = collected([0])
    with pytest.raises(ValueError, match=words):
        usage.update(**arguments)
    assert usage.images == 1


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match="no image was seen"):
        QueryUsage(num_queries=3).report()
    with pytest.raises(ValueError, match="found 0"):
        QueryUsage(num_queries=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        QueryUsage(num_queries=3, thresholds=(30,))
    with pytest.raises(ValueError, match="more than 0"):
        collected([0]).report(activations_per_image=0)
    with pytest.raises(ValueError, match="queries and thresholds"):
        collected([0]).merge(QueryUsage(num_queries=N + 1))
    with pytest.raises(ValueError, match=r"mass: \(5,\) here, \(2,\) there"):
        other = QueryUsage(num_queries=N)
        other.update(torch.zeros(1, N, 1), torch.zeros(1, N, 4), weights=torch.ones(1, N, 2) / 2)
        collected([0]).merge(other)


def test_nan_is_never_counted_in_silence() -> None:
    usage, one = QueryUsage(num_queries=N), image(0)
    one["pred_logits"][0, 2, 1] = math.nan
    del one["targets"]
    usage.update(**one)
    with pytest.raises(NonFiniteError, match="1 of 6 scores were NaN"):
        usage.report()
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        usage.update(**image(1) | {"pred_boxes": torch.full((1, N, 4), math.nan)})
