from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from paqdetr.models.proposals import LearnedAnchors, LearnedPoints, ProposalHead, ProposalStart
from paqdetr.models.tokens import Tokens, sine_proposals


@pytest.fixture
def memory(make_tokens: Callable) -> Tokens:
    return make_tokens([torch.randn(2, 8, 3, 5), torch.randn(2, 8, 2, 2)])


def test_learned_points_are_read_off_their_positions(memory: Tokens) -> None:
    start = LearnedPoints(num_queries=4, dim=8)
    found = start(memory)
    assert found.reference.shape == (2, 4, 2) and found.position is not None and found.content is None
    expected = F.linear(start.position, start.point_head.weight, start.point_head.bias).sigmoid()
    for image in range(2):
        assert torch.equal(found.reference[image], expected)
        assert torch.equal(found.position[image], start.position)
    found.reference.sum().backward()
    assert start.position.grad is not None and start.position.grad.any()


def test_learned_anchors_are_boxes(memory: Tokens) -> None:
    start = LearnedAnchors(num_queries=4)
    found = start(memory)
    assert found.position is None and found.proposals is None
    assert torch.equal(found.reference[1], start.boxes.sigmoid())
    found.reference.sum().backward()
    assert start.boxes.grad is not None and start.boxes.grad.all()


def proposal_start(stir: Callable, *, fixed: bool, content: bool) -> ProposalStart:
    head = ProposalHead(dim=8, num_classes=3)
    start = ProposalStart(head=head, num_queries=4, dim=8, fixed_position=fixed, with_content=content)
    stir(start)
    return start


def test_proposals_without_a_fixed_position(memory: Tokens, stir: Callable) -> None:
    start = proposal_start(stir, fixed=False, content=False)
    assert start.embed is None
    found, more = start(memory), start(memory, 3)
    assert found.position is None and found.content is None and found.proposals is not None
    assert torch.equal(found.reference, found.proposals.boxes) and not found.reference.requires_grad
    assert found.proposals.boxes.requires_grad
    assert more.reference.shape == (2, 7, 4)
    assert (more.reference[:, :4] - found.reference).abs().max() < 1e-6


@pytest.mark.parametrize("content", [False, True])
def test_position_and_content_from_proposals(memory: Tokens, stir: Callable, content: bool) -> None:
    """Linear and LayerNorm over the sine of the box; with content both come out of one norm, position first."""
    start = proposal_start(stir, fixed=True, content=content)
    assert start.embed is not None
    linear, norm = start.embed
    assert linear.out_features == (16 if content else 8)
    found = start(memory)
    sine = sine_proposals(found.reference, 4)
    expected = F.layer_norm(F.linear(sine, linear.weight, linear.bias), norm.weight.shape, norm.weight, norm.bias)
    assert found.position is not None and (found.position - expected[..., :8]).abs().max() < 1e-6
    assert (found.content is not None) is content
    if found.content is not None:
        assert (found.content - expected[..., 8:]).abs().max() < 1e-6
