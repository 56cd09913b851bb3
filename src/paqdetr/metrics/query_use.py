"""How evenly queries are used."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike


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
    values = counts.detach().cpu().double().numpy() if isinstance(counts, torch.Tensor) else counts
    x = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    shape = np.shape(values)
    if len(shape) != 1 or not x.size:
        raise ValueError(f"counts have the shape {shape}, expected (n,) with n >= 1")
    if not np.isfinite(x).all() or x[0] < 0:
        raise ValueError(f"counts lie in [{x.min()}, {x.max()}], expected finite numbers of at least 0")
    if x[-1] == 0:
        return 0.0
    n = x.size
    x = x / x[-1]  # a sum of counts near the largest float must not overflow
    value = 2 * np.dot(np.arange(1, n + 1), x) / (n * x.sum()) - (n + 1) / n
    return float(max(value, 0.0))  # equal counts may come out at -1e-16
