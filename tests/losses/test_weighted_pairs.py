"""The loss by hand, on predictions whose matches are known: whole positives, and assigners that weight their pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paqdetr.config import LossConfig
from paqdetr.losses import Criterion, build_criterion
from paqdetr.losses.criterion import FlatPairs, box_losses
from paqdetr.models.outputs import Decoded, DetectorOutput
from paqdetr.paq import Assigner, MatchingCosts, Mixture, Pairs
from paqdetr.structures import Targets

# One box of class 0 in an image of 8 queries, three layers. Query q's box is as wide and as high as the truth but moved to the
# right by SHIFT[q] of its width, so that IoU = (1 - s) / (1 + s), L1 = 0.2 s, GIoU = IoU. Others lie far away.
SHIFT = (0.0, 0.1, 0.25)
IOU = tuple((1 - s) / (1 + s) for s in SHIFT)
LOGIT = -2.0  # of every class of every query
TARGETS = [Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]


def decoded(layers: int = 3) -> Decoded:
    boxes = torch.tensor([[0.5 + 0.2 * s, 0.5, 0.2, 0.2] for s in SHIFT] + [[0.1, 0.1, 0.05, 0.05]] * 5)
    return Decoded(torch.full((layers, 1, 8, 2), LOGIT), boxes.expand(layers, 1, 8, 4).clone())


def output() -> DetectorOutput:
    layers = decoded()
    return DetectorOutput(
        pred_logits=layers.logits[-1],
        pred_boxes=layers.boxes[-1],
        layers=layers,
        proposals=None,
        mixture=Mixture(torch.zeros(1, 8, 4), None),
    )


def criterion(**settings: Any) -> Criterion:
    """Every box has three positives, queries 0, 1 and 2, in layers 1 and 2."""
    return build_criterion(LossConfig(**{"assigner": "fixed_k", "top_k": 3} | settings))


def focal(goal: float) -> float:
    p = 1 / (1 + math.exp(-LOGIT))
    return -0.25 * (1 - p) ** 2 * math.log(p) if goal else -0.75 * p**2 * math.log(1 - p)


def varifocal(goal: float) -> float:
    p = 1 / (1 + math.exp(-LOGIT))
    cross_entropy = -goal * math.log(p) - (1 - goal) * math.log(1 - p)
    return (goal if goal > 0 else 0.75 * p**2) * cross_entropy


def values(terms: dict[str, Tensor], place: str) -> list[float]:
    return [float(terms[f"{place}/{kind}"]) for kind in ("class", "l1", "giou")]


def of_pairs(count: int) -> list[float]:
    """Class (focal), L1 and GIoU of the first `count` queries as positives of the one box, 16 logits in all."""
    return [
        count * focal(1) + (16 - count) * focal(0),
        5 * sum(0.2 * s for s in SHIFT[:count]),
        2 * sum(1 - iou for iou in IOU[:count]),
    ]


def times(factor: float, numbers: list[float]) -> Any:
    return pytest.approx([factor * number for number in numbers], rel=1e-4, abs=1e-6)


def test_the_example_is_as_it_says() -> None:
    report = criterion()(output(), TARGETS)
    for layer in (1, 2):
        assert report.pairs[layer - 1][0].query_indices.tolist() == [0, 1, 2]
        assert values(report.terms, f"layer{layer}") == times(1, of_pairs(3))
    assert values(report.terms, "layer3") == times(1, of_pairs(1))
    assert report.positives_per_box == [3, 3, 1]


class Halving:
    """Another assigner's pairs, of weight 1, 1/2, 1/4, ... in the order of their queries."""

    def __init__(self, assigner: Assigner) -> None:
        self.assigner = assigner

    def solve(self, image: MatchingCosts) -> Pairs:
        pairs = self.assigner.solve(image)
        return replace(pairs, weights=0.5 ** torch.arange(len(pairs), dtype=torch.float64))


@pytest.mark.parametrize("classification", ["varifocal", "focal"])
def test_weighted_positives(classification: Any) -> None:
    rule, whole = criterion(classification=classification), criterion(classification=classification)
    rule.intermediate = Halving(rule.intermediate)
    report = rule(output(), TARGETS)
    weights = [1.0, 0.5, 0.25]
    if classification == "varifocal":
        positives = sum(varifocal(w * iou) for w, iou in zip(weights, IOU, strict=True))
        negative = varifocal(0)
    else:
        positives = sum(w * focal(1) + (1 - w) * focal(0) for w in weights)
        negative = focal(0)
    expected = [
        positives + 13 * negative,
        5 * sum(0.2 * w * s for w, s in zip(weights, SHIFT, strict=True)),
        2 * sum(w * (1 - iou) for w, iou in zip(weights, IOU, strict=True)),
    ]
    assert values(report.terms, "layer1") == times(1, expected)
    assert report.positives_per_box == [3, 3, 1]
    assert values(report.terms, "layer3") == values(whole(output(), TARGETS).terms, "layer3")


def test_weights_reach_the_flat_pairs() -> None:
    whole = Pairs(torch.tensor([1]), torch.tensor([0]))
    part = Pairs(torch.tensor([0, 2]), torch.tensor([0, 0]), torch.tensor([1.0, 0.25]))
    mixed = FlatPairs.from_pairs([[whole], [part]], TARGETS, torch.device("cpu"))
    assert mixed.weight is not None and mixed.weight.tolist() == [1, 1, 0.25]
    assert FlatPairs.from_pairs([[whole]], TARGETS, torch.device("cpu")).weight is None
    l1, giou, iou = box_losses(decoded(2).boxes, mixed)
    assert l1.tolist() == pytest.approx([0.02, 0.25 * 0.05], rel=1e-4)
    assert giou.tolist() == pytest.approx([1 - IOU[1], 0.25 * (1 - IOU[2])], rel=1e-4)
    assert iou.tolist() == pytest.approx([IOU[1], IOU[0], IOU[2]], rel=1e-4)
