"""docs/evaluation.md: what intervals cost is what the kept file says, there and in the decision behind them."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_what_intervals_cost() -> None:
    kept = json.loads((DOCS / "results" / "interval_cost.json").read_text(encoding="utf-8"))
    for name in ("evaluation.md", "decisions/0011-error-analysis.md"):
        page = " ".join((DOCS / name).read_text(encoding="utf-8").split())
        assert kept["command"].split(" --json")[0] in page
        assert f"{kept['resampling_seconds']} s of" in page and f"{kept['matching_seconds']} s" in page
        assert f"resamples of {kept['images']} images" in page and f"{kept['classes']} classes" in page
        assert f"{kept['detections']:,} detections" in page
    assert {"seed", "versions", "processor", "threads"} <= kept.keys()
