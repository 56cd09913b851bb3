"""How evenly queries are used: five views, the Gini coefficient and its curve, and what chance alone would give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from paqdetr.serialize import Jsonable, fields_of, plain

if TYPE_CHECKING:
    from torch import Tensor

SPREAD_FIGURES = ("threshold", "gini", "chance", "by_rank", "per_image", "unused", "half")


@dataclass(frozen=True, slots=True)
class Spread:
    """How some use of queries is spread over them.

    Attributes:
        counts: (n,) by query index: int64 images that used it, or float64 amounts.
        images: over which they were taken.
        threshold: the score above which a query counts as used; None where no score decides.
        ranked: whether index i is the i-th best proposal of each image, as in two-stage hosts.
        discrete: counts of images, of which an image adds at most one to a query; False for amounts such as gradient norms.
    """

    counts: np.ndarray
    images: int
    threshold: float | None = None
    ranked: bool = False
    discrete: bool = True

    @property
    def gini(self) -> float:
        """Of the counts, in [0, 1)."""
        return gini(self.counts)

    @property
    def per_image(self) -> float:
        """Mean number of queries used per image, or mean amount per image."""
        return float(self.counts.sum()) / max(self.images, 1)

    @property
    def chance(self) -> float | None:
        """The Gini coefficient if all queries were used alike: see `chance_gini`. None for amounts."""
        if not self.discrete:
            return None
        return chance_gini(num_queries=len(self.counts), images=self.images, per_image=self.per_image)

    @property
    def by_rank(self) -> float | None:
        """The Gini coefficient that rank order alone explains: that of the non-increasing curve over the index which is
        nearest to the counts (isotonic regression). None where the index is no rank."""
        if not self.ranked:
            return None
        from scipy.optimize import isotonic_regression

        return gini(isotonic_regression(self.counts.astype(np.float64), increasing=False).x)

    @property
    def unused(self) -> int:
        """Queries without any use."""
        return int((self.counts == 0).sum())

    @property
    def half(self) -> int:
        """The fewest queries for 50 % of use; 0 where there was none."""
        total = np.cumsum(np.sort(self.counts)[::-1], dtype=np.float64)
        return 0 if total[-1] == 0 else int(np.searchsorted(total, total[-1] / 2)) + 1

    def lorenz(self, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
        """See `lorenz_curve`."""
        return lorenz_curve(self.counts, points=points)

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json."""
        shares, use = self.lorenz()
        return {
            **{key: plain(getattr(self, key), 6) for key in SPREAD_FIGURES},
            "lorenz": [[round(float(s), 4), round(float(u), 6)] for s, u in zip(shares, use, strict=True)],
            "counts": plain(self.counts, 6),
        }


@dataclass(frozen=True, slots=True)
class PatternUse:
    """How patterns are used by the mixtures of all queries of all images: the fifth view.

    Attributes:
        mass: (m,) mean weight of each pattern over queries and images: sums to 1, equal use is 1/m.
        peak: (m,) its largest weight in any query of any image.
        leads: (m,) int64, how often it has the largest weight of a query.
        entropy: of the mixture rows, mean, over log m: 1 is a uniform mixture, 0 a single pattern.
        dead_share: a pattern is dead if its mass is below this share of 1/m.
    """

    mass: np.ndarray
    peak: np.ndarray
    leads: np.ndarray
    entropy: float
    dead_share: float

    @property
    def gini(self) -> float:
        """Of the mass, the column sums of W."""
        return gini(self.mass)

    @property
    def dead(self) -> int:
        """Patterns with less than `dead_share` of an equal share of the mass."""
        return count_dead(self.mass, self.dead_share)

    @property
    def never_lead(self) -> int:
        """Patterns that are never the largest part of a query: shades of other patterns at most."""
        return int((self.leads == 0).sum())

    @property
    def effective(self) -> float:
        """exp of the entropy of the mass: as many patterns of equal mass would be as diverse."""
        mass = self.mass[self.mass > 0]
        return float(np.exp(-(mass * np.log(mass)).sum()))

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json."""
        return fields_of(self, 6) | {
            "num_patterns": len(self.mass),
            "gini": round(self.gini, 6),
            "dead": self.dead,
            "never_lead": self.never_lead,
            "effective": round(self.effective, 4),
        }


def count_dead(mass: np.ndarray, dead_share: float = 0.1) -> int:
    """Of (m,) masses in any unit, those below `dead_share` of their mean; 0 if all are 0."""
    return int((mass < dead_share * mass.mean()).sum())


@dataclass(frozen=True, slots=True)
class Places(Jsonable):
    """Where queries find their boxes: of the ground truth boxes that each was matched with in the last layer.

    Attributes:
        mean: (n, 4) cxcywh in [0, 1]; NaN where a query was never matched.
        std: (n, 4) standard deviation over its boxes; NaN likewise.
        ranks: (R, R) int64 matches, R = min(n, 32): row r are the queries of indices r n/R and on, column s those whose score
            is of that rank in the image, best first.
    """

    json_digits = 6

    mean: np.ndarray
    std: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True, slots=True)
class QueryUsageReport(Jsonable):
    """Five views of how a detector uses its queries. None of them stands alone: docs/queries.md says why.

    Attributes:
        num_queries: n.
        images: that were seen.
        boxes_per_image: ground truth; None if there was none.
        ranked: whether the index is the proposal's rank (two-stage hosts).
        activations: view (a), at fixed thresholds: images in which a query's best score lies above.
        equal: view (b), at the threshold with equal activations per image; None if neither boxes nor a number were given.
        target: the activations per image that (b) is meant to have; `equal.per_image` is what it has.
        positives: view (c), matches of the last layer's one-to-one assignment; None without ground truth.
        gradients: view (d), norms of the gradient at the content queries; None if they were not collected.
        patterns: view (e); None for content that is no mixture.
        query_cosine: mean cosine between the content queries of an image: 1 means duplicates; None if content was not given.
        places: where queries find their boxes; None without ground truth.
    """

    json_digits = 6

    num_queries: int
    images: int
    boxes_per_image: float | None
    ranked: bool
    activations: tuple[Spread, ...]
    equal: Spread | None
    target: float | None
    positives: Spread | None
    gradients: Spread | None
    patterns: PatternUse | None
    query_cosine: float | None
    places: Places | None

    def rows(self) -> list[dict[str, Any]]:
        """The views as rows of one table: `view`, `what`, and the properties of `Spread` under their names."""
        spreads = [("a", f"score > {spread.threshold:g}", spread) for spread in self.activations]
        if self.equal is not None:
            spreads.append(("b", "equal activations", self.equal))
        if self.positives is not None:
            spreads.append(("c", "matched in the last layer", self.positives))
        if self.gradients is not None:
            spreads.append(("d", "gradient norm", self.gradients))
        rows = [
            {"view": view, "what": what, **{key: getattr(spread, key) for key in SPREAD_FIGURES}}
            for view, what, spread in spreads
        ]
        if self.patterns is not None:
            row = dict.fromkeys(SPREAD_FIGURES) | {"gini": self.patterns.gini, "unused": self.patterns.dead}
            rows.append({"view": "e", "what": "mass of patterns", **row})
        return rows


def gini(counts: ArrayLike | Tensor) -> float:
    """The Gini coefficient of how often each query was used: 2 sum_i i x_(i) / (n sum_i x_(i)) - (n + 1) / n, x ascending.

    Args:
        counts: (n,) non-negative and finite, any real or integer dtype, n >= 1: one per query, zeros of unused ones included.

    Returns:
        A float in [0, 1): 0 when all are used alike, 1 - 1/n when one query is all use. All zero gives 0: look at the sum
        before reading that as balance.

    Raises:
        ValueError: empty, not one-dimensional, negative, NaN or infinite.
    """
    x = _ascending(counts)
    if x[-1] == 0:
        return 0.0
    n = x.size
    value = 2 * np.dot(np.arange(1, n + 1), x) / (n * x.sum()) - (n + 1) / n
    return float(max(value, 0.0))  # equal counts may come out at -1e-16


def lorenz_curve(counts: ArrayLike | Tensor, *, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """The Lorenz curve: which share of all use the least used share of the queries makes up.

    One minus twice the area under it is the Gini coefficient: exactly with points = n + 1, and up to 1 / points otherwise.

    Args:
        counts: as of `gini`.
        points: how many, evenly spaced over the queries, both ends included; at least 2.

    Returns:
        (points,) shares of the queries from 0 to 1, least used first, and (points,) shares of the use; float64. Where nothing was
        used the curve is the diagonal.

    Raises:
        ValueError: as `gini`; or fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, found {points}")
    x = _ascending(counts)
    shares = np.linspace(0, 1, points)
    if x[-1] == 0:
        return shares, shares.copy()
    total = np.concatenate([[0.0], np.cumsum(x)])
    return shares, np.interp(shares, np.linspace(0, 1, x.size + 1), total / total[-1])


def chance_gini(*, num_queries: int, images: int, per_image: float) -> float:
    """The Gini coefficient to expect if all queries were used alike and only chance spread the counts.

    Few images make counts uneven even where queries are not: a coefficient near this one says nothing. Every image uses a query
    once or not at all, so a count is binomial, B(images, p) with p = per_image / num_queries. With its distribution function F
    the coefficient is sum_k F(k) (1 - F(k)) / mean, times (n - 1) / n for the pairs of a query with itself.

    Args:
        num_queries: n, at least 1.
        images: over which the counts are taken.
        per_image: mean number of queries that an image uses, in [0, n].

    Returns:
        A float in [0, 1); 0 where nothing is used.
    """
    from scipy.special import bdtr

    share = per_image / num_queries
    if not 0 <= share <= 1:
        raise ValueError(f"per_image: expected 0 to {num_queries}, found {per_image}")
    mean = images * share
    if mean == 0:
        return 0.0
    # Beyond twelve standard deviations F (1 - F) is 0 to the last bit: an evaluation of a million images stays quick.
    reach = 12 * np.sqrt(mean * (1 - share)) + 12
    counts = np.arange(max(int(mean - reach), 0), min(int(mean + reach), images) + 1)
    below = bdtr(counts, images, share)
    return float((below * (1 - below)).sum() / mean * (num_queries - 1) / num_queries)


def _ascending(counts: ArrayLike | Tensor) -> np.ndarray:
    """(n,) float64, sorted and scaled to a largest value of 1, or all zero."""
    # A tensor, wherever it is; nothing else has `detach`.
    values = counts if (detach := getattr(counts, "detach", None)) is None else detach().cpu().double().numpy()
    x = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    shape = np.shape(values)
    if len(shape) != 1 or not x.size:
        raise ValueError(f"counts have the shape {shape}, expected (n,) with n >= 1")
    if not np.isfinite(x).all() or x[0] < 0:
        raise ValueError(f"counts lie in [{x.min()}, {x.max()}], expected finite numbers of at least 0")
    return x / x[-1] if x[-1] > 0 else x  # a sum of counts near the largest float must not overflow
