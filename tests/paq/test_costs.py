"""What assigners look at: costs and qualities by hand, and every broken prediction caught by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from paqdetr.errors import NonFiniteError, UserError
from paqdetr.paq import CostWeights, OneToOneAssigner, QualityAwareAssigner, match_layers
from paqdetr.paq.costs import MatchingCosts, iou_and_giou, matching_costs
from paqdetr.structures import Targets

EMPTY = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def targets_of(labels: list[int], boxes: list[list[float]], image_id: int | str | None = None) -> Targets:
    return Targets(torch.tensor(labels), torch.tensor(boxes), image_id)


def random_targets(count: int, num_classes: int = 3, image_id: int | str | None = None) -> Targets:
    centre, size = torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.3 + 0.05
    return Targets(torch.randint(num_classes, (count,)), torch.cat([centre, size], dim=1), image_id)


def random_predictions(*shape: int, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    centre, size = torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.3 + 0.05
    return torch.randn(*shape, num_classes), torch.cat([centre, size], dim=-1)


def one(logits: Tensor, boxes: Tensor, target: Targets, weights: CostWeights | None = None) -> MatchingCosts:
    """Of a single image of a single layer, (n, C) and (n, 4)."""
    return matching_costs(logits[None, None], boxes[None, None], [target], weights=weights)[0][0]


def test_by_hand() -> None:
    # Box: [.2, .6]^2. Query 0: [.4, .8] x [.2, .6], overlap .08, union .24, hull .24. Query 1: [.6, .8]^2 in the far corner,
    # touching: union .2, hull .36.
    target = targets_of([1], [[0.4, 0.4, 0.4, 0.4]])
    boxes = torch.tensor([[0.6, 0.4, 0.4, 0.4], [0.7, 0.7, 0.2, 0.2]])
    logits = torch.tensor([[2.0, math.log(3)], [0.0, 0.0]])  # of class 1: p = .75 and .5
    found = one(logits, boxes, target)
    focal = [
        0.25 * 0.25**2 * -math.log(0.75) - 0.75 * 0.75**2 * -math.log(0.25),
        0.25 * 0.5**2 * -math.log(0.5) - 0.75 * 0.5**2 * -math.log(0.5),
    ]
    l1, giou = [0.2, 0.3 + 0.3 + 0.2 + 0.2], [1 / 3, 0 - (0.36 - 0.2) / 0.36]
    cost = [2 * focal[i] + 5 * l1[i] - 2 * giou[i] for i in range(2)]
    np.testing.assert_allclose(found.cost[:, 0], cost, rtol=1e-5)
    np.testing.assert_allclose(found.iou[:, 0], [1 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(found.class_confidence[:, 0], [0.75, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.max_confidence, [1 / (1 + math.exp(-2)), 0.5], rtol=1e-6)


def test_each_weight_acts_on_its_term() -> None:
    logits, boxes = random_predictions(6)
    target = random_targets(4)
    none = dict(classification=0.0, l1=0.0, giou=0.0)
    parts = {name: one(logits, boxes, target, CostWeights(**(none | {name: 1.0}))).cost for name in none}
    whole = one(logits, boxes, target, CostWeights(classification=3.0, l1=0.5, giou=7.0)).cost
    total = 3.0 * parts["classification"] + 0.5 * parts["l1"] + 7.0 * parts["giou"]
    np.testing.assert_allclose(whole, total, atol=1e-5)
    default = 2 * parts["classification"] + 5 * parts["l1"] + 2 * parts["giou"]
    np.testing.assert_allclose(one(logits, boxes, target).cost, default, atol=1e-5)


def test_layers_and_images_of_different_counts_are_told_apart() -> None:
    targets = [random_targets(2), EMPTY, random_targets(5)]
    logits, boxes = random_predictions(4, 3, 6)
    found = matching_costs(logits, boxes, targets)
    assert [len(row) for row in found] == [3] * 4
    for layer in range(4):
        for image, target in enumerate(targets):
            alone, together = one(logits[layer, image], boxes[layer, image], target), found[layer][image]
            assert together.cost.shape == (6, len(target)) and together.cost.dtype == np.float64
            for name in ("cost", "iou", "class_confidence", "max_confidence"):
                np.testing.assert_allclose(getattr(together, name), getattr(alone, name), atol=1e-5)


def test_a_batch_without_boxes() -> None:
    logits, boxes = random_predictions(2, 3, 6)
    found = matching_costs(logits, boxes, [EMPTY] * 3)
    for row in found:
        for image in row:
            assert image.cost.shape == image.iou.shape == image.class_confidence.shape == (6, 0)
            assert image.max_confidence.shape == (6,)


def test_zero_area_is_finite() -> None:
    points = [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1]]
    found = one(torch.zeros(3, 2), torch.tensor(points), targets_of([0, 1, 0], points))
    assert np.isfinite(found.cost).all()
    np.testing.assert_allclose(found.iou, np.diag([0, 0, 1.0]), atol=1e-6)
    assert (found.cost.argmin(0) == [0, 1, 2]).all()


def test_overlaps_are_torchvisions_to_the_last_bit() -> None:
    torch.manual_seed(0)
    boxes, others = torch.rand(50, 4), torch.rand(20, 4)
    iou, giou = iou_and_giou(boxes.t()[:, :, None], others.t()[:, None])
    corners = [box_convert(x, "cxcywh", "xyxy") for x in (boxes, others)]
    assert torch.equal(iou, box_iou(*corners))
    assert torch.equal(giou, generalized_box_iou(*corners))


def test_the_class_term_is_the_same_with_more_boxes_than_classes() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 1, 30, 3), torch.rand(2, 1, 30, 4)
    labels, truth = torch.tensor([0, 2, 1, 1, 0]), torch.rand(5, 4)
    many = matching_costs(logits, boxes, [Targets(labels, truth)])
    for box in range(5):
        single = matching_costs(logits, boxes, [Targets(labels[box : box + 1], truth[box : box + 1])])
        for (all_boxes,), (one,) in zip(many, single, strict=True):
            np.testing.assert_allclose(all_boxes.cost[:, box], one.cost[:, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, boxes = (x.to(dtype) for x in random_predictions(8))
    target = random_targets(3)
    found, expected = one(logits, boxes, target), one(logits.float(), boxes.float(), target)
    for name in ("cost", "iou", "class_confidence", "max_confidence"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_float64_is_kept() -> None:
    target = Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.3, 0.3]], dtype=torch.float64))
    boxes = torch.tensor([[0.5, 0.5, 0.1, 0.3]], dtype=torch.float64)
    found = one(torch.zeros(1, 1, dtype=torch.float64), boxes, target)
    assert found.iou.item() == pytest.approx(1 / 3, abs=1e-15)


def test_nothing_is_differentiated() -> None:
    logits, boxes = (x.requires_grad_() for x in random_predictions(1, 1, 4))
    match_layers(logits, boxes, [random_targets(2)], [OneToOneAssigner()])
    assert logits.grad is None and boxes.grad is None


# --- broken predictions


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["logits", "boxes"])
@pytest.mark.parametrize("count", [0, 2])
def test_non_finite_predictions_name_layer_and_image(what: str, value: float, count: int) -> None:
    logits, boxes = random_predictions(3, 2, 5)
    (logits if what == "logits" else boxes)[1, 1, 4, 2] = value
    targets = [random_targets(3, image_id="first.jpg"), random_targets(count, image_id="second.jpg")]
    with pytest.raises(NonFiniteError) as caught:
        match_layers(logits, boxes, targets, [OneToOneAssigner()] * 3)
    message = str(caught.value)
    assert "of layer2 " in message and "['second.jpg']" in message and "first" not in message
    assert caught.value.layers == ("layer2",) and caught.value.images == ("second.jpg",)
    assert isinstance(caught.value, UserError) and "learning rate" in caught.value.remedy


def test_all_broken_layers_and_images_are_named() -> None:
    logits, boxes = random_predictions(4, 3, 5)
    logits[0, 0] = math.nan
    boxes[3, 2] = math.inf
    targets = [random_targets(1, image_id=0), random_targets(1), random_targets(1)]
    with pytest.raises(NonFiniteError, match=r"of layer1, layer4 .*\[0, 'batch position 2'\]"):
        matching_costs(logits, boxes, targets)


@pytest.mark.parametrize("assigner", [OneToOneAssigner(), QualityAwareAssigner()])
def test_assigners_called_directly_check_too(assigner) -> None:
    logits, boxes = random_predictions(1, 5)
    boxes[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"\[1234\]"):
        assigner(logits, boxes, [random_targets(2, image_id=1234)])


def test_huge_finite_logits_are_no_error() -> None:
    boxes = random_predictions(2)[1]
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e30, 1e30, 1e30]])
    assert np.isfinite(one(logits, boxes, targets_of([0, 1], [[0.5, 0.5, 0.1, 0.1]] * 2)).cost).all()


def test_boxes_without_area_have_no_overlap_and_the_least_giou() -> None:
    sides = [0.5, 0.5, 0.0, 0.0], [0.2, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.2]
    point, other, box = (torch.tensor(values).view(4, 1) for values in sides)
    for one_of, two in ((point, point), (point, other)):  # no union, and no hull with an area either
        iou, giou = iou_and_giou(one_of, two)
        assert iou.tolist() == [0.0] and giou.tolist() == [-1.0]
    iou, giou = iou_and_giou(point, box)
    assert iou.tolist() == [0.0] and giou.tolist() == [0.0]  # the hull is the box


# --- all layers together


def test_match_layers_equals_a_call_for_each_layer() -> None:
    targets = [random_targets(3), EMPTY, random_targets(7), random_targets(1)]
    logits, boxes = random_predictions(4, 4, 16)
    assigners = [
        QualityAwareAssigner(gamma=0.0),
        QualityAwareAssigner(select="score", confidence="max", min_positives=2),
        OneToOneAssigner(),
        OneToOneAssigner(),
    ]
    together = match_layers(logits, boxes, targets, assigners)
    for layer, assigner in enumerate(assigners):
        alone = assigner(logits[layer], boxes[layer], targets)
        for found, expected in zip(together[layer], alone, strict=True):
            assert torch.equal(found.query_indices, expected.query_indices)
            assert torch.equal(found.target_indices, expected.target_indices)


def test_match_layers_wants_an_assigner_for_each_layer() -> None:
    logits, boxes = random_predictions(3, 1, 4)
    with pytest.raises(ValueError, match="assigners: expected one for each of 3 layers, found 2"):
        match_layers(logits, boxes, [random_targets(1)], [OneToOneAssigner()] * 2)


def test_match_layers_uses_the_weights_it_is_given() -> None:
    # Query 0 has the class, query 1 the place.
    target = targets_of([0], [[0.3, 0.3, 0.2, 0.2]])
    logits = torch.tensor([[5.0], [-5.0]])[None, None]
    boxes = torch.tensor([[0.7, 0.7, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]])[None, None]

    def chosen(weights: CostWeights) -> int:
        pairs = match_layers(logits, boxes, [target], [OneToOneAssigner()], weights=weights)
        return int(pairs[0][0].query_indices)

    assert chosen(CostWeights(classification=2.0, l1=0.0, giou=0.0)) == 0
    assert chosen(CostWeights(classification=0.0, l1=5.0, giou=2.0)) == 1
