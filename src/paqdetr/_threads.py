"""How long idle threads of torch on a CPU wait for work before they sleep."""

from __future__ import annotations

import os
import sys

# GNU OpenMP's own number is 300,000 looks, up to 15 ms: far longer than any pause between two operators. Where another process
# wants the core meanwhile, threads wait for one that waits in vain, and a step takes several times as long (docs/performance.md).
_LOOKS = "10000"


def calm_idle_threads() -> None:
    """Let threads sleep sooner, unless the user has said otherwise. Torch reads it once, when it is imported."""
    said = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not said and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = _LOOKS
