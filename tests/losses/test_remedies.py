"""Remedies against what several positives cost: each term by hand, on predictions whose matches are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paqdetr.config import LossConfig, load_config
from paqdetr.errors import ConfigError
from paqdetr.losses import Criterion, build_criterion
from paqdetr.losses.boxes import FlatPairs, box_losses
from paqdetr.models.decoder import Decoded
from paqdetr.models.detector import DetectorOutput
from paqdetr.models.proposals import AllTokens, Proposals
from paqdetr.paq import Mixture, Pairs
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


def output(*, many: int = 0, proposals: bool = False, everything: bool = False) -> DetectorOutput:
    layers = replace(decoded(), many=decoded(many) if many else None)
    found = None
    if proposals or everything:
        one = decoded(1)
        tokens = AllTokens(one.logits[0, ..., :1], one.boxes[0], torch.ones(1, 8, dtype=torch.bool))
        found = Proposals(
            one.logits[0], one.boxes[0], torch.arange(8)[None], one.boxes[0], tokens if everything else None
        )
    return DetectorOutput(
        pred_logits=layers.logits[-1],
        pred_boxes=layers.boxes[-1],
        layers=layers,
        proposals=found,
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


# --- one-to-one beside one-to-many


def test_one_to_one_beside_one_to_many() -> None:
    report = criterion(one_to_one_weight=0.5, one_to_many_weight=2.0)(output(), TARGETS)
    for layer in (1, 2):
        assert values(report.terms, f"layer{layer}") == times(2, of_pairs(3))
        assert values(report.terms, f"one_to_one{layer}") == times(0.5, of_pairs(1))
    assert values(report.terms, "layer3") == times(1, of_pairs(1))
    assert len(report.terms) == 15 and report.positives_per_box == [3, 3, 1]
    assert float(report.total) == pytest.approx(sum(float(term) for term in report.terms.values()))


def test_beside_it_is_there_as_long_as_one_to_many_is() -> None:
    rule = criterion(one_to_one_weight=0.5, one_to_many_weight=2.0, one_to_many_until=0.5)
    before, after = (rule(output(), TARGETS, progress=progress).terms for progress in (0.49, 0.5))
    plain = criterion(assigner="one_to_one")(output(), TARGETS).terms
    assert "one_to_one1/l1" in before
    assert {name: float(term) for name, term in after.items()} == {
        name: float(term) for name, term in plain.items()
    }


def test_a_single_layer_has_nothing_to_stand_beside() -> None:
    found = replace(output(), layers=decoded(1))
    report = criterion(one_to_one_weight=0.5)(found, TARGETS)
    assert list(report.terms) == ["layer1/class", "layer1/l1", "layer1/giou"]
    assert values(report.terms, "layer1") == times(1, of_pairs(1))


# --- heads of their own


@pytest.mark.parametrize("many", [2, 3])
def test_heads_of_their_own_leave_the_others_one_to_one(many: int) -> None:
    report = criterion(one_to_many_weight=2.0)(output(many=many), TARGETS)
    for layer in (1, 2, 3):
        assert values(report.terms, f"layer{layer}") == times(1, of_pairs(1))
    for layer in range(1, many + 1):
        assert values(report.terms, f"one_to_many{layer}") == times(2, of_pairs(3))
    assert len(report.terms) == 9 + 3 * many
    assert report.positives_per_box == [3, 3, 3 if many == 3 else 1]
    assert [len(row[0]) for row in report.pairs] == [1, 1, 1]


def test_idle_heads_weigh_nothing_and_have_a_gradient() -> None:
    found = output(many=2)
    assert found.layers.many is not None
    logits, boxes = (x.requires_grad_() for x in (found.layers.many.logits, found.layers.many.boxes))
    rule = criterion(one_to_many_until=0.5)
    rule(found, TARGETS, progress=0.2).total.backward()
    assert logits.grad is not None and logits.grad.any() and boxes.grad is not None and boxes.grad.any()
    logits.grad = boxes.grad = None
    report = rule(found, TARGETS, progress=0.5)
    report.total.backward()
    assert logits.grad is not None and not logits.grad.any() and boxes.grad is not None
    assert report.total.item() == criterion(assigner="one_to_one")(output(), TARGETS).total.item()
    assert report.positives_per_box == [1, 1, 1]


# --- the number of positives falls


def test_positives_fall_in_equal_shares_of_the_time() -> None:
    rule = criterion(positives_schedule="linear", one_to_many_until=0.6, top_k=3)
    steps = {0.0: 3, 0.19: 3, 0.21: 2, 0.39: 2, 0.41: 1, 0.59: 1, 0.6: 1, 1.0: 1}
    for progress, most in steps.items():
        assert rule.most_positives(progress) == most
        report = rule(output(), TARGETS, progress=progress)
        assert report.positives_per_box == [most, most, 1]
        assert values(report.terms, "layer1") == times(1, of_pairs(most))


@pytest.mark.parametrize("assigner", ["quality_aware", "simota", "fixed_k"])
@pytest.mark.parametrize("everything", [False, True])
def test_every_rule_and_the_encoder_follow_the_schedule(assigner: Any, everything: bool) -> None:
    settings = dict(assigner=assigner, encoder_assigner=assigner, gamma=0.0, min_positives=2)
    rule = criterion(**settings, positives_schedule="linear")
    constant = criterion(**settings)
    found = output(proposals=True, everything=everything)
    for progress, most in ((0.0, 3), (0.5, 2), (0.9, 1)):
        report = rule(found, TARGETS, progress=progress)
        # The sum of the three IoU is 2.4: rounded up 3, down 2.
        expected = min(most, 2 if assigner == "simota" else 3)
        assert report.positives_per_box == [expected, expected, 1]
        assert float(report.terms["encoder/l1"]) == pytest.approx(of_pairs(expected)[1], rel=1e-4, abs=1e-6)
        assert constant.most_positives(progress) == 3


# --- extra positives that count less


@pytest.mark.parametrize("classification", ["varifocal", "focal"])
def test_damped_positives(classification: Any) -> None:
    report = criterion(rank_damping=1.5, classification=classification)(output(), TARGETS)
    weights = [math.exp(-rank / 1.5) for rank in range(3)]  # equal probabilities: ranked by IoU
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
    undamped = criterion(classification=classification)(output(), TARGETS)
    assert values(report.terms, "layer3") == values(undamped.terms, "layer3")


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


# --- the normaliser


@pytest.mark.parametrize("num_boxes", [None, 5.0])
def test_divided_by_positives(num_boxes: float | None) -> None:
    found = output(proposals=True)
    rule = criterion(normalizer="positives", one_to_one_weight=1.0)
    report = rule(found, TARGETS, num_boxes=num_boxes)
    boxes = num_boxes or 1.0
    assert values(report.terms, "layer1") == times(1 / (3 * boxes), of_pairs(3))
    for name in ("layer3", "encoder", "one_to_one2"):
        assert values(report.terms, name) == times(1 / boxes, of_pairs(1))


def test_positives_of_all_tokens() -> None:
    rule = criterion(normalizer="positives", encoder_assigner="fixed_k")
    report = rule(output(everything=True), TARGETS)
    assert float(report.terms["encoder/l1"]) == pytest.approx(of_pairs(3)[1] / 3, rel=1e-4)


def test_a_batch_without_boxes_is_divided_by_one() -> None:
    nothing = [Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))]
    settings = dict(rank_damping=1.5, positives_schedule="linear", one_to_one_weight=1.0)
    report = criterion(normalizer="positives", **settings)(output(proposals=True), nothing)
    for name in ("layer1", "layer3", "encoder", "one_to_one1"):
        assert values(report.terms, name) == times(1, of_pairs(0))


# --- settings


def test_all_are_off_by_default_and_in_the_paper() -> None:
    remedies = ("one_to_many_weight", "one_to_one_weight", "positives_schedule", "rank_damping", "normalizer")
    parts = ("one_to_many_heads", "distinct_proposals", "mixture", "normalize_summary")
    assert [getattr(LossConfig(), key) for key in remedies] == [1.0, 0.0, "constant", None, "boxes"]
    for name in ("paq_dino_nano", "paq_dino_r50", "paq_deformable_detr_r50", "paq_dn_detr_r50"):
        config = load_config(name, {"preset": "paper"})
        assert all(getattr(config.loss, key) == getattr(LossConfig(), key) for key in remedies)
        assert [getattr(config.model, key) for key in parts] == ["none", None, "replace", False]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dino_nano", {"loss.one_to_one_weight": 1.0}, "one_to_one_weight needs an assigner"),
        ("dino_nano", {"loss.one_to_many_weight": 0.5}, "one_to_many_weight needs an assigner with several"),
        ("dino_nano", {"loss.rank_damping": 1.5}, "rank_damping needs an assigner or encoder_assigner"),
        ("dino_nano", {"loss.positives_schedule": "linear"}, "positives_schedule needs an assigner"),
        (
            "paq_dino_nano",
            {"loss.one_to_one_weight": 1.0, "model.one_to_many_heads": "all"},
            "loss.one_to_one_weight needs model.one_to_many_heads=none",
        ),
        (
            "dino_nano",
            {"model.one_to_many_heads": "all", "loss.encoder_assigner": "simota"},
            "model.one_to_many_heads=all needs an assigner with several positives a box, and loss.assigner is one_to_one: "
            "choose loss.assigner=quality_aware, fixed_k or simota, or model.one_to_many_heads=none",
        ),
        ("dino_nano", {"model.mixture": "residual"}, "mixture=residual needs queries=patterns"),
        (
            "dn_detr_nano",
            {"model.distinct_proposals": 0.8},
            "distinct_proposals=0.8 needs positions=proposals",
        ),
    ],
)
def test_settings_that_would_do_nothing(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    assert message in caught.value.message
