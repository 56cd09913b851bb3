"""What a handful of seeds on one test set say about a figure: an interval that counts both, and what it could have detected.

A difference between two variants has two sources of chance. Another seed would give another difference, and so would another
test set. Seeds are few (2 to 10), images are shared by all seeds, and neither a t-interval over seeds (blind to the
images) nor a bootstrap over images (blind to the seeds) nor one over both (two or three seeds, drawn with replacement, have
too little spread) covers what it promises. So the two are measured apart and put together.

Let D_s be the difference of seed s, n of them, and D*_sr the same on the r-th resample of the images. Then

    Var(mean D) = S^2 / n + c,    S^2 = sample variance of D_s over seeds,
                                  c = mean over pairs s != t of the covariance over r of D*_sr and D*_tr.

S^2 holds all that differs from seed to seed, the interaction of seeds and images included; c what seeds have in common, which no
number of seeds averages away. With images of their own for each seed (folds), c is 0 and S^2 holds everything; the formula stays.
S^2 / n has n - 1 degrees of freedom, c as many as there are images: the interval is the mean plus or minus the square root of
t_seeds^2 S^2 / n + t_images^2 c (Howe 1974). It is exact if either vanishes, and a little wider than it need be in between, at
every level: Holm's rule asks for a small one, at which the t quantile of two seeds is a hundred times the standard error.
docs/decisions/0015-statistics-of-studies.md has the coverage, simulated, and what was turned down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit

from paqdetr.serialize import json_number

POWER = 0.8
"""How often an effect that is called detectable is to be detected."""

_MOST_SEEDS = 200
_QUADRATURE = 400


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of a figure, or of a difference, over seeds, with its two sources of chance.

    Attributes:
        mean: over the seeds.
        values: (n,) one a seed, in the order of the seeds.
        seed_variance: S^2, between seeds; NaN with a single seed.
        image_variance: c, of what the seeds share; 0 if images were not resampled.
        images: in the test set; None if they were not resampled.
        level: one minus the interval's confidence.
    """

    mean: float
    values: tuple[float, ...]
    seed_variance: float
    image_variance: float
    images: int | None
    level: float = 0.05

    @property
    def seeds(self) -> int:
        """n."""
        return len(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation between seeds; NaN with a single one."""
        return math.sqrt(self.seed_variance)

    @property
    def standard_error(self) -> float:
        """Of the mean, over seeds and images; NaN with a single seed."""
        return math.sqrt(self.seed_variance / self.seeds + self.image_variance)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the expectation lies; both NaN with a single seed, which says nothing of others."""
        half = float(_half_width(self.seed_variance, self.image_variance, self.seeds, self.images, self.level))
        return self.mean - half, self.mean + half

    def p_value(self, threshold: float = 0.0) -> float:
        """Two-sided: the smallest level at which the interval leaves out `threshold`; 1 with a single seed or no spread."""
        distance = abs(self.mean - threshold)
        if math.isnan(self.standard_error) or distance == 0 or self.standard_error == 0:
            return 1.0  # equal values of a few seeds do not say that others would be equal

        def excess(exponent: float) -> float:
            level = math.exp(exponent)
            return distance - float(
                _half_width(self.seed_variance, self.image_variance, self.seeds, self.images, level)
            )

        lowest = math.log(1e-12)
        return 1e-12 if excess(lowest) > 0 else math.exp(float(brentq(excess, lowest, 0.0)))  # type: ignore[arg-type]

    def with_seeds(self, count: int) -> Estimate:
        """The same chances with another number of seeds: to plan with. Its values are the mean, repeated."""
        return replace(self, values=(self.mean,) * count)

    def power(self, effect: float) -> float:
        """How often a true effect of this size (away from 0, in one direction) is detected: 0 lies below the whole interval.

        S^2 is taken to be as it was found; its chance in a repetition is integrated over.
        """
        if self.seeds < 2 or math.isnan(self.seed_variance) or self.standard_error == 0:
            return 0.0
        shares = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
        degrees = self.seeds - 1
        found = self.seed_variance * stats.chi2.ppf(shares, degrees) / degrees
        half = _half_width(found, self.image_variance, self.seeds, self.images, self.level)
        return float(stats.norm.sf((half - effect) / self.standard_error).mean())

    def smallest_effect(self) -> float:
        """The effect that so many seeds on these images detect with a power of 80 %; NaN with a single seed or no spread."""
        error = self.standard_error
        if math.isnan(error) or error == 0:
            return math.nan
        highest = 10 * float(_half_width(self.seed_variance, self.image_variance, self.seeds, self.images, self.level))
        found = brentq(lambda effect: self.power(effect) - POWER, 0.0, highest, xtol=1e-3 * error)
        return float(found)  # type: ignore[arg-type]

    def seeds_needed(self, effect: float) -> int | None:
        """The fewest seeds that detect this effect with a power of 80 %; None if the images alone stand in the way of it.

        Raises:
            ValueError: there is a single seed, so that nothing is known of others.
        """
        if math.isnan(self.seed_variance):
            raise ValueError("a single seed says nothing of the variance between seeds")
        low, high = 1, _MOST_SEEDS  # power grows with the seeds
        if self.with_seeds(high).power(effect) < POWER:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.with_seeds(middle).power(effect) >= POWER else (middle, high)
        return high

    def to_json(self) -> dict[str, Any]:
        """Everything a table needs; None for NaN."""
        low, high = self.interval
        numbers = {
            "mean": self.mean,
            "low": low,
            "high": high,
            "spread": self.spread,
            "standard_error": self.standard_error,
            "image_error": math.sqrt(self.image_variance),
            "smallest_effect": self.smallest_effect(),
        }
        rounded = {name: json_number(value, 6) for name, value in numbers.items()}
        return rounded | {"seeds": self.seeds, "values": [round(value, 6) for value in self.values]}


def estimate(
    values: Sequence[float],
    replicates: np.ndarray | None = None,
    *,
    groups: Sequence[Any] | None = None,
    images: int | None = None,
    level: float = 0.05,
) -> Estimate:
    """The mean over seeds with its chances.

    Args:
        values: (n,) a figure, or a paired difference, of each seed.
        replicates: (n, R) the same on resamples of the images; None if there are none, and the interval is one over seeds alone.
            Resamples where nothing defines the figure for one of the seeds (NaN: no object was drawn) are left out; where fewer
            than two are left, it is as if there were none.
        groups: (n,) which test set a seed was measured on: resamples of seeds in one group are the same. All in one if None.
        images: in a test set, at least 2; needed with `replicates`.

    Raises:
        ValueError: shapes that contradict each other, or no value.
    """
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"values: expected (n,), found {found.shape}")
    shared = 0.0
    if replicates is not None:
        if replicates.shape[0] != len(found) or replicates.ndim != 2 or replicates.shape[1] < 2:
            raise ValueError(f"replicates: expected ({len(found)}, R), found {replicates.shape}")
        if images is None or images < 2:
            raise ValueError(f"images: expected at least 2, found {images}")
        replicates = replicates[:, ~np.isnan(replicates).any(axis=0)]
        if replicates.shape[1] < 2:
            replicates = None
        else:
            shared = shared_variance(replicates, groups) * images / (images - 1)
    return Estimate(
        mean=float(found.mean()),
        values=tuple(found.tolist()),
        seed_variance=float(found.var(ddof=1)) if len(found) > 1 else math.nan,
        image_variance=shared,
        images=None if replicates is None else images,
        level=level,
    )


def shared_variance(replicates: np.ndarray, groups: Sequence[Any] | None = None) -> float:
    """c: the mean covariance between the resamples of different seeds, at least 0; with a single seed its variance.

    Seeds of different groups have nothing in common.
    """
    count = len(replicates)
    covariance = np.atleast_2d(np.cov(replicates))
    if count == 1:
        return float(covariance[0, 0])
    together = ~np.eye(count, dtype=bool)
    if groups is not None:
        labels = np.unique([str(group) for group in groups], return_inverse=True)[1]
        together &= labels[:, None] == labels[None]
    return max(float(covariance[together].sum()) / (count * (count - 1)), 0.0)


def pooled_variance(estimates: Sequence[Estimate]) -> tuple[float, int]:
    """S^2 over several comparisons, each weighted by its degrees of freedom, and those degrees together."""
    usable = [estimate for estimate in estimates if estimate.seeds > 1]
    degrees = sum(estimate.seeds - 1 for estimate in usable)
    if not degrees:
        return math.nan, 0
    return sum((e.seeds - 1) * e.seed_variance for e in usable) / degrees, degrees


def variance_bound(variance: float, degrees: int, confidence: float = 0.8) -> float:
    """What a variance lies below with this confidence: three seeds know their own spread badly."""
    return variance * degrees / float(stats.chi2.ppf(1 - confidence, degrees)) if degrees else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: if each is compared with the level, any wrong rejection at all is no likelier than the level."""
    count = len(p_values)
    adjusted, running = [1.0] * count, 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        running = max(running, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _half_width(
    seed_variance: float | np.ndarray, image_variance: float, seeds: int, images: int | None, level: float
) -> float | np.ndarray:
    """Of the interval. `seed_variance` may be an array; NaN with a single seed."""
    if seeds < 2:
        return math.nan
    over_seeds = -stdtrit(seeds - 1, level / 2)  # t's quantile; scipy.stats checks it a hundred times as long
    over_images = -stdtrit((images or 2) - 1, level / 2)
    return np.sqrt(over_seeds**2 * np.asarray(seed_variance) / seeds + over_images**2 * image_variance)
