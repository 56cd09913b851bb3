"""How evenly queries are used: the Gini coefficient, its curve, and what chance alone would give."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import bdtr


def gini(counts: ArrayLike | torch.Tensor) -> float:
    """The Gini coefficient of how often each query was used.

    G = 2 sum_i i x_(i) / (n sum_i x_(i)) - (n + 1) / n, with x ascending, i from 1, zeros kept.

    Args:
        counts: (n,) non-negative and finite, any real or integer dtype, n >= 1: one count or weight a query.
            Queries that were never used must be in it.

    Returns:
        A float in [0, 1): 0 when all are used alike, 1 - 1/n when one query does everything. It does not
        change with the unit of the counts. All zero gives 0: nothing was used, so nothing unevenly. Look at
        the sum before reading that as balance.

    Raises:
        ValueError: empty, not one-dimensional, negative, NaN or infinite.
    """
    x = _ascending(counts)
    if x[-1] == 0:
        return 0.0
    n = x.size
    value = 2 * np.dot(np.arange(1, n + 1), x) / (n * x.sum()) - (n + 1) / n
    return float(max(value, 0.0))  # equal counts may come out at -1e-16


def lorenz_curve(counts: ArrayLike | torch.Tensor, *, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
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


def _ascending(counts: ArrayLike | torch.Tensor) -> np.ndarray:
    """(n,) float64, sorted and scaled to a largest value of 1, or all zero."""
    values = counts.detach().cpu().double().numpy() if isinstance(counts, torch.Tensor) else counts
    x = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    shape = np.shape(values)
    if len(shape) != 1 or not x.size:
        raise ValueError(f"counts have the shape {shape}, expected (n,) with n >= 1")
    if not np.isfinite(x).all() or x[0] < 0:
        raise ValueError(f"counts lie in [{x.min()}, {x.max()}], expected finite numbers of at least 0")
    return x / x[-1] if x[-1] > 0 else x  # a sum of counts near the largest float must not overflow
