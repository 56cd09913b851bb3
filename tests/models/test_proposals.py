from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paqdetr.models.proposals import ProposalHead, Proposals
from paqdetr.models.tokens import Tokens


def build(stir: Callable, **settings: bool) -> ProposalHead:
    head = ProposalHead(dim=8, num_classes=3, **settings)
    stir(head)
    return head


def slow_proposals(head: ProposalHead, tokens: Tokens, levels: list[Tensor], count: int) -> list[Proposals]:
    """Token by token over the valid cells of one image after the other."""
    found = []
    for image in range(levels[0].shape[0]):
        rows = []
        start = 0
        for level, (x, (height, width)) in enumerate(zip(levels, tokens.spatial_shapes, strict=True)):
            rows_valid, columns_valid = x.shape[2:]
            for row in range(rows_valid):
                for column in range(columns_valid):
                    anchor = [
                        (column + 0.5) / columns_valid,
                        (row + 0.5) / rows_valid,
                        0.05 * 2**level,
                        0.05 * 2**level,
                    ]
                    state = F.layer_norm(head.project(x[image, :, row, column]), (8,), head.norm.weight, head.norm.bias)
                    logits = head.class_head(state)
                    box = torch.special.expit(head.box_head(state) + torch.logit(x.new_tensor(anchor)))
                    rows.append((float(logits.max()), start + row * width + column, logits, box, state))
            start += height * width
        rows.sort(key=lambda row: -row[0])
        best = [rows[i % len(rows)] for i in range(count)]
        found.append(
            Proposals(
                logits=torch.stack([row[2] for row in best]),
                boxes=torch.stack([row[3] for row in best]),
                indices=torch.tensor([row[1] for row in best]),
                tokens=torch.stack([row[4] for row in best]),
            )
        )
    return found


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_equal_a_plain_loop(count: int, padding: int, make_tokens: Callable, stir: Callable) -> None:
    head = build(stir).double()
    shapes = [(3, 5), (2, 2)]  # 19 tokens: 30 queries repeat the ranking
    levels = [torch.randn(2, 8, *shape, dtype=torch.float64) for shape in shapes]
    tokens = make_tokens(levels, padding)
    found = head(tokens, count)
    for image, expected in enumerate(slow_proposals(head, tokens, levels, count)):
        assert found.indices[image].tolist() == expected.indices.tolist()
        assert (found.logits[image] - expected.logits).abs().max() < 1e-10
        assert (found.boxes[image] - expected.boxes).abs().max() < 1e-10
        assert (found.tokens[image] - expected.tokens).abs().max() < 1e-10


@torch.no_grad()
def test_boxes_by_hand(make_tokens: Callable) -> None:
    head = ProposalHead(dim=8, num_classes=3)
    torch.nn.init.zeros_(head.box_head[-1].weight)
    torch.nn.init.zeros_(head.box_head[-1].bias)
    tokens = make_tokens([torch.randn(1, 8, 2, 2), torch.randn(1, 8, 1, 1)])
    found = head(tokens, 5)
    # The regression starts at zero, so every box is its anchor: 5 % of the image on the first level, 10 % on the second.
    anchors = [[x, y, 0.05, 0.05] for y in (0.25, 0.75) for x in (0.25, 0.75)] + [[0.5, 0.5, 0.1, 0.1]]
    expected = torch.tensor(anchors)[found.indices[0]]
    assert (found.boxes[0] - expected).abs().max() < 1e-6
    assert sorted(found.indices[0].tolist()) == [0, 1, 2, 3, 4]
    scores = found.logits[0].amax(-1)
    assert (scores[:-1] >= scores[1:]).all()


@torch.no_grad()
@pytest.mark.parametrize("garbage", [1e4, -1e4])
def test_padding_is_never_chosen(garbage: float, make_tokens: Callable, stir: Callable) -> None:
    head = build(stir)
    tokens = make_tokens([torch.randn(2, 8, 3, 5), torch.randn(2, 8, 2, 2)], padding=3)
    tokens = tokens.with_values(tokens.values.masked_fill(tokens.padding_mask[..., None], garbage))
    found = head(tokens, 40)
    assert not tokens.padding_mask.gather(1, found.indices).any()


@torch.no_grad()
def test_tokens_at_the_very_border_propose_nothing(make_tokens: Callable, stir: Callable) -> None:
    head = build(stir)
    found = head(make_tokens([torch.randn(1, 8, 1, 60)]), 60)  # centres from 0.0083 to 0.9917
    assert set(found.indices[0].tolist()) == set(range(1, 59))


@torch.no_grad()
def test_a_cell_exactly_on_the_border_is_treated_alike_with_any_padding(make_tokens: Callable, stir: Callable) -> None:
    head = build(stir)
    level = torch.randn(1, 8, 1, 50)  # the first centre is 0.01
    expected = head(make_tokens([level]), 50).indices
    for padding in range(1, 20):
        assert torch.equal(head(make_tokens([level], padding), 50).indices, expected)


def test_gradients(make_tokens: Callable, stir: Callable) -> None:
    head = build(stir)
    tokens = make_tokens([torch.randn(1, 8, 3, 3)])
    values = tokens.values.requires_grad_()
    found = head(tokens.with_values(values), 4)
    found.boxes.sum().backward(retain_graph=True)
    assert head.class_head.weight.grad is None
    assert all(p.grad is not None and p.grad.any() for p in head.box_head.parameters())
    found.logits.sum().backward()
    assert head.class_head.weight.grad is not None
    assert values.grad is not None
    chosen = values.grad.abs().sum(-1)[0].nonzero().flatten().tolist()
    assert chosen == sorted(found.indices[0].tolist())


@torch.no_grad()
def test_ranking_is_by_the_best_class() -> None:
    head = ProposalHead(dim=8, num_classes=2)
    head.class_head.bias.data.zero_()
    head.project.weight.copy_(torch.eye(8))
    head.project.bias.zero_()
    head.class_head.weight.zero_()
    head.class_head.weight[0, 0], head.class_head.weight[1, 1] = 1.0, 3.0
    values = torch.zeros(1, 3, 8)
    values[0, 0, 0] = values[0, 1, 1] = values[0, 2, 2] = 1.0
    found = head(Tokens.from_values(values, [(1, 3)], None, temperature=20), 2)
    assert found.indices.tolist() == [[1, 0]]


@torch.no_grad()
def test_class_agnostic_proposals(make_tokens: Callable, stir: Callable) -> None:
    """One logit a token; in training every token says its box, in use only those that were chosen."""
    head = build(stir, class_agnostic=True)
    tokens = make_tokens([torch.randn(2, 8, 3, 5), torch.randn(2, 8, 2, 2)], padding=1)
    trained, used = head.train()(tokens, 4), head.eval()(tokens, 4)
    assert used.all_tokens is None and trained.all_tokens is not None
    assert trained.logits.shape == (2, 4, 1)
    for name in ("logits", "boxes", "indices"):
        assert torch.equal(getattr(trained, name), getattr(used, name))
    all_tokens = trained.all_tokens
    assert all_tokens.logits.shape == (2, 33, 1) and all_tokens.boxes.shape == (2, 33, 4)
    assert all_tokens.valid.sum(1).tolist() == [19, 19]
    scores = all_tokens.logits[..., 0].masked_fill(~all_tokens.valid, -torch.inf)
    assert torch.equal(scores.topk(4, dim=1).indices, trained.indices)
    first = trained.first(2)
    assert first.boxes.shape == (2, 2, 4) and torch.equal(first.indices, trained.indices[:, :2])
