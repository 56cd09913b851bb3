"""Plain values that come from outside: ranges, arguments of calls, environment variables, and what json's values mean."""

from __future__ import annotations

import csv
import os
from numbers import Integral, Real
from typing import TypeGuard

from paqdetr.errors import ConfigError

MAX_SEED = 2**32 - 1
"""The largest that numpy's RandomState and scikit-learn take."""

MAX_WORKERS = 256
"""Processes that load, decode or draw images."""

MAX_BATCH = 2**16
"""Images that go through a model together."""

MAX_RESAMPLES = 10_000
"""Of images, behind an interval; a count for each image and resample is kept in memory."""


def environment_integer(name: str, default: int, *, low: int, high: int = 2**31 - 1) -> int:
    """The whole number in an environment variable, `default` where it is not set.

    Raises:
        ConfigError: it is set to something else, or is out of range.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    digits = text.strip()
    value = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else -1
    if low <= value <= high:
        return value
    raise ConfigError(
        f"the environment variable {name} is {text[:80]!r}, expected a whole number from {low} to {high}",
        f"set it to one, or unset {name}",
    )


def as_id(value: object) -> int | str | None:
    """An id: a text, an integer of 64 bits, or a float that is one (pandas writes 1.0). None: it is no id."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**63) <= value < 2**63:
        return None
    return int(value) if value == int(value) else None


_FLAGS = dict.fromkeys(("", "false", "no", "n", "off", "none", "null", "unspecified"), False) | dict.fromkeys(
    ("true", "yes", "y", "on"), True
)


def as_flag(value: object) -> bool | None:
    """A flag in any of the spellings that exporters use: 0, 1.0, "1", false, "No", "Unspecified", nothing at all. None: it is
    none of them."""
    if value is None:
        return False
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _FLAGS:
            return _FLAGS[word]
        try:
            value = float(word)
        except ValueError:
            return None
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def is_whole(value: object) -> bool:
    """Whether it is an integer, of numpy too; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether it is a number, of numpy too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_coordinate(value: object) -> TypeGuard[float]:
    """Whether it is a finite number of pixels. The comparison also sorts out NaN and integers that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def is_box(value: object) -> TypeGuard[list[float]]:
    """Whether it is [x, y, width, height], four finite numbers of pixels, with no side below 0."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_coordinate, value)) and min(value[2:]) >= 0


def is_side(value: object) -> TypeGuard[float]:
    """Whether it is a side in whole pixels; some exporters write 640.0."""
    return is_coordinate(value) and value >= 1 and value == int(value)


def require_threshold(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is a number in [0, 1]; NaN is none, and no score would reach it."""
    if not is_real(threshold) or not 0 <= threshold <= 1:
        raise ConfigError(
            f"threshold: expected a number from 0 to 1, found {threshold!r}", "scores lie in that range; 0.3 is usual"
        )


def require_nms(nms: float | None) -> None:
    """Raise ConfigError unless `nms` is None or an IoU in [0, 1]."""
    if nms is not None and (not is_real(nms) or not 0 <= nms <= 1):
        raise ConfigError(f"nms: expected an IoU from 0 to 1, found {nms!r}", "0.7 is usual, and 1 drops nothing")


def parse_nms(text: str, name: str) -> float:
    """The IoU that an option or a parameter called `name` says: 1, which drops nothing, for "none".

    Raises:
        ConfigError: it is no number from 0 to 1.
    """
    try:
        value = 1.0 if text.strip().lower() == "none" else float(text)
        require_nms(value)
    except (ValueError, ConfigError):
        raise ConfigError(
            f"{name}: expected an IoU from 0 to 1, or none, found {text[:80]!r}", "0.7 is usual, and none drops nothing"
        ) from None
    return value


def parse_names(text: str) -> list[str]:
    """`a, b` -> `["a", "b"]`: names separated by commas, those that have one in double quotes; nothing between two is none."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [name.strip() for row in rows for name in row if name.strip()]


def require_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless a whole number of images, at least one, goes through at a time."""
    if not is_whole(batch_size) or batch_size < 1:
        raise ConfigError(
            f"batch_size: expected a whole number of at least 1, found {batch_size!r}",
            "it is how many images go through together, and changes no detection",
        )
