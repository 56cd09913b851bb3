"""Numbers as json can have them: it knows neither NaN nor infinity, and null stands where nothing defines a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def json_number(value: float | None, digits: int | None = None) -> float | None:
    """A number as it is, or to so many digits; None where it is NaN, infinite or None already."""
    if value is None or not math.isfinite(value):
        return None
    return float(value) if digits is None else round(float(value), digits)


def json_safe(value: Any) -> Any:
    """Dictionaries, lists and tuples as they are, but for None in place of every number that json has not."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(values: np.ndarray) -> list[Any]:
    """Nested lists: whole numbers as they are, others to six digits, NaN and infinity as None."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    nested = np.round(values.astype(np.float64), 6).astype(object)
    nested[~np.isfinite(values)] = None
    return nested.tolist()
