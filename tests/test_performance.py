"""The figures of docs/performance.md are those of the files in docs/results/performance."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.integration

REPO = Path(__file__).resolve().parents[1]


def test_the_attention_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: Any, script: Callable[[str], ModuleType]
) -> None:
    benchmark = script("benchmarks/deform_attn.py")
    monkeypatch.setattr(benchmark, "IMAGES", {"64x48": (64, 48)})
    monkeypatch.setattr(benchmark, "QUERIES", 5)
    monkeypatch.setattr(benchmark, "first_call", lambda: {"empty_cache_forward": 1.0})
    file = tmp_path / "out" / "x.json"
    arguments = ["--threads", "1", "--rounds", "2", "--clock", "cpu", "--images", "64x48", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/deform_attn.py", *arguments])
    benchmark.main()
    report = json.loads(file.read_text())
    assert report["command"].startswith("python benchmarks/deform_attn.py --threads 1")
    assert [(case["part"], case["queries"]) for case in report["cases"]] == [("encoder", 65), ("decoder", 5)]
    for case in report["cases"]:
        assert case["forward"]["numba"]["median_ms"] > 0 and case["forward_backward"]["numba"]["ratio"] > 0
        assert 0 < case["saved_bytes"]["numba"] < case["saved_bytes"]["reference"]
        # 4 corners, 8 heads of 32 channels, 4 levels of 4 points.
        assert case["flops"] == 2 * 4 * 8 * 32 * 16 * case["queries"]
