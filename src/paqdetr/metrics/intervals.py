"""How far a figure depends on which images were in the test set: bootstrap intervals over images.

A resample draws as many images as there are, with replacement. Everything here is about images alone: what another
training with another seed would give is another question (`paqdetr study`).

Repeated images make AP look better: their true positives stand side by side, and each lifts the other's precision. So the
resampled AP lies above the AP itself, by as much as its own standard error on a small test set, and plain percentiles
would miss. Intervals of a figure are therefore moved back by that excess (`interval`). In the difference of two result
sets it cancels, and `difference` takes the percentiles as they are. Where the objects of a figure lie in few images, resamples
differ by less than test sets would: they are spread as Student's t asks (`_spread`). What each covers was simulated:
docs/decisions/0011-error-analysis.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from paqdetr.errors import ConfigError, DataError, OutOfMemoryError
from paqdetr.metrics.coco import FIGURE_NAMES
from paqdetr.metrics.matches import MatchTable, WeightedFigures
from paqdetr.serialize import Jsonable, fields_of
from paqdetr.values import MAX_RESAMPLES, MAX_SEED

SAMPLES = 1000
"""Resamples of an interval by default."""
LEVEL = 0.95

_AT_ONCE = 100
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Interval(Jsonable):
    """A figure and where it would lie, at the level asked for, on other test sets of as many images.

    Attributes:
        value: the figure on all images, each once; NaN where nothing defines it.
        low, high: NaN with it, and where all its objects lie in one image: a sample of one says nothing of others.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference(Jsonable):
    """By how much a second result set exceeds a first one on the same images.

    Attributes:
        value: second minus first.
        low, high: the paired interval; NaN as in `Interval`.
        superiority: the share of resamples in which the second is better, ties counting half. Above .975 or below .025
            zero lies outside a 95 % interval.
    """

    value: float
    low: float
    high: float
    superiority: float

    @property
    def decided(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class FigureIntervals(Jsonable):
    """Intervals of all figures of a result set.

    Attributes:
        figures: by the names of `FIGURE_NAMES`.
        per_class, per_class_AP50: by class name.
        samples, seed, level: what they come from.
    """

    figures: dict[str, Interval]
    per_class: dict[str, Interval]
    per_class_AP50: dict[str, Interval]
    samples: int
    seed: int
    level: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two result sets on the same ground truth, and their paired differences (second minus first).

    Attributes:
        first, second: each by itself, on the same resamples.
        figures: differences by the names of `FIGURE_NAMES`.
        per_class, per_class_AP50: differences by class name.
        samples, seed, level: what they come from.
    """

    first: FigureIntervals
    second: FigureIntervals
    figures: dict[str, Difference]
    per_class: dict[str, Difference]
    per_class_AP50: dict[str, Difference]
    samples: int
    seed: int
    level: float

    def verdict(self) -> str:
        """What the comparison of AP comes to, in a sentence; A is the first, B the second."""
        own, percent = self.figures["AP"], f"{self.level:.0%}".replace("%", " %")
        if math.isnan(own.value):
            return "Nothing to compare: the ground truth has no objects."
        if math.isnan(own.low):
            return f"Not decided: AP of B - A is {own.value:+.3f}, and all objects lie in one image."
        where = f"AP of B - A is {own.value:+.3f}, {percent} interval {own.low:+.3f} to {own.high:+.3f}"
        if own.value == own.low == own.high == 0:
            return f"A and B are equally good: {where}."
        if own.decided:
            return f"{'B' if own.value > 0 else 'A'} is better: {where}."
        return f"Not decided on these images: {where}, which holds 0."

    def to_json(self) -> dict[str, Any]:
        """The differences, ready for json; `first` and `second` write themselves."""
        return {key: value for key, value in fields_of(self).items() if key not in ("first", "second")}


def resample_images(num_images: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """How often each image is drawn in each resample: as many draws as images, with replacement.

    Returns:
        (samples, num_images) int32; every row sums to `num_images`. The same seed gives the same rows, so that everything
        measured on them is paired.

    Raises:
        ConfigError: there is no image, or `samples` or `seed` is out of range.
        OutOfMemoryError: so many do not fit.
    """
    if num_images < 1 or not 1 <= samples <= MAX_RESAMPLES or not 0 <= seed <= MAX_SEED:
        raise ConfigError(
            f"{samples} resamples of {num_images} images with seed {seed}: expected at least one image, "
            f"1 to {MAX_RESAMPLES} resamples and a seed from 0 to {MAX_SEED}",
            "choose values within the ranges",
        )
    rng = np.random.default_rng(seed)
    try:
        return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=samples).astype(np.int32)
    except MemoryError:
        raise OutOfMemoryError(
            f"{samples} resamples of {num_images} images do not fit into memory", "take fewer resamples"
        ) from None


def replicate_figures(table: MatchTable, weights: np.ndarray, *, progress: Progress | None = None) -> WeightedFigures:
    """`table.figures(weights)`; `progress` is called with (resamples done, in all)."""
    parts = []
    for start in range(0, len(weights), _AT_ONCE):
        parts.append(table.figures(weights[start : start + _AT_ONCE]))
        if progress is not None:
            progress(min(start + _AT_ONCE, len(weights)), len(weights))
    return WeightedFigures(
        {name: np.concatenate([part.figures[name] for part in parts]) for name in parts[0].figures},
        np.concatenate([part.per_class for part in parts]),
        np.concatenate([part.per_class_AP50 for part in parts]),
    )


def interval(value: float, replicates: np.ndarray, level: float = LEVEL, *, images: int | None = None) -> Interval:
    """The interval of one figure, inside [0, 1].

    The percentiles of the replicates, moved by the difference between the figure and the replicates' mean: it is meant to
    hold the mean that the figure has over test sets of this size.

    Args:
        value: on all images, each once.
        replicates: (S,), on the resamples. Those where nothing defines the figure (NaN: a rare class was not drawn) are left
            out.
        level: in (0, 1).
        images: how many have an object of the figure. Where all replicates are equal, as of a class that is found whole or not
            at all, the interval is that of a share that is 0 or 1 in so many images (Clopper and Pearson).
    """
    low, high, mean = _percentiles(value, replicates, level)
    if images and _alike(low, high):
        room = _room(images, level)
        return Interval(float(value), float(value * (1 - room)), float(value + (1 - value) * room))
    moved = np.clip([low - mean + value, high - mean + value], 0.0, 1.0)
    return Interval(float(value), float(moved[0]), float(moved[1]))


def difference(value: float, replicates: np.ndarray, level: float = LEVEL, *, images: int | None = None) -> Difference:
    """The paired interval of a difference: the percentiles of the differences on the same resamples.

    Args:
        value: second minus first, on all images.
        replicates: (S,), second minus first on each resample; NaN are left out.
        level: in (0, 1).
        images: as of `interval`. Where all replicates are equal, and not 0, other images may show the opposite: it is decided
            where a sign test over so many images decides, from six on at 95 %.
    """
    low, high, _ = _percentiles(value, replicates, level)
    if images and _alike(low, high) and value:
        room = _room(images, level)
        low, high = max(value * (1 - room) - room, -1.0), min(value * (1 - room) + room, 1.0)
    defined = replicates[~np.isnan(replicates)]
    superiority = math.nan if math.isnan(low) else float(np.mean((np.sign(defined) + 1) / 2))
    return Difference(float(value), low, high, superiority)


def figure_intervals(
    table: MatchTable, *, samples: int = SAMPLES, seed: int = 0, level: float = LEVEL, progress: Progress | None = None
) -> FigureIntervals:
    """Intervals of the twelve figures and of AP by class.

    Raises:
        ConfigError: `level` is not between 0 and 1, or there is nothing to draw.
    """
    weights = _weights(table, samples, seed, level)
    found = _replicates(table, weights, level, progress)
    return _intervals(table, table.figures(), found, (samples, seed, level))


def compare_results(
    first: MatchTable,
    second: MatchTable,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    progress: Progress | None = None,
) -> Comparison:
    """Two result sets on the same ground truth, resampled together.

    Raises:
        DataError: the two were matched with different ground truths.
        ConfigError: as of `figure_intervals`.
    """
    require_same_truth(first, second)
    weights = _weights(first, samples, seed, level)

    def part_of(part: int) -> Progress | None:
        report = progress
        return None if report is None else lambda done, total: report(part * total + done, 2 * total)

    values = first.figures(), second.figures()
    found = [_replicates(table, weights, level, part_of(part)) for part, table in enumerate((first, second))]
    parts, images = [_named(first, part) for part in (*values, *found)], _images(first)
    differences = {
        kind: {
            name: difference(float((b - a)[0]), after - before, level, images=images[kind][name])
            for name, a, b, before, after in ((name, *(part[kind][name] for part in parts)) for name in parts[0][kind])
        }
        for kind in parts[0]
    }
    return Comparison(
        _intervals(first, values[0], found[0], (samples, seed, level)),
        _intervals(second, values[1], found[1], (samples, seed, level)),
        **differences,
        samples=samples,
        seed=seed,
        level=level,
    )


def require_same_truth(first: MatchTable, second: MatchTable) -> None:
    """Raise DataError unless both result sets were matched with the same images, classes and objects."""
    for what, a, b in (
        ("images", first.image_ids, second.image_ids),
        ("categories", first.category_ids, second.category_ids),
    ):
        if a != b:
            missing = sorted(map(repr, set(a) ^ set(b)))[:3]
            raise DataError(
                f"the two result sets were matched with different {what}: {len(a)} and {len(b)}"
                + (f", only one side has {', '.join(missing)}" if missing else ""),
                "compare results on the same annotations",
            )
    if not np.array_equal(first.positives, second.positives):
        image = int(np.flatnonzero((first.positives != second.positives).any(axis=(0, 1)))[0])
        raise DataError(
            f"the two result sets were matched with different objects: image {first.image_ids[image]!r}",
            "compare results on the same annotations, both by boxes or both by masks",
        )


def _weights(table: MatchTable, samples: int, seed: int, level: float) -> np.ndarray:
    if not 0 < level < 1:
        raise ConfigError(f"level: found {level}, expected a number between 0 and 1", "use 0.95")
    return resample_images(len(table.image_ids), samples, seed)


def _replicates(table: MatchTable, weights: np.ndarray, level: float, progress: Progress | None) -> WeightedFigures:
    """As `replicate_figures`, spread about their mean by `_spread`."""
    found = replicate_figures(table, weights, progress=progress)

    def spread(values: np.ndarray, factor: float) -> np.ndarray:
        if math.isnan(factor) or np.isnan(values).all():
            return np.full_like(values, np.nan)
        mean = np.nanmean(values)
        return mean + factor * (values - mean)

    own = [_spread(table, level, area=area) for area in range(len(table.positives))]
    by_class = [_spread(table, level, index=index) for index in range(len(table.class_names))]
    return WeightedFigures(
        {name: spread(values, own[_area_of(name)]) for name, values in found.figures.items()},
        *(
            np.stack([spread(column, factor) for column, factor in zip(values.T, by_class, strict=True)], axis=1)
            for values in (found.per_class, found.per_class_AP50)
        ),
    )


def _area_of(name: str) -> int:
    """The position of a figure's range of areas in `MatchTable.positives`."""
    return {"s": 1, "m": 2, "l": 3}.get(name[-1], 0)


def _spread(table: MatchTable, level: float, *, area: int = 0, index: int | None = None) -> float:
    """By how much the replicates of a figure of an area, or of a class by its position, have to be further apart.

    The variance of a mean over k images that a bootstrap shows is too small by (k - 1) / k, and its quantiles are those of a
    normal distribution where Student's t with k - 1 degrees of freedom holds. A figure of many classes is the mean of theirs, of
    which some may lie in few images: their variances' factors are averaged, and their degrees of freedom added.

    Returns:
        NaN where all objects lie in one image: its replicates would all be alike, and their interval the narrowest of all.
    """
    from scipy.special import ndtri, stdtrit  # 0.2 seconds

    there = table.positives[area] > 0  # (C, I)
    if index is not None:
        there = there[index : index + 1]
    images, together = there.sum(axis=-1), int(there.any(axis=0).sum())
    images = images[images > 0]
    if together < 2:
        return math.nan
    freedom = min(max(int((images - 1).sum()), 1), together - 1)
    variance = np.mean(1 + 1 / (np.maximum(images, 2) - 1))  # of one image nothing is known: as of two
    quantile = (1 + level) / 2
    return float(math.sqrt(variance) * stdtrit(freedom, quantile) / ndtri(quantile))


def _named(table: MatchTable, found: WeightedFigures) -> dict[str, dict[str, np.ndarray]]:
    """Kind of figure -> name -> (S,)."""
    return {
        "figures": found.figures,
        "per_class": dict(zip(table.class_names, found.per_class.T, strict=True)),
        "per_class_AP50": dict(zip(table.class_names, found.per_class_AP50.T, strict=True)),
    }


def _intervals(
    table: MatchTable, values: WeightedFigures, found: WeightedFigures, source: tuple[int, int, float]
) -> FigureIntervals:
    once, often = _named(table, values), _named(table, found)
    (samples, seed, level), images = source, _images(table)
    return FigureIntervals(
        **{
            kind: {
                name: interval(float(once[kind][name][0]), row, level, images=images[kind][name])
                for name, row in rows.items()
            }
            for kind, rows in often.items()
        },
        samples=samples,
        seed=seed,
        level=level,
    )


def _images(table: MatchTable) -> dict[str, dict[str, int]]:
    """Kind of figure -> name -> how many images have an object of it."""
    of_area = (table.positives > 0).any(axis=1).sum(axis=-1).tolist()
    of_class = dict(zip(table.class_names, (table.positives[0] > 0).sum(axis=-1).tolist(), strict=True))
    return {
        "figures": {name: of_area[_area_of(name)] for name in FIGURE_NAMES},
        "per_class": of_class,
        "per_class_AP50": of_class,
    }


def _alike(low: float, high: float) -> bool:
    """Whether replicates between these percentiles differ by rounding alone."""
    return high - low < 1e-9


def _room(images: int, level: float) -> float:
    """The largest share of further images that may be otherwise than all of these were (Clopper and Pearson)."""
    return float(1 - ((1 - level) / 2) ** (1 / images))


def _percentiles(value: float, replicates: np.ndarray, level: float) -> tuple[float, float, float]:
    """(low, high, mean) of the replicates that are defined; NaN if the figure itself is not."""
    defined = replicates[~np.isnan(replicates)]
    if math.isnan(value) or not len(defined):
        return math.nan, math.nan, math.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), float(defined.mean())
