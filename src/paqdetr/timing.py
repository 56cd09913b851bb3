"""Fair comparisons of time on a machine that does other things as well: what is compared takes turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each case: all cases once, then all again, so that what else the machine does in the
    meantime meets them alike.

    Args:
        cases: what is called, by name. On a GPU a case has to wait for its own end.
        rounds: counted calls of each case.
        warmup: calls of each case before these.
        clock: `time.process_time` counts what the process was given, on all its cores together.
        progress: called with (rounds done, rounds in all).
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    try:
        for done in range(1, rounds + 1):
            for name, case in cases.items():
                started = clock()
                case()
                seconds[name].append(clock() - started)
            if progress is not None:
                progress(done, rounds)
    finally:
        gc.enable()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest in milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 4),
        "min_ms": round(1e3 * min(seconds), 4),
        "max_ms": round(1e3 * max(seconds), 4),
    }


def compare(seconds: Mapping[str, list[float]], *, against: str) -> dict[str, Any]:
    """The summary of every case, and how many times faster it is than the case `against`: `ratio` is the median over rounds of
    the two times in the same round, `ratio_of_fastest` that of the fastest calls, which other work disturbs least."""
    compared: dict[str, Any] = {}
    for name, own in seconds.items():
        pairs = zip(seconds[against], own, strict=True)
        compared[name] = summary(own) | {
            "ratio": round(statistics.median(a / b for a, b in pairs), 2),
            "ratio_of_fastest": round(min(seconds[against]) / min(own), 2),
        }
    return compared
