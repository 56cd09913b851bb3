"""Proposals that do not overlap a better one come first (DDQ)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from paqdetr.models.proposals import ProposalHead, _distinct_tokens
from paqdetr.models.tokens import Tokens


def slow_order(scores: Tensor, boxes: Tensor, valid: Tensor, threshold: float) -> list[int]:
    """Greedy suppression among all valid tokens of an image, box by box: survivors by score, then the others by score."""
    corners = box_convert(boxes, "cxcywh", "xyxy")
    by_score = [i for i in scores.argsort(descending=True).tolist() if valid[i]]
    kept: list[int] = []
    for i in by_score:
        if all(float(box_iou(corners[i, None], corners[j, None])) <= threshold for j in kept):
            kept.append(i)
    return kept + [i for i in by_score if i not in kept]


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 5, 30, 70])
@pytest.mark.parametrize("for_graph", [False, True])
def test_equals_suppression_among_all_tokens(for_graph: bool, count: int, threshold: float) -> None:
    scores, valid = torch.rand(3, 60), torch.rand(3, 60) > 0.2
    valid[2] = torch.arange(60) < 4
    # Around a few places, so that much is suppressed and several rounds are needed.
    places = torch.tensor([0.3, 0.5, 0.7])[torch.randint(3, (3, 60, 2))]
    boxes = torch.cat([places + 0.02 * torch.rand(3, 60, 2), torch.full((3, 60, 2), 0.2)], dim=-1)
    found = _distinct_tokens(
        scores, valid, count, lambda chosen: boxes.gather(1, chosen[..., None].expand(-1, -1, 4)), threshold, for_graph
    )
    for image in range(3):
        among = valid[image]
        if for_graph:  # among the best of them alone
            rank = scores[image].masked_fill(~among, -1).argsort(descending=True).argsort()
            among = among & (rank < 4 * count)
        expected = slow_order(scores[image], boxes[image], among, threshold)
        assert found[image].tolist() == [expected[i % len(expected)] for i in range(count)]
        best = scores[image].masked_fill(~valid[image], -1).argsort(descending=True)[: min(count, len(expected))]
        if threshold == 1.0:  # nothing overlaps by more than that
            assert found[image, : len(best)].tolist() == best.tolist()


def test_only_as_many_boxes_are_computed_as_are_needed() -> None:
    asked: list[int] = []

    def apart(chosen: Tensor) -> Tensor:
        asked.append(chosen.shape[1])
        corner = chosen[..., None] / 100
        return torch.cat([corner, corner, torch.full_like(corner, 0.005), torch.full_like(corner, 0.005)], -1)

    def alike(chosen: Tensor) -> Tensor:
        asked.append(chosen.shape[1])
        return torch.full((*chosen.shape, 4), 0.5)

    valid, scores = torch.ones(2, 100, dtype=torch.bool), torch.rand(2, 100)
    _distinct_tokens(scores, valid, 10, apart, 0.8)
    assert asked == [20]
    asked.clear()
    found = _distinct_tokens(scores, valid, 10, alike, 0.8)  # one survivor, and the next best
    assert asked == [20, 40, 80, 100]
    assert torch.equal(found, scores.topk(10).indices)


@torch.no_grad()
@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize("count", [6, 40])
def test_the_head_chooses_by_its_own_boxes(
    class_agnostic: bool, count: int, make_tokens: Callable[..., Tokens], stir: Callable
) -> None:
    head = ProposalHead(dim=8, num_classes=3, class_agnostic=class_agnostic, distinct=0.1)
    stir(head)
    head.box_head[-1].bias[2:] += 2.5  # large enough to overlap
    levels = [torch.randn(2, 8, 4, 5), torch.randn(2, 8, 2, 3)]
    plain = ProposalHead(dim=8, num_classes=3, class_agnostic=class_agnostic)
    plain.load_state_dict(head.state_dict())
    every = plain.eval()(make_tokens(levels), 26)  # all tokens, by score
    for padding, train in ((0, False), (3, False), (3, True)):
        found = head.train(train)(make_tokens(levels, padding), count)
        for image in range(2):
            order = slow_order(torch.arange(26, 0, -1.0), every.boxes[image], torch.ones(26, dtype=torch.bool), 0.1)
            expected = [order[i % 26] for i in range(count)]
            torch.testing.assert_close(found.boxes[image], every.boxes[image, expected])
            torch.testing.assert_close(found.logits[image], every.logits[image, expected])
    assert not torch.equal(found.boxes[:, :6], every.boxes[:, :6])  # something was suppressed


def test_the_proposals_have_a_gradient(make_tokens: Callable[..., Tokens], stir: Callable) -> None:
    head = ProposalHead(dim=8, num_classes=3, distinct=0.5)
    stir(head)
    found = head(make_tokens([torch.randn(1, 8, 3, 3)]), 4)
    (found.boxes.sum() + found.logits.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
