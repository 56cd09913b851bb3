from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paqdetr.models.encoder import MLP, DeformableAttention, FeedForward, softmax

SHAPES = [(3, 4), (2, 2)]


def bilinear(plane: Tensor, x: float, y: float) -> Tensor:
    """(h, w, D) read at (x, y) in [0, 1] of the plane, pixel centres at half-integers, zero outside."""
    height, width, channels = plane.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    value = torch.zeros(channels, dtype=plane.dtype)
    for r in (top, top + 1):
        for c in (left, left + 1):
            if 0 <= r < height and 0 <= c < width:
                value += (1 - abs(row - r)) * (1 - abs(column - c)) * plane[r, c]
    return value


def slow_attention(
    layer: DeformableAttention, query: Tensor, reference: Tensor, memory: Tensor, mask: Tensor
) -> Tensor:
    """Equation 3 of Deformable DETR, written as loops."""
    heads, points, levels = layer.num_heads, layer.num_points, layer.num_levels
    batch, count, dim = query.shape
    value = layer.value_proj(memory)
    value[mask] = 0
    result = torch.zeros(batch, count, dim, dtype=query.dtype)
    for b in range(batch):
        for q in range(count):
            offsets = layer.sampling_offsets(query[b, q]).view(heads, levels, points, 2)
            weights = layer.attention_weights(query[b, q]).view(heads, levels * points).softmax(-1)
            parts = []
            for h in range(heads):
                total = torch.zeros(dim // heads, dtype=query.dtype)
                start = 0
                for level, (height, width) in enumerate(SHAPES):
                    plane = value[b, start : start + height * width].view(height, width, heads, -1)[:, :, h]
                    start += height * width
                    for p in range(points):
                        dx, dy = offsets[h, level, p].tolist()
                        x, y, *size = reference[b, q, level].tolist()
                        if size:
                            x, y = x + dx / points * size[0] / 2, y + dy / points * size[1] / 2
                        else:
                            x, y = x + dx / width, y + dy / height
                        total = total + weights[h, level * points + p] * bilinear(plane, x, y)
                parts.append(total)
            result[b, q] = torch.cat(parts)
    return layer.output_proj(result)


@pytest.mark.parametrize("coordinates", [2, 4])
@torch.no_grad()
def test_deformable_attention_equals_plain_loops(coordinates: int, stir: Callable[[nn.Module], None]) -> None:
    layer = DeformableAttention(dim=8, num_heads=2, num_levels=2, num_points=3).double()
    stir(layer)
    query, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 16, 8).double()
    reference = torch.rand(2, 3, 2, coordinates).double()
    mask = torch.rand(2, 16) > 0.7
    found = layer(query, reference, memory, SHAPES, mask)
    assert found.shape == (2, 3, 8)
    assert (found - slow_attention(layer, query, reference, memory, mask)).abs().max() < 1e-10
    without = layer(query, reference, memory, SHAPES, None)
    expected = slow_attention(layer, query, reference, memory, torch.zeros(2, 16, dtype=torch.bool))
    assert (without - expected).abs().max() < 1e-10


def test_start_looks_into_eight_directions() -> None:
    layer = DeformableAttention(dim=16, num_heads=8, num_levels=2, num_points=2)
    bias = layer.sampling_offsets.bias.view(8, 2, 2, 2)  # head, level, point, xy
    directions = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    for level in range(2):
        assert torch.allclose(bias[:, level, 0], torch.tensor(directions).float(), atol=1e-6)
        assert torch.allclose(bias[:, level, 1], 2 * torch.tensor(directions).float(), atol=1e-6)
    assert not layer.sampling_offsets.weight.any()
    assert not layer.attention_weights.weight.any() and not layer.attention_weights.bias.any()


@torch.no_grad()
def test_start_is_the_mean_over_points_whatever_the_query() -> None:
    layer = DeformableAttention(dim=8, num_heads=2, num_levels=2, num_points=3)
    reference, memory = torch.rand(1, 3, 2, 2), torch.randn(1, 16, 8)
    first = layer(torch.randn(1, 3, 8), reference, memory, SHAPES, None)
    assert torch.equal(first, layer(torch.randn(1, 3, 8), reference, memory, SHAPES, None))


@torch.no_grad()
def test_padded_memory_is_never_read(stir: Callable[[nn.Module], None]) -> None:
    layer = DeformableAttention(dim=8, num_heads=2, num_levels=2, num_points=3)
    stir(layer)
    query, reference, memory = torch.randn(1, 4, 8), torch.rand(1, 4, 2, 4), torch.randn(1, 16, 8)
    mask = torch.rand(1, 16) > 0.5
    other = memory.masked_fill(mask[..., None], 1e6)
    assert torch.equal(layer(query, reference, memory, SHAPES, mask), layer(query, reference, other, SHAPES, mask))


@torch.no_grad()
def test_feed_forward_by_hand() -> None:
    block = FeedForward(dim=2, hidden=2, dropout=0.0).double()
    block.linear1.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    block.linear2.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    for linear in (block.linear1, block.linear2):
        linear.bias.zero_()
    # x = (1, 3): ReLU((1, -3)) = (1, 0), twice that added: (3, 3), whose norm is 0; x = (2, -1): (6, 1), normed (1, -1).
    found = block(torch.tensor([[1.0, 3.0], [2.0, -1.0]], dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx([0, 0, 1, -1], abs=1e-5)


def test_mlp_has_relu_between_layers_alone() -> None:
    mlp = MLP((3, 4, 5, 2))
    assert [type(part) for part in mlp] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert mlp(torch.randn(7, 3)).shape == (7, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 11, 12, 16, 20, 27, 32])
def test_softmax_of_any_length_is_torchs(length: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 3, 4, length, dtype=dtype) * 5).requires_grad_()
    gradient = torch.randn_like(logits)
    expected, found = logits.softmax(-1), softmax(logits)
    torch.testing.assert_close(found, expected)
    theirs, ours = (torch.autograd.grad(y, logits, gradient)[0] for y in (expected, found))
    torch.testing.assert_close(ours, theirs)
