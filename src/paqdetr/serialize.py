"""Values as json can have them: it knows neither NaN nor infinity, and null stands where nothing defines a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import numpy as np


def json_number(value: float | None, digits: int | None = None) -> float | None:
    """A number as it is, or to so many digits; None where it is NaN, infinite or None already."""
    if value is None or not math.isfinite(value):
        return None
    return float(value) if digits is None else round(float(value), digits)


def finite_rows(records: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> np.ndarray:
    """(R, K) float64: the values under these keys, of the records that have all of them as finite numbers."""
    rows = [[record.get(key) for key in keys] for record in records]
    finite = [row for row in rows if all(isinstance(value, int | float) and math.isfinite(value) for value in row)]
    return np.array(finite, dtype=float).reshape(-1, len(keys))


def plain(value: Any, digits: int | None = None) -> Any:
    """A value of any depth as json can have it.

    Dataclasses are what their `to_json` makes of them, or else their fields by name; keys are text, arrays and tuples lists.

    Args:
        value: to be written.
        digits: of numbers that are not whole; all if None. What a `to_json` makes stays as it is.
    """
    if isinstance(value, np.ndarray):
        return _plain_array(value, digits)
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return fields_of(value, digits)
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    return json_number(value, digits) if isinstance(value, float) else value


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class Jsonable:
    """A dataclass whose `to_json` gives its fields by name, as `plain` has them, numbers to `json_digits` decimals if set."""

    __slots__ = ()
    json_digits: ClassVar[int | None] = None

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json; None for NaN."""
        return fields_of(self, self.json_digits)


def fields_of(found: Any, digits: int | None = None) -> dict[str, Any]:
    """The fields of a dataclass by name, as `plain` has them: what most `to_json` return."""
    return {field.name: plain(getattr(found, field.name), digits) for field in fields(found)}


def _plain_array(values: np.ndarray, digits: int | None) -> Any:
    if not np.issubdtype(values.dtype, np.floating):
        return values.tolist()
    exact = values.astype(np.float64)
    nested = (exact if digits is None else np.round(exact, digits)).astype(object)
    nested[~np.isfinite(exact)] = None
    return nested.tolist()
