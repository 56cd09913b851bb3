"""The Gini coefficient, its curve and its chance level against closed forms and slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import ive

from paqdetr.metrics import chance_gini, gini, lorenz_curve

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


BAD = [[], [1, -1], [1, math.nan], [1, math.inf], [[1, 2], [3, 4]], 3.0, torch.zeros(2, 2)]


@pytest.mark.parametrize("bad", BAD)
def test_refused(bad) -> None:
    for function in (gini, lorenz_curve):
        with pytest.raises(ValueError, match="expected"):
            function(bad)


def test_the_curve_by_hand() -> None:
    shares, use = lorenz_curve([3, 0, 1, 0], points=5)
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1] and use.tolist() == [0, 0, 0, 0.25, 1]
    shares, use = lorenz_curve([0, 0, 0])
    assert use.tolist() == shares.tolist() and len(use) == 101, "nothing used is used alike"
    with pytest.raises(ValueError, match="at least 2"):
        lorenz_curve([1, 2], points=1)


@given(counts)
def test_the_area_under_the_curve_is_the_coefficient(x: list[int]) -> None:
    shares, use = lorenz_curve(x, points=len(x) + 1)
    area = float(((use[1:] + use[:-1]) / 2 * np.diff(shares)).sum())
    assert 1 - 2 * area == pytest.approx(gini(x), abs=1e-12)
    assert use[0] == 0 and use[-1] == pytest.approx(1) and (np.diff(use) >= -1e-15).all()
    coarse = lorenz_curve(x)[1]
    assert (coarse <= np.linspace(0, 1, 101) + 1e-12).all(), "no curve lies above the diagonal"


@pytest.mark.parametrize(("images", "per_image", "n"), [(20, 3.0, 10), (5, 9.0, 10), (127, 9.2, 100), (50, 12.0, 900)])
def test_chance_is_what_simulated_images_give(images: int, per_image: float, n: int) -> None:
    rng = np.random.default_rng(0)
    tries = [gini(rng.binomial(images, per_image / n, n)) for _ in range(400)]
    expected = chance_gini(num_queries=n, images=images, per_image=per_image)
    # The expectation of a ratio is not the ratio of expectations: they meet for many queries.
    assert expected == pytest.approx(float(np.mean(tries)), rel=0.04 if n == 10 else 0.01)


def test_chance_by_closed_forms() -> None:
    # One image: n p queries used once, the others not at all: G = 1 - p, but for the factor (n - 1) / n.
    assert chance_gini(num_queries=100, images=1, per_image=30) == pytest.approx(0.7 * 0.99)
    # Rare use is a Poisson count, whose coefficient is known: e^-2a (I0(2a) + I1(2a)).
    many = chance_gini(num_queries=10**6, images=10**6, per_image=3.0)
    assert many == pytest.approx(ive(0, 6) + ive(1, 6), rel=1e-4)
    assert chance_gini(num_queries=50, images=10, per_image=50) == pytest.approx(0, abs=1e-12)
    assert chance_gini(num_queries=50, images=10, per_image=0) == 0
    with pytest.raises(ValueError, match="expected 0 to 5, found 6"):
        chance_gini(num_queries=5, images=1, per_image=6)
