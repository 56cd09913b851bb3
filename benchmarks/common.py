"""What benchmarks share: interleaved timing, and the machine it was done on."""

from __future__ import annotations

import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_", "PAQDETR_")


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each case: all cases once, then all again, so that what else the machine does in the
    meantime meets them alike. `time.process_time` as clock counts what the process was given, on all its cores together."""
    for case in cases.values():
        for _ in range(warmup):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, case in cases.items():
                started = clock()
                case()
                seconds[name].append(clock() - started)
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


def provenance(*, threads: int, seed: int, packages: tuple[str, ...]) -> dict[str, Any]:
    """Command, hardware and versions, to stand at the top of a json."""
    load = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": seed,
        "threads": threads,
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_SETTINGS)},
        "load_average_before": load,
    }


def _processor() -> str:
    """Model and widest vectors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    fields = {key.strip(): value.strip() for key, value in reversed(pairs)}
    name = fields.get("model name", platform.machine())
    family = f" family {fields['cpu family']}" if "cpu family" in fields else ""
    flags = fields.get("flags", "").split()
    vectors = next((f", {flag}" for flag in ("avx512f", "avx2", "avx") if flag in flags), "")
    return f"{name}{family}{vectors}"


def _version(name: str) -> str | None:
    if name == "paqdetr":  # what runs, installed or not
        from paqdetr._version import __version__

        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None
