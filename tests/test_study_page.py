"""docs/study.md says what the kept results say."""

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
    return script("tools/study_page.py")


def test_the_page_is_in_step_with_the_kept_results(pages: ModuleType) -> None:
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.write(page) == page


def test_what_is_kept_is_small_and_whole(pages: ModuleType) -> None:
    files = [file for file in pages.KEPT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < pages.MOST_BYTES
    assert {file.suffix for file in files} <= {".json", ".yaml"}, "weights are not kept"
    for study in pages.KEPT.glob("*/study.yaml"):
        assert read_results(study.parent / "results"), study


def test_a_table_that_there_is_not_is_said(pages: ModuleType) -> None:
    with pytest.raises(SystemExit, match="has no <!-- end of"):
        pages.write("<!-- study pilot verdicts -->")


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
    written = pages.write("<!-- study small runs -->\nold\n<!-- end of study small runs -->")
    assert "| digits | baseline | 0 | training: error: NaN |" in written and "old" not in written
    assert "No run of `studies/none.yaml`" in pages.table("none", "verdicts")
    with pytest.raises(SystemExit, match="has no table 'verdict'"):
        pages.table("small", "verdict")
    pages.kept_study.cache_clear()
    pages.kept_report.cache_clear()
