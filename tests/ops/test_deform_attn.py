"""Every back end of the one door against a slow loop that follows the definition. Triton has a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from paqdetr.ops import ms_deform_attn

BACKENDS = ("reference", "gather", "numba")
Problem = Callable[..., tuple[Tensor, Tensor, Tensor]]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

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


@each_backend
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_slow_loop(name: str, backend: Any, problem: Problem) -> None:
    value, locations, weights = problem(SHAPES[name])
    found = ms_deform_attn(value, SHAPES[name], locations, weights, backend)
    assert found.shape == (2, 3, 6) and found.is_contiguous()
    torch.testing.assert_close(found, slow(value, SHAPES[name], locations, weights), atol=1e-10, rtol=0)


@each_backend
def test_locations_on_pixel_edges_and_centres(backend: Any) -> None:
    """On every half pixel from outside the map to outside again, the map's own edges included."""
    shapes = [(4, 2)]
    ys, xs = torch.arange(-1, 10, dtype=torch.float64) / 8, torch.arange(-1, 6, dtype=torch.float64) / 4
    places = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), dim=-1).view(1, -1, 1, 1, 1, 2)
    value = torch.randn(1, 8, 1, 2, dtype=torch.float64)
    weights = torch.ones(places.shape[:-1], dtype=torch.float64)
    found = ms_deform_attn(value, shapes, places, weights, backend)
    torch.testing.assert_close(found, slow(value, shapes, places, weights), atol=1e-10, rtol=0)


@each_backend
def test_by_hand(backend: Any) -> None:
    # One row of two pixels, 10 and 20: centres at x = .25 and .75.
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    x = torch.tensor([0.25, 0.75, 0.5, 0.0, 1.0, -0.25, 1.3])
    locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, -1, 1, 1, 1, 2)
    found = ms_deform_attn(value, [(1, 2)], locations, torch.ones(1, 7, 1, 1, 1), backend)
    # The outer edges lie half a pixel from a centre; a whole pixel away all is zero.
    torch.testing.assert_close(found.flatten(), torch.tensor([10.0, 20.0, 15.0, 5.0, 10.0, 0.0, 0.0]))


@each_backend
def test_gradients(backend: Any, problem: Problem) -> None:
    shapes = [(3, 2), (1, 1)]
    value, locations, weights = problem(shapes, batch=1, queries=2, heads=2, channels=2)
    inputs = tuple(x.requires_grad_() for x in (value, locations, weights))
    assert gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w, backend), inputs)


@each_backend
@pytest.mark.parametrize(("batch", "queries"), [(0, 2), (2, 0), (1, 1), (3, 2)])
def test_few_queries(batch: int, queries: int, backend: Any, problem: Problem) -> None:
    value, locations, weights = problem(SHAPES["two levels"], batch=batch, queries=queries)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    found = ms_deform_attn(value, SHAPES["two levels"], locations, weights, backend)
    assert found.shape == (batch, queries, 6)
    found.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape and x.grad.isfinite().all() for x in inputs)
    if not queries:
        assert value.grad is not None and not value.grad.any()


def test_shapes_may_be_a_tensor_and_the_back_end_named(problem: Problem) -> None:
    shapes = SHAPES["two levels"]
    inputs = problem(shapes)
    value, rest = inputs[0], inputs[1:]
    expected = ms_deform_attn(value, shapes, *rest)
    assert torch.equal(ms_deform_attn(value, torch.tensor(shapes), *rest), expected)
    assert torch.equal(ms_deform_attn(value, np.array(shapes), *rest), expected)  # type: ignore[arg-type]
    assert torch.equal(ms_deform_attn(value, shapes, *rest, backend="numba"), expected)


@each_backend
def test_strided_inputs_are_read_right(backend: Any, problem: Problem) -> None:
    shapes = SHAPES["two levels"]
    inputs = problem(shapes)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    plain = [x.requires_grad_() for x in inputs]
    results = []
    for value, locations, weights in (plain, strided):
        found = ms_deform_attn(value, shapes, locations, weights, backend)
        # A gradient of one number, expanded, is strided too.
        results.append((found, *torch.autograd.grad(found.sum(), (value, locations, weights))))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(dtype: torch.dtype, backend: Any, problem: Problem) -> None:
    """Only the values are rounded: places and sums stay in float32, and the dtype of the values comes out."""
    shapes = [(80, 90), (2, 3)]
    value, locations, weights = problem(shapes, dtype=torch.float32)
    value = value.to(dtype)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    found = ms_deform_attn(value, shapes, locations, weights, backend)
    assert found.dtype == dtype
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = ms_deform_attn(exact[0], shapes, exact[1], exact[2], backend)
    assert torch.equal(found, expected.to(dtype))
    found.backward(torch.ones_like(found))
    expected.backward(torch.ones_like(expected))
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None and y.grad is not None and x.grad.dtype == x.dtype
        torch.testing.assert_close(x.grad, y.grad.to(x.dtype))


@each_backend
def test_half_precision_locations_lose_no_more_than_their_own_rounding(backend: Any) -> None:
    shapes = [(1, 100)]
    value = torch.arange(100.0).view(1, 100, 1, 1)
    locations = torch.tensor([0.011, 0.5]).view(1, 1, 1, 1, 1, 2).bfloat16()
    found = ms_deform_attn(value, shapes, locations, torch.ones(1, 1, 1, 1, 1), backend)
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


def test_whole_numbers_are_refused(problem: Problem) -> None:
    value, locations, weights = problem([(2, 2)])
    with pytest.raises(ValueError, match=r"floating.*torch.int64"):
        ms_deform_attn(value, [(2, 2)], locations.long(), weights)


@pytest.mark.parametrize("shapes", [[(7, 1), (0, 3)], [(7, 1), (3, 0)], [(2, 2), (-1, -3)]])
def test_an_empty_level_is_refused(shapes: list[tuple[int, int]], problem: Problem) -> None:
    """A kernel would read beside the values."""
    value, locations, weights = problem([(2, 2), (1, 3)])
    with pytest.raises(ValueError, match=r"at least one pixel, found spatial_shapes \["):
        ms_deform_attn(value, shapes, locations, weights)


def test_unknown_back_end(problem: Problem) -> None:
    value, locations, weights = problem([(2, 2)])
    with pytest.raises(ValueError, match=r"'cuda_ext'.*reference"):
        ms_deform_attn(value, [(2, 2)], locations, weights, backend="cuda_ext")  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_location_that_is_not_finite_shows_in_its_query_alone(
    bad: float, axis: int, backend: Any, problem: Problem
) -> None:
    """Hidden, it would train on."""
    shapes = SHAPES["two levels"]
    value, locations, weights = problem(shapes)
    locations[0, 1, 1, 0, 1, axis] = bad
    nan = ms_deform_attn(value, shapes, locations, weights, backend).isnan().view(2, 3, 2, 3)
    assert nan[0, 1, 1].all() and nan.sum() == 3


@each_backend
@pytest.mark.parametrize("far", [-1e30, -1e9, -10.0, 10.0, 1e9, 1e30])
def test_far_outside_reads_zero_and_has_no_gradient(far: float, backend: Any) -> None:
    value = torch.randn(1, 6, 1, 3, dtype=torch.float64, requires_grad=True)
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, dtype=torch.float64)
    locations[..., 0] = far
    locations.requires_grad_()
    weights = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    found = ms_deform_attn(value, [(2, 3)], locations, weights, backend)
    found.sum().backward()
    for zero in (found, value.grad, locations.grad, weights.grad):
        assert zero is not None and not zero.any()
