"""Ranges of numbers that come from outside, where several doors share them; and numbers from environment variables."""

from __future__ import annotations

import os
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


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer; json's true is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_coordinate(value: object) -> TypeGuard[float]:
    """Whether it is a finite number of pixels. The comparison also sorts out NaN and integers that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def is_box(value: object) -> TypeGuard[list[float]]:
    """Whether it is four finite numbers of pixels."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_coordinate, value))
