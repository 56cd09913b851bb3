"""How often intervals of a study cover the truth: the one that is used, and those that were turned down.

python benchmarks/study_coverage.py [SIMULATIONS]

Differences of n paired runs are simulated with three sources of chance, whose standard deviations name a world: what all seeds
share by the images, what differs from seed to seed, and what differs by seed and image together. Images really are resampled.
How often a verdict without an effect is wrong, at the levels that Holm's rule asks for, is integrated.
Writes docs/results/study_coverage.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy.special import ndtr, stdtrit
from scipy.stats import chi2

from paqdetr.study.statistics import estimate

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "study_coverage.json"
IMAGES, RESAMPLES, LEVEL = 100, 400, 0.05
TEST_IMAGES, _QUADRATURE = 400, 20000  # of `sizes`
SEEDS = (2, 3, 5, 8)
WORLDS = (
    (0.0, 1.0, 0.0),
    (0.2, 1.0, 0.0),
    (0.3, 1.0, 0.3),
    (1.0, 1.0, 0.5),
    (1.0, 0.3, 0.3),
    (1.0, 0.0, 0.1),
    (0.5, 0.5, 1.0),
)


def intervals(values: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Half widths around the mean, or ends: each method's interval."""
    n, mean = len(values), float(values.mean())
    found = estimate(values.tolist(), replicates, images=IMAGES, level=LEVEL)
    between, shared = found.seed_variance / n, found.image_variance
    total = between + shared
    over_seeds, over_images = -stdtrit(n - 1, LEVEL / 2), -stdtrit(IMAGES - 1, LEVEL / 2)
    degrees = total**2 / (between**2 / (n - 1) + shared**2 / (IMAGES - 1))
    half = {
        "t over seeds": over_seeds * math.sqrt(between),
        "sum, Satterthwaite": -stdtrit(degrees, LEVEL / 2) * math.sqrt(total),
        "sum, Cochran": (over_seeds * between + over_images * shared) / math.sqrt(total),
    }
    ends = {name: (mean - width, mean + width) for name, width in half.items()}
    drawn = rng.integers(n, size=(n, RESAMPLES))
    for name, means in (
        ("percentiles over images", replicates.mean(0)),
        ("percentiles over both", replicates[drawn, np.arange(RESAMPLES)].mean(0)),
    ):
        low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
        ends[name] = (float(low), float(high))
    return {"sum, Howe (used)": found.interval} | ends


def coverage(world: tuple[float, float, float], n: int, simulations: int) -> dict[str, float]:
    """Share of simulations in which each method's interval holds the truth."""
    rng = np.random.default_rng([n, *(round(10 * part) for part in world)])
    weights = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=RESAMPLES).T / IMAGES
    shared, between, mixed = (part * math.sqrt(scale) for part, scale in zip(world, (IMAGES, 1, IMAGES), strict=True))
    inside: dict[str, int] = {}
    for _ in range(simulations):
        images = rng.normal(0, shared, IMAGES) + rng.normal(0, between, (n, 1)) + rng.normal(0, mixed, (n, IMAGES))
        for name, (low, high) in intervals(images.mean(1), images @ weights, rng).items():
            inside[name] = inside.get(name, 0) + bool(low <= 0 <= high)
    return {name: count / simulations for name, count in inside.items()}


def sizes(n: int, claims: int) -> dict[str, float]:
    """How often each of two rules finds an effect that is not there, over the level that Holm's rule asks of the first claim: the
    worst over the images' share of the variance, S^2 integrated over."""
    level = LEVEL / claims
    found = chi2.ppf((np.arange(_QUADRATURE) + 0.5) / _QUADRATURE, n - 1) / (n - 1)  # S^2 over its expectation
    over_seeds, over_images = -stdtrit(n - 1, level / 2), -stdtrit(TEST_IMAGES - 1, level / 2)
    worst = {"Howe (used)": 0.0, "Cochran": 0.0}
    for shared in np.geomspace(1e-4, 1e3, 60):
        between = found / n
        half = {
            "Howe (used)": np.sqrt(over_seeds**2 * between + over_images**2 * shared),
            "Cochran": (over_seeds * between + over_images * shared) / np.sqrt(between + shared),
        }
        for name, width in half.items():
            size = 2 * ndtr(-width / math.sqrt(1 / n + shared)).mean()
            worst[name] = max(worst[name], float(size) / level)
    return {name: round(ratio, 3) for name, ratio in worst.items()}


def main() -> None:
    """Simulate, integrate, print and write."""
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    rows = []
    for n in SEEDS:
        for world in WORLDS:
            rows.append({"seeds": n, "world": world, "coverage": coverage(world, n, simulations)})
            print(n, world, {name: round(share, 3) for name, share in rows[-1]["coverage"].items()})
    content = {
        "command": f"python benchmarks/study_coverage.py {simulations}",
        "simulations": simulations,
        "rows": rows,
        "sizes": [{"seeds": n, "claims": m, "over_level": sizes(n, m)} for n in (2, 3, 5) for m in (1, 2, 8, 12, 34)],
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
