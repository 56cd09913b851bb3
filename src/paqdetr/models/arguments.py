"""What callers pass along with images, checked before anything slow begins."""

from __future__ import annotations

from paqdetr.errors import ConfigError


def require_threshold(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is a number in [0, 1]; NaN is none, and no score would reach it."""
    if not 0 <= threshold <= 1:
        raise ConfigError(
            f"threshold: expected a number from 0 to 1, found {threshold}", "scores lie in that range"
        )


def require_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless at least one image goes through at a time."""
    if batch_size < 1:
        raise ConfigError(
            f"batch_size: expected at least 1, found {batch_size}",
            "it is how many images go through together, and changes no detection",
        )
