"""docs/queries.md: its figures are those of the kept file, and watching costs no more than promised."""

from __future__ import annotations

import json
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "queries.md").read_text(encoding="utf-8")


def test_what_watching_costs() -> None:
    kept = json.loads((REPO / "docs" / "results" / "query_usage_cost.json").read_text(encoding="utf-8"))
    evaluation, training = kept["evaluation"]["percent"], kept["training"]["percent"]
    assert f"{evaluation:.1f} % of an evaluation and {training:.2f} % of a step" in PAGE
    assert evaluation <= 3 and training <= 1
    assert kept["command"].split(" --json")[0] in PAGE
    assert {"seed", "versions", "processor", "threads"} <= kept.keys()
