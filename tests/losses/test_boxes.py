"""Sums of box losses by hand, layer by layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from paqdetr.losses.criterion import FlatPairs, box_losses
from paqdetr.paq import Pairs
from paqdetr.structures import Targets

CPU = torch.device("cpu")


def pairs_of(*rows: tuple[int, int]) -> Pairs:
    queries = torch.tensor([query for query, _ in rows], dtype=torch.int64)
    return Pairs(queries, torch.tensor([target for _, target in rows], dtype=torch.int64))


TARGETS = [
    Targets(torch.tensor([4, 2]), torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2]])),
    Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)),
    Targets(torch.tensor([1]), torch.tensor([[0.3, 0.3, 0.2, 0.2]])),
]
# Layer 0: four pairs; layer 1: none; layer 2: one.
PAIRS = [
    [pairs_of((0, 1), (2, 0), (3, 0)), pairs_of(), pairs_of((1, 0))],
    [pairs_of(), pairs_of(), pairs_of()],
    [pairs_of(), pairs_of(), pairs_of((0, 0))],
]


def test_flat_pairs() -> None:
    flat = FlatPairs.from_pairs(PAIRS, TARGETS, CPU)
    assert flat.layer.tolist() == [0, 0, 0, 0, 2]
    assert flat.image.tolist() == [0, 0, 0, 2, 2]
    assert flat.query.tolist() == [0, 2, 3, 1, 0]
    assert flat.label.tolist() == [2, 4, 4, 1, 1]
    torch.testing.assert_close(flat.box[0], TARGETS[0].boxes[1])
    torch.testing.assert_close(flat.box[3], TARGETS[2].boxes[0])


def test_sums_by_hand() -> None:
    boxes = torch.full((3, 3, 4, 4), 0.9)
    boxes[0, 0, 0] = torch.tensor([0.5, 0.5, 0.2, 0.2])  # perfect
    boxes[0, 0, 2] = torch.tensor([0.6, 0.4, 0.4, 0.4])  # L1 .2, overlap .08, union .24 = hull: IoU = GIoU = 1/3
    boxes[0, 0, 3] = torch.tensor([0.7, 0.7, 0.2, 0.2])  # L1 1, touching corners: IoU 0, union .2, hull .36
    boxes[0, 2, 1] = torch.tensor([0.3, 0.3, 0.1, 0.2])  # L1 .1, half of it: IoU = GIoU = .5
    boxes[2, 2, 0] = torch.tensor([0.7, 0.3, 0.2, 0.2])  # L1 .4, apart by .2: union .08, hull .12, GIoU -1/3
    l1, giou, iou = box_losses(boxes, FlatPairs.from_pairs(PAIRS, TARGETS, CPU))
    torch.testing.assert_close(l1, torch.tensor([0 + 0.2 + 1.0 + 0.1, 0, 0.4]))
    torch.testing.assert_close(giou, torch.tensor([0 + 2 / 3 + (1 + 0.16 / 0.36) + 0.5, 0, 4 / 3]))
    torch.testing.assert_close(iou, torch.tensor([1, 1 / 3, 0, 0.5, 0]), atol=1e-6, rtol=1e-6)


def test_gradient_reaches_the_paired_predictions_alone() -> None:
    boxes = (torch.rand(3, 3, 4, 4) * 0.5 + 0.2).requires_grad_()
    flat = FlatPairs.from_pairs(PAIRS, TARGETS, CPU)
    l1, giou, iou = box_losses(boxes, flat)
    assert not iou.requires_grad
    (l1.sum() + giou.sum()).backward()
    assert boxes.grad is not None
    touched = (boxes.grad != 0).any(-1).nonzero().tolist()
    assert touched == torch.stack([flat.layer, flat.image, flat.query], dim=1).tolist()
    (gradient,) = torch.autograd.grad(box_losses(boxes, flat)[0].sum(), boxes)
    expected = (boxes[flat.layer, flat.image, flat.query] - flat.box).sign()
    assert torch.equal(gradient[flat.layer, flat.image, flat.query], expected)


def test_no_pairs_is_zero_but_differentiable() -> None:
    boxes = torch.rand(2, 3, 4, 4, requires_grad=True)
    l1, giou, iou = box_losses(boxes, FlatPairs.from_pairs([[pairs_of()] * 3] * 2, TARGETS, CPU))
    assert l1.tolist() == giou.tolist() == [0, 0] and iou.shape == (0,)
    (l1.sum() + giou.sum()).backward()
    assert boxes.grad is not None and (boxes.grad == 0).all()


def test_no_targets_at_all() -> None:
    flat = FlatPairs.from_pairs([[pairs_of()]], [TARGETS[1]], CPU)
    assert flat.label.shape == (0,) and flat.box.shape == (0, 4)
    assert len(flat.layer) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype: torch.dtype) -> None:
    boxes = torch.rand(3, 3, 4, 4).to(dtype)
    flat = FlatPairs.from_pairs(PAIRS, TARGETS, CPU)
    for found, expected in zip(box_losses(boxes, flat), box_losses(boxes.float(), flat), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_float64_is_kept() -> None:
    """Box and prediction differ by what float32 cannot hold."""
    predicted = torch.tensor([0.5, 0.5, 0.2, 0.2], dtype=torch.float64)
    truth = predicted + torch.tensor([1e-9, 0, 0, 0], dtype=torch.float64)
    target = Targets(torch.tensor([0]), truth[None])
    pairs = Pairs(torch.tensor([0]), torch.tensor([0]), torch.tensor([0.5], dtype=torch.float64))
    flat = FlatPairs.from_pairs([[pairs]], [target], CPU)
    l1, giou, iou = box_losses(predicted.reshape(1, 1, 1, 4), flat)
    assert l1.dtype == giou.dtype == iou.dtype == torch.float64
    assert l1.item() == pytest.approx(0.5e-9, rel=1e-6) and giou.item() == pytest.approx(5e-9, rel=1e-2)
    # Targets of more digits than the predictions change nothing of the losses' dtype.
    assert box_losses(predicted.float().reshape(1, 1, 1, 4), flat)[0].dtype == torch.float32


@pytest.mark.parametrize("side", [0.1, 1e-2, 1e-3])
def test_small_boxes_count_like_large_ones(side: float) -> None:
    """A box of a pixel: GIoU must not drown in a library's epsilon."""
    target = Targets(torch.tensor([0]), torch.tensor([[side, side, side, side]]))
    flat = FlatPairs.from_pairs([[pairs_of((0, 0), (1, 0))]], [target], CPU)
    boxes = torch.tensor([[side, side, side, side], [side, side, side / 2, side]])[None, None]
    _, giou, iou = box_losses(boxes, flat)
    torch.testing.assert_close(giou, torch.tensor([0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(iou, torch.tensor([1.0, 0.5]), atol=1e-5, rtol=0)


def test_zero_area_is_finite_with_a_finite_gradient() -> None:
    point = [0.5, 0.5, 0.0, 0.0]
    target = Targets(torch.tensor([0]), torch.tensor([point]))
    boxes = torch.tensor([point, [0.5, 0.5, 0.2, 0.0], [0.5, 0.5, 1e-9, 1e-9]])[None, None].requires_grad_()
    flat = FlatPairs.from_pairs([[pairs_of((0, 0), (1, 0), (2, 0))]], [target], CPU)
    l1, giou, iou = box_losses(boxes, flat)
    (l1 + giou).sum().backward()
    assert l1.isfinite().all() and giou.isfinite().all() and iou.tolist() == [0, 0, 0]
    assert boxes.grad is not None and boxes.grad.isfinite().all()


@given(seed=st.integers(0, 2**31), count=st.integers(0, 6))
def test_equals_the_all_pairs_functions(seed: int, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    predicted, truth = (torch.rand(count, 4, generator=g) * 0.4 + 0.1 for _ in range(2))
    target = Targets(torch.zeros(count, dtype=torch.int64), truth)
    flat = FlatPairs.from_pairs([[pairs_of(*((i, i) for i in range(count)))]], [target], CPU)
    _, giou, iou = box_losses(predicted[None, None], flat)
    a, b = box_convert(predicted, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
    torch.testing.assert_close(giou, (1 - generalized_box_iou(a, b).diagonal()).sum()[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iou, box_iou(a, b).diagonal(), atol=1e-5, rtol=1e-5)
