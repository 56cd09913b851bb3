"""What libraries read from the environment once, when they are imported: set before that."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

# GNU OpenMP's own number is 300,000 looks, up to 15 ms: far longer than any pause between two operators. Where another process
# wants the core meanwhile, threads wait for one that waits in vain, and a step takes several times as long (docs/performance.md).
_LOOKS = "10000"


def calm_idle_threads() -> None:
    """Let threads sleep sooner, unless the user has said otherwise. Torch reads it once, when it is imported."""
    said = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not said and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = _LOOKS


def drop_missing_plot_backend() -> None:
    """Forget a back end of matplotlib whose package is not installed here, as programs that Jupyter starts inherit it: otherwise
    matplotlib cannot be imported."""
    kind, _, module = os.environ.get("MPLBACKEND", "").partition("://")
    if kind == "module" and "matplotlib" not in sys.modules and find_spec(module.partition(".")[0] or "?") is None:
        del os.environ["MPLBACKEND"]
