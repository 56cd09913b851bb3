"""The Gini coefficient against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from paqdetr.metrics import gini

counts = st.lists(st.integers(0, 10_000), min_size=1, max_size=50)


@pytest.mark.parametrize("n", [1, 2, 7, 900])
def test_closed_forms(n: int) -> None:
    assert gini(np.full(n, 3)) == pytest.approx(0, abs=1e-12)
    assert gini(np.eye(n)[n // 2]) == pytest.approx(1 - 1 / n)
    # x_i = i: sum i^2 = n(n+1)(2n+1)/6 and sum i = n(n+1)/2, so G = (n - 1) / 3n.
    assert gini(np.arange(1, n + 1)[::-1]) == pytest.approx((n - 1) / (3 * n))


def test_by_hand() -> None:
    # x = 0, 0, 1, 3: 2 (3*1 + 4*3) / (4*4) - 5/4 = 30/16 - 20/16
    assert gini([3, 0, 1, 0]) == pytest.approx(0.625)
    assert gini([0, 0, 0]) == 0.0
    assert isinstance(gini(torch.tensor([1, 2])), float)


def test_types() -> None:
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        assert gini(torch.tensor([3, 0, 1, 0], dtype=dtype)) == pytest.approx(0.625)
    assert gini(torch.tensor([3.0, 0, 1, 0], requires_grad=True)) == pytest.approx(0.625)
    assert gini([1e308, 1e308]) == pytest.approx(0.0, abs=1e-12)


@given(counts, st.floats(1e-6, 1e6), st.randoms())
def test_range_scale_order_and_the_pairwise_form(x: list[int], scale: float, random) -> None:
    assume(sum(x) > 0)
    g = gini(x)
    assert 0 <= g < 1
    assert gini(np.array(x) * scale) == pytest.approx(g, abs=1e-9)
    shuffled = x[:]
    random.shuffle(shuffled)
    assert gini(shuffled) == pytest.approx(g, abs=1e-12)
    assert gini(x + x) == pytest.approx(g, abs=1e-9)  # the same for a population twice over
    # The mean absolute difference over twice the mean: the other definition.
    a = np.array(x, dtype=float)
    assert g == pytest.approx(np.abs(a[:, None] - a).mean() / (2 * a.mean()), abs=1e-9)


@pytest.mark.parametrize(
    "bad", [[], [1, -1], [1, math.nan], [1, math.inf], [[1, 2], [3, 4]], 3.0, torch.zeros(2, 2)]
)
def test_refused(bad) -> None:
    with pytest.raises(ValueError, match="expected"):
        gini(bad)
