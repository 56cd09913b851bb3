"""Known answers: intervals that cover, verdicts that err no oftener than they say, effects that are seen as often as planned."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from paqdetr.study.statistics import Estimate, estimate, holm, pooled_variance, shared_variance, variance_bound

SIMULATIONS = 500
IMAGES = 60
EFFECT = 0.012

# Standard deviations of a difference in AP: what all seeds share by the images, seeds, and seeds with images together.
WORLDS = {
    "seeds alone": (0.0, 0.01, 0.0),
    "images alone": (0.01, 0.0, 0.0),
    "as in small data": (0.01, 0.01, 0.005),
    "few images matter": (0.003, 0.01, 0.003),
    "noisy together": (0.005, 0.003, 0.01),
}


WEIGHTS = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=200).T / IMAGES


def draw(
    world: tuple[float, float, float], seeds: int, effect: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paired runs of two variants, whose difference in a mean over images has this expectation: (n,) differences, and (n, R)
    on images that really are resampled."""
    shared, between, mixed = world
    root = math.sqrt(IMAGES)
    images = rng.normal(0, shared * root, IMAGES)
    own = rng.normal(0, mixed * root, (seeds, IMAGES))
    differences = effect + rng.normal(0, between, seeds)[:, None] + images + own  # (n, I)
    return differences.mean(1), differences @ WEIGHTS


def simulate(world: tuple[float, float, float], seeds: int, effect: float, rng: np.random.Generator) -> Estimate:
    """What a study says of such runs."""
    values, replicates = draw(world, seeds, effect, rng)
    return estimate(values, replicates, images=IMAGES)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("world", WORLDS)
def test_the_interval_covers_a_planted_effect(world: str, seeds: int) -> None:
    rng = np.random.default_rng([seeds, *world.encode()])
    inside = 0
    for _ in range(SIMULATIONS):
        low, high = simulate(WORLDS[world], seeds, EFFECT, rng).interval
        inside += low <= EFFECT <= high
    assert 0.90 <= inside / SIMULATIONS


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("claims", [1, 12, 34])
def test_no_level_that_holms_rule_asks_for_is_exceeded(seeds: int, claims: int) -> None:
    """How often `p` lies below level / claims without an effect, integrated over S^2, for any share of the images."""
    level = 0.05 / claims
    shares = (np.arange(500) + 0.5) / 500
    found = stats.chi2.ppf(shares, seeds - 1) / (seeds - 1)  # S^2 / its expectation
    for image_variance in np.geomspace(1e-3, 100, 16):
        error = math.sqrt(1 / seeds + image_variance)
        estimates = [Estimate(0.0, (0.0,) * seeds, variance, image_variance, 400, level=level) for variance in found]
        half = np.array([found.interval[1] for found in estimates])
        assert 2 * stats.norm.sf(half / error).mean() <= 1.02 * level


def over_seeds(values: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def over_images(values: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentiles of the resampled means."""
    low, high = np.quantile(replicates.mean(0), (0.025, 0.975))
    return low, high


def over_both(values: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentiles where seeds are drawn too, with replacement."""
    drawn = rng.integers(len(values), size=(len(values), replicates.shape[1]))
    low, high = np.quantile(replicates[drawn, np.arange(replicates.shape[1])].mean(0), (0.025, 0.975))
    return low, high


@pytest.mark.parametrize(
    ("method", "world"), [(over_seeds, "images alone"), (over_images, "seeds alone"), (over_both, "seeds alone")]
)
def test_simpler_intervals_do_not_cover(method: Callable[..., tuple[float, float]], world: str) -> None:
    """Each is blind to something, or has too little spread with three seeds."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(SIMULATIONS):
        low, high = method(*draw(WORLDS[world], 3, EFFECT, rng), rng)
        missed += not low <= EFFECT <= high
    assert missed / SIMULATIONS > 0.15


def test_the_formula_by_hand() -> None:
    values = [0.01, 0.02, 0.06]
    replicates = np.array([[1.0, 3.0, 2.0], [2.0, 6.0, 1.0], [0.0, 1.0, 5.0]])
    # Around their means (2, 3, 2) the rows are (-1, 1, 0), (-1, 3, -2), (-2, -1, 3): covariances 4/2, 1/2 and -7/2.
    assert shared_variance(replicates) == 0
    assert shared_variance(replicates[:2]) == pytest.approx(2)
    found = estimate(values, replicates * 0 + np.array([0.0, 0.03, 0.0]), images=10)
    assert found.seed_variance == pytest.approx(0.0007) and found.mean == pytest.approx(0.03)
    c = 0.0003 * 10 / 9  # every row has variance 3e-4, and so has every pair
    assert found.image_variance == pytest.approx(c)
    squares = stats.t.ppf(0.975, 2) ** 2 * 0.0007 / 3 + stats.t.ppf(0.975, 9) ** 2 * c
    low, high = found.interval
    assert high - 0.03 == pytest.approx(math.sqrt(squares)) and low + high == pytest.approx(0.06)
    assert estimate(values).interval == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval())
    assert estimate(values).p_value(0.01) == pytest.approx(stats.ttest_1samp(values, 0.01).pvalue)


def test_resamples_that_define_no_figure_are_left_out() -> None:
    values, defined = [0.01, 0.02], np.array([[0.1, 0.4, 0.2], [0.3, 0.9, 0.1]])
    nan = math.nan
    replicates = np.array([[0.1, nan, 0.4, 0.7, 0.2], [0.3, nan, 0.9, nan, 0.1]])
    assert estimate(values, replicates, images=10) == estimate(values, defined, images=10)
    assert estimate(values, replicates[:, :3] * [1, 1, nan], images=10) == estimate(values)


def test_the_p_value_is_the_level_at_which_the_interval_ends_there() -> None:
    rng = np.random.default_rng(1)
    found = simulate(WORLDS["as in small data"], 4, EFFECT, rng)
    low, high = found.interval
    assert found.p_value(low) == pytest.approx(0.05) and found.p_value(high) == pytest.approx(0.05)
    assert found.p_value(found.mean) == 1.0 and found.p_value(low - 0.01) < 0.05


def test_seeds_on_images_of_their_own_share_nothing() -> None:
    rng = np.random.default_rng(2)
    common = rng.normal(size=300)
    replicates = np.stack([common, common, common + rng.normal(size=300), common])
    assert shared_variance(replicates, "abcd") == 0
    whole = shared_variance(replicates)
    assert whole == pytest.approx(1, abs=0.2)
    # Two folds of two seeds: 2 of the 6 pairs are on the same images.
    assert shared_variance(replicates, "aabb") == pytest.approx(whole / 3, rel=0.2)


def test_folds_cover_too() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(SIMULATIONS):
        x = EFFECT + rng.normal(0, 0.01, 5)[:, None] + rng.normal(0, 0.02 * math.sqrt(IMAGES), (5, IMAGES))
        low, high = estimate(x.mean(1), x @ WEIGHTS, groups=range(5), images=IMAGES).interval
        inside += low <= EFFECT <= high
    assert 0.90 <= inside / SIMULATIONS


@pytest.mark.parametrize("world", ["seeds alone", "as in small data", "images alone"])
@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_smallest_effect_is_seen_in_four_of_five_studies(world: str, seeds: int) -> None:
    shared, between, mixed = WORLDS[world]
    truth = Estimate(0.0, (0.0,) * seeds, between**2 + mixed**2, shared**2, IMAGES)
    effect = truth.smallest_effect()
    assert truth.power(effect) == pytest.approx(0.8, abs=0.01)
    rng = np.random.default_rng([seeds, 7])
    seen = np.mean([simulate((shared, between, mixed), seeds, effect, rng).interval[0] > 0 for _ in range(SIMULATIONS)])
    assert seen == pytest.approx(0.8, abs=0.06)


def test_the_seeds_that_are_needed_are_the_fewest() -> None:
    found = Estimate(0.0, (0.0,) * 3, 0.01**2, 0.002**2, 400)
    needed = found.seeds_needed(0.015)
    assert needed is not None and 3 < needed < 15
    assert found.with_seeds(needed).smallest_effect() <= 0.015 < found.with_seeds(needed - 1).smallest_effect()
    # 2.8 standard errors of the images alone are more than the effect: no number of seeds will do.
    assert Estimate(0.0, (0.0,) * 3, 0.01**2, 0.006**2, 400).seeds_needed(0.015) is None
    with pytest.raises(ValueError, match="single seed"):
        estimate([0.1]).seeds_needed(0.01)


def test_a_single_seed_says_what_it_knows() -> None:
    found = estimate([0.3], np.linspace(0, 1, 50)[None], images=20)
    assert all(map(math.isnan, found.interval)) and found.p_value() == 1.0 and found.power(1.0) == 0
    assert found.to_json()["low"] is None and found.image_variance > 0


def test_runs_without_any_chance() -> None:
    found = estimate([0.25, 0.25, 0.25])
    assert found.interval == (0.25, 0.25)
    assert found.p_value() == 1 and math.isnan(found.smallest_effect()) and found.power(1.0) == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_pooled_variance_weighs_by_degrees_of_freedom() -> None:
    first, second = estimate([0.0, 2.0]), estimate([1.0, 1.0, 4.0])
    assert pooled_variance([first, second, estimate([9.0])]) == (pytest.approx((2 + 2 * 3) / 3), 3)
    # A variance found in 2 degrees of freedom may well be 4.5 times as large.
    assert variance_bound(1.0, 2) == pytest.approx(2 / stats.chi2.ppf(0.2, 2))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="replicates"):
        estimate([1.0, 2.0], np.zeros((3, 10)), images=5)
    with pytest.raises(ValueError, match="images"):
        estimate([1.0, 2.0], np.zeros((2, 10)))
    with pytest.raises(ValueError, match="values"):
        estimate([])
