"""The one door to deformable attention against a slow loop that follows the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from paqdetr.ops import ms_deform_attn

SHAPES = {
    "two levels": [(4, 5), (2, 3)],
    "one level": [(3, 3)],
    "1x1": [(1, 1)],
    "ends in 1x1": [(5, 2), (3, 1), (1, 1)],
    "thin": [(1, 7), (6, 1)],
}


def read(plane: Tensor, x: float, y: float) -> Tensor:
    """Bilinear value of a (h, w, D) map at pixel coordinates, whole numbers at pixel centres, zero outside."""
    height, width, _ = plane.shape
    total = torch.zeros_like(plane[0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def slow(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    result = value.new_zeros(batch, queries, heads, channels)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(levels)]
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                for level, (height, width) in enumerate(shapes):
                    plane = value[b, starts[level] : starts[level] + height * width, head]
                    plane = plane.view(height, width, channels)
                    for p in range(points):
                        x, y = locations[b, q, head, level, p].tolist()
                        sample = read(plane, x * width - 0.5, y * height - 0.5)
                        result[b, q, head] += weights[b, q, head, level, p] * sample
    return result.flatten(2)


def problem(
    shapes: list[tuple[int, int]], batch=2, queries=3, heads=2, channels=3, points=2, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations that reach beyond the map, weights of any sign."""
    tokens = sum(h * w for h, w in shapes)
    grid = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, channels, dtype=dtype)
    locations = torch.rand(*grid, 2, dtype=dtype) * 1.6 - 0.3
    return value, locations, torch.randn(grid, dtype=dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_slow_loop(name: str) -> None:
    value, locations, weights = problem(SHAPES[name])
    found = ms_deform_attn(value, SHAPES[name], locations, weights)
    assert found.shape == (2, 3, 6) and found.is_contiguous()
    torch.testing.assert_close(found, slow(value, SHAPES[name], locations, weights), atol=1e-10, rtol=0)


def test_locations_on_pixel_edges_and_centres() -> None:
    """On every half pixel from outside the map to outside again, the map's own edges included."""
    shapes = [(4, 2)]
    ys, xs = torch.arange(-1, 10, dtype=torch.float64) / 8, torch.arange(-1, 6, dtype=torch.float64) / 4
    places = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), dim=-1).view(1, -1, 1, 1, 1, 2)
    value = torch.randn(1, 8, 1, 2, dtype=torch.float64)
    weights = torch.ones(places.shape[:-1], dtype=torch.float64)
    found = ms_deform_attn(value, shapes, places, weights)
    torch.testing.assert_close(found, slow(value, shapes, places, weights), atol=1e-10, rtol=0)


def test_by_hand() -> None:
    # One row of two pixels, 10 and 20: centres at x = .25 and .75.
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    x = torch.tensor([0.25, 0.75, 0.5, 0.0, 1.0, -0.25, 1.3])
    locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, -1, 1, 1, 1, 2)
    found = ms_deform_attn(value, [(1, 2)], locations, torch.ones(1, 7, 1, 1, 1))
    # The outer edges lie half a pixel from a centre; a whole pixel away all is zero.
    torch.testing.assert_close(found.flatten(), torch.tensor([10.0, 20.0, 15.0, 5.0, 10.0, 0.0, 0.0]))


def test_a_constant_map_reads_constant_inside() -> None:
    shapes = [(6, 4), (3, 2)]
    value = torch.full((1, 30, 2, 3), 7.0)
    locations = 0.3 + 0.4 * torch.rand(1, 5, 2, 2, 4, 2)
    weights = torch.rand(1, 5, 2, 2, 4).flatten(3).softmax(-1).view(1, 5, 2, 2, 4)
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights), torch.full((1, 5, 6), 7.0))


def test_gradients() -> None:
    shapes = [(3, 2), (1, 1)]
    value, locations, weights = problem(shapes, batch=1, queries=2, heads=2, channels=2)
    inputs = tuple(x.requires_grad_() for x in (value, locations, weights))
    assert gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w), inputs)


@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (1, 1), (3, 2)])
def test_few_queries(batch: int, queries: int) -> None:
    value, locations, weights = problem(SHAPES["two levels"], batch=batch, queries=queries)
    value.requires_grad_()
    found = ms_deform_attn(value, SHAPES["two levels"], locations, weights)
    assert found.shape == (batch, queries, 6)
    found.sum().backward()
    assert value.grad is not None


def test_shapes_may_be_a_tensor_and_the_back_end_named() -> None:
    shapes = SHAPES["two levels"]
    inputs = problem(shapes)
    value, rest = inputs[0], inputs[1:]
    expected = ms_deform_attn(value, shapes, *rest)
    assert torch.equal(ms_deform_attn(value, torch.tensor(shapes), *rest), expected)
    assert torch.equal(ms_deform_attn(value, shapes, *rest, backend="numba"), expected)


def test_images_and_heads_do_not_mix() -> None:
    shapes = SHAPES["two levels"]
    value, locations, weights = problem(shapes)
    before = ms_deform_attn(value, shapes, locations, weights).view(2, 3, 2, 3)
    value[0, :, 1] += 1.0
    after = ms_deform_attn(value, shapes, locations, weights).view(2, 3, 2, 3)
    changed = (before != after).any(-1).any(1)  # (B, H)
    assert changed.tolist() == [[False, True], [False, False]]


def test_a_strided_value_is_read_right() -> None:
    shapes = SHAPES["two levels"]
    value, locations, weights = problem(shapes)
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    expected = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(ms_deform_attn(strided, shapes, locations, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(dtype: torch.dtype) -> None:
    """Only the values are rounded: places and sums stay in float32, and the dtype of the values comes out."""
    shapes = [(80, 90), (2, 3)]
    value, locations, weights = problem(shapes, dtype=torch.float32)
    value = value.to(dtype)
    found = ms_deform_attn(value, shapes, locations, weights)
    assert found.dtype == dtype
    expected = ms_deform_attn(value.float(), shapes, locations, weights)
    assert torch.equal(found, expected.to(dtype))


def test_half_precision_locations_lose_no_more_than_their_own_rounding() -> None:
    shapes = [(1, 100)]
    value = torch.arange(100.0).view(1, 100, 1, 1)
    locations = torch.tensor([0.011, 0.5]).view(1, 1, 1, 1, 1, 2).bfloat16()
    found = ms_deform_attn(value, shapes, locations, torch.ones(1, 1, 1, 1, 1))
    assert found.item() == pytest.approx(locations.flatten()[0].item() * 100 - 0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(value=(2, 26, 6)), "expected value"),
        (dict(locations=(2, 3, 2, 2, 2)), "expected value"),
        (dict(weights=(2, 3, 2, 4)), "expected value"),
        (dict(value=(2, 25, 2, 3)), "25 tokens.*make 26"),
        (dict(value=(1, 26, 2, 3)), "expected sampling_locations"),
        (dict(value=(2, 26, 3, 3)), "expected sampling_locations"),
        (dict(weights=(2, 4, 2, 2, 2)), "expected sampling_locations"),
        (dict(weights=(2, 3, 2, 2, 1)), "expected sampling_locations"),
        (dict(locations=(2, 3, 2, 2, 2, 3)), "expected sampling_locations"),
        (dict(locations=(2, 3, 2, 1, 2, 2), weights=(2, 3, 2, 1, 2)), "expected sampling_locations"),
    ],
)
def test_contradicting_shapes(change: dict[str, tuple[int, ...]], message: str) -> None:
    sizes = {"value": (2, 26, 2, 3), "locations": (2, 3, 2, 2, 2, 2), "weights": (2, 3, 2, 2, 2)} | change
    value, locations, weights = (torch.zeros(size) for size in sizes.values())
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(value, SHAPES["two levels"], locations, weights)


def test_unknown_back_end() -> None:
    with pytest.raises(ValueError, match=r"'cuda_ext'.*reference"):
        ms_deform_attn(*_swap(problem([(2, 2)]), [(2, 2)]), backend="cuda_ext")  # type: ignore[arg-type]


def _swap(inputs: tuple[Tensor, Tensor, Tensor], shapes: list[tuple[int, int]]) -> tuple:
    value, locations, weights = inputs
    return value, shapes, locations, weights
