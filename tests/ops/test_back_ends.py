"""Back ends against the reference, forward and backward, over random problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paqdetr.ops import ms_deform_attn

Shapes = list[tuple[int, int]]


def away_from_kinks(locations: Tensor, shapes: Shapes) -> Tensor:
    """Moves places whose gradient jumps, pixel centres, where rounding may put them on either side."""
    sizes = locations.new_tensor([[w, h] for h, w in shapes])[:, None]
    place = locations * sizes - 0.5
    near = (place - place.round()).abs() < 0.02
    return torch.where(near, locations + 0.05 / sizes, locations)


def results(backend: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, and the gradients of a loss that weighs its numbers differently."""
    inputs = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    found = ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2], backend)
    gradient = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return [found.detach(), *torch.autograd.grad(found, inputs, gradient)]


def assert_equal(backend: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    locations = away_from_kinks(locations, shapes)
    expected = results("reference", value, shapes, locations, weights)
    found = results(backend, value, shapes, locations, weights)
    tolerance = 1e-12 if value.dtype == torch.float64 else 1e-5
    for name, x, y in zip(("output", "value", "locations", "weights"), found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, name
        scale = max(float(y.abs().max()), 1.0) if y.numel() else 1.0
        if value.dtype in (torch.bfloat16, torch.float16) and name in ("output", "value"):
            tolerance = torch.finfo(value.dtype).eps
        torch.testing.assert_close(x, y, atol=tolerance * scale, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


PYRAMIDS = {
    "encoder": [(9, 13), (5, 7), (3, 4), (2, 2)],
    "ends in 1x1": [(2, 3), (1, 1)],
    "1x1": [(1, 1)],
    "thin": [(1, 9), (8, 1)],
    "five levels": [(8, 6), (4, 3), (2, 2), (1, 1), (1, 1)],
}


@pytest.mark.parametrize("backend", ["gather", "numba"])
@pytest.mark.parametrize("shapes", PYRAMIDS.values(), ids=PYRAMIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pyramids_and_dtypes(shapes: Shapes, dtype: torch.dtype, backend: Any, problem: Any) -> None:
    value, locations, weights = problem(shapes, queries=19, channels=8, points=3, dtype=torch.float64)
    places = torch.float64 if dtype == torch.float64 else torch.float32
    assert_equal(backend, value.to(dtype), shapes, locations.to(places), weights.to(places))


# A vector and what is left of it; one vector; more than the kernel holds in registers.
@pytest.mark.parametrize("channels", [5, 32, 72])
def test_numbers_of_channels(channels: int, problem: Any) -> None:
    shapes = PYRAMIDS["encoder"]
    assert_equal("numba", *_with_shapes(problem(shapes, channels=channels, dtype=torch.float32), shapes))


# Levels x points x heads: 16 at once, 4 at once, one at once, and mixtures.
@pytest.mark.parametrize(("heads", "points"), [(1, 1), (1, 5), (3, 7), (8, 4)])
def test_numbers_of_heads_and_points(heads: int, points: int, problem: Any) -> None:
    shapes = PYRAMIDS["five levels"]
    inputs = problem(shapes, heads=heads, points=points, channels=8, dtype=torch.float32)
    assert_equal("numba", *_with_shapes(inputs, shapes))


@settings(max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    batch=st.integers(0, 3),
    queries=st.integers(0, 6),
    heads=st.integers(1, 3),
    points=st.integers(1, 5),
    backend=st.sampled_from(["gather", "numba"]),
    seed=st.integers(0, 2**31),
)
def test_any_problem(
    shapes: Shapes, batch: int, queries: int, heads: int, points: int, backend: str, seed: int, problem: Any
) -> None:
    torch.manual_seed(seed)
    inputs = problem(shapes, batch=batch, queries=queries, heads=heads, points=points, channels=8, dtype=torch.float64)
    assert_equal(backend, *_with_shapes(inputs, shapes))


@pytest.mark.parametrize("backend", ["gather", "numba"])
def test_one_sided_slopes_at_the_edge_of_the_map(backend: Any) -> None:
    """A pixel's width outside the map the slope jumps to zero; every back end jumps at the same place."""
    shapes = [(2, 4)]
    x = torch.tensor([-0.125, 0.125, 0.375, 0.875, 1.125])  # pixels -1, 0, 1, 3 and 4, exactly
    y = torch.tensor([-0.25, 0.25, 0.75, 1.25])
    places = torch.cartesian_prod(x, y).view(1, -1, 1, 1, 1, 2)
    value, weights = torch.randn(1, 8, 1, 8), torch.randn(places.shape[:-1])
    for found, expected in zip(
        results(backend, value, shapes, places, weights),
        results("reference", value, shapes, places, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def _with_shapes(inputs: tuple[Tensor, Tensor, Tensor], shapes: Shapes) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    value, locations, weights = inputs
    return value, shapes, locations, weights
