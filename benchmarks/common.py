"""What benchmarks share: interleaved timing, which is the package's, and the machine it was done on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paqdetr.timing import compare, interleave, summary

__all__ = ["compare", "interleave", "provenance", "summary"]

_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_", "PAQDETR_")


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
