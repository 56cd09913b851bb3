from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def problem() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`problem(shapes, batch=.., queries=.., ..)`: value, locations that reach beyond the map, weights of any sign."""

    def make(
        shapes: list[tuple[int, int]], batch=2, queries=3, heads=2, channels=3, points=2, dtype=torch.float64
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = sum(h * w for h, w in shapes)
        grid = (batch, queries, heads, len(shapes), points)
        value = torch.randn(batch, tokens, heads, channels, dtype=dtype)
        locations = torch.rand(*grid, 2, dtype=dtype) * 1.6 - 0.3
        return value, locations, torch.randn(grid, dtype=dtype)

    return make
