from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paqdetr.models.encoder import DeformableEncoder
from paqdetr.models.tokens import Tokens

LEVELS = [(4, 6), (2, 3), (1, 2)]


def build(query_levels: int | None = None, num_layers: int = 2) -> DeformableEncoder:
    return DeformableEncoder(
        num_layers=num_layers,
        dim=8,
        num_heads=2,
        num_levels=3,
        num_points=2,
        ffn_dim=16,
        dropout=0.0,
        query_levels=query_levels,
    )


def maps(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 8, height, width, dtype=dtype) for height, width in LEVELS]


def slow_encoder(encoder: DeformableEncoder, tokens: Tokens, valid: list[tuple[int, int]]) -> Tensor:
    """Post-norm layers over all tokens; a token's reference is its own centre, put into every level's padded frame."""
    centers, ratios = [], []
    for (height, width), (rows, columns) in zip(tokens.spatial_shapes, valid, strict=True):
        ratios.append([columns / width, rows / height])
        centers += [[(x + 0.5) / columns, (y + 0.5) / rows] for y in range(height) for x in range(width)]
    reference = tokens.values.new_tensor(centers)[:, None] * tokens.values.new_tensor(ratios)[None]  # (S, L, 2)
    reference = reference.expand(tokens.values.shape[0], -1, -1, -1)
    x = tokens.values
    position = tokens.position + torch.cat(
        [encoder.level_embed[i].expand(h * w, -1) for i, (h, w) in enumerate(tokens.spatial_shapes)]
    )
    for layer in encoder.layers:
        attended = layer.attention(x + position, reference, x, tokens.spatial_shapes, tokens.padding_mask)
        x = F.layer_norm(x + attended, (8,), layer.norm.weight, layer.norm.bias)
        hidden = F.linear(x, layer.ffn.linear1.weight, layer.ffn.linear1.bias).clamp(min=0)
        x = x + F.linear(hidden, layer.ffn.linear2.weight, layer.ffn.linear2.bias)
        x = F.layer_norm(x, (8,), layer.ffn.norm.weight, layer.ffn.norm.bias)
    return x


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_equals_a_plainly_written_encoder(padding: int, make_tokens: Callable, stir: Callable) -> None:
    encoder = build().double()
    stir(encoder)
    tokens = make_tokens(maps(torch.float64), padding)
    found = encoder(tokens)
    expected = slow_encoder(encoder, tokens, LEVELS)
    assert (found.values - expected).abs().max() < 1e-10
    assert found.spatial_shapes == tokens.spatial_shapes


@torch.no_grad()
@pytest.mark.parametrize("query_levels", [1, 2])
def test_finer_levels_pass_through_unchanged(query_levels: int, make_tokens: Callable, stir: Callable) -> None:
    encoder = build(query_levels)
    stir(encoder)
    tokens = make_tokens(maps())
    memory = encoder(tokens)
    updated = sum(h * w for h, w in LEVELS[-query_levels:])
    assert torch.equal(memory.values[:, :-updated], tokens.values[:, :-updated])
    assert (memory.values[:, -updated:] - tokens.values[:, -updated:]).abs().amax(-1).min() > 1e-3


def test_finer_levels_are_still_read(make_tokens: Callable, stir: Callable) -> None:
    encoder = build(query_levels=1)
    stir(encoder)
    levels = [x.requires_grad_() for x in maps()]
    encoder(make_tokens(levels)).values[:, -2:].square().sum().backward()
    for x in levels:
        assert x.grad is not None and x.grad.abs().max() > 0


@torch.no_grad()
def test_all_levels_equals_none(make_tokens: Callable) -> None:
    encoder = build(query_levels=3)
    tokens = make_tokens(maps())
    found = encoder(tokens).values
    whole = build(query_levels=None)
    whole.load_state_dict(encoder.state_dict())
    assert torch.equal(found, whole(tokens).values)


@torch.no_grad()
@pytest.mark.parametrize("query_levels", [None, 2])
def test_valid_tokens_do_not_depend_on_padding(query_levels: int | None, make_tokens: Callable, stir: Callable) -> None:
    encoder = build(query_levels)
    stir(encoder)
    levels = maps()
    expected = encoder(make_tokens(levels)).values
    for padding in (1, 7):
        tokens = make_tokens(levels, padding)
        valid = encoder(tokens).values[~tokens.padding_mask].view_as(expected)
        assert (valid - expected).abs().max() < 1e-4


def test_levels_are_told_apart() -> None:
    encoder = build()
    assert encoder.level_embed.shape == (3, 8)
    assert isinstance(encoder.level_embed, nn.Parameter)
    assert 0.5 < float(encoder.level_embed.detach().std()) < 1.5
