"""The studies that are kept, and how one is taken in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from paqdetr.study.results import read_results

pytestmark = pytest.mark.integration

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tools/study_tables.py")


def test_what_is_kept_is_small_and_whole(pages: ModuleType) -> None:
    files = [file for file in pages.KEPT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < pages.MOST_BYTES
    assert {file.suffix for file in files} <= {".json", ".yaml"}, "weights are not kept"
    for study in pages.KEPT.glob("*/study.yaml"):
        assert read_results(study.parent / "results"), study


def test_a_study_is_taken_in(pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "KEPT", tmp_path / "kept")
    pages.kept_study.cache_clear()
    pages.kept_report.cache_clear()
    with pytest.raises(SystemExit, match="holds no study"):
        pages.take_in(tmp_path)
    folder = tmp_path / "out"
    result = folder / "results" / "digits" / "baseline" / "seed0.json"
    result.parent.mkdir(parents=True)
    parts = {
        "format": 1,
        "data": "digits",
        "variant": "baseline",
        "seed": 0,
        "failed": "training: error: NaN",
        **{key: {} for key in ("settings", "measure", "images", "figures", "replicates", "cost", "provenance")},
        "curve": [],
    }
    result.write_text(json.dumps(parts))
    (folder / "study.yaml").write_text(
        "name: small\nbase: dino_nano\nepochs: 1\nseeds: [0]\ndata: {digits: {make: {}}}\nvariants: {baseline: {}}\n"
    )
    (folder / "runs").mkdir()
    (folder / "runs" / "last.safetensors").write_bytes(b"weights")
    pages.take_in(folder)
    kept = {str(path.relative_to(pages.KEPT)) for path in pages.KEPT.rglob("*") if path.is_file()}
    assert kept == {"small/study.yaml", "small/results/digits/baseline/seed0.json"}
    assert "| digits | baseline | 0 | training: error: NaN |" in pages.table("small", "runs")
    assert "No run of `studies/none.yaml`" in pages.table("none", "verdicts")
    with pytest.raises(SystemExit, match="has no table 'verdict'"):
        pages.table("small", "verdict")
    pages.kept_study.cache_clear()
    pages.kept_report.cache_clear()


def test_gpu_hours_by_hand(pages: ModuleType) -> None:
    # 10^12 multiply-adds, twice, times three, a thousand images, twice, at 10^12 operations a second: 12,000 s.
    assert pages.gpu_hours(gflops=1000, images=1000, epochs=2, tflops=1) == pytest.approx(12000 / 3600)
