"""The figures in the README are those of the files in docs/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def collector(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tools/collect_results.py")


def test_readme_table_is_read_from_the_kept_files(collector: ModuleType) -> None:
    table = collector.table()
    assert table.count("\n") >= 2, "no result is kept"
    assert table in (REPO / "README.md").read_text(encoding="utf-8")


def test_what_the_models_command_shows_is_read_from_the_kept_files(collector: ModuleType) -> None:
    text = (REPO / "src" / "paqdetr" / "configs" / "measured.yaml").read_text(encoding="utf-8")
    assert text == collector.measured()
    assert "paq_dino_nano" in text


def test_every_result_says_how_it_was_made() -> None:
    folders = [path.parent for path in (REPO / "docs" / "results").glob("*/test.json")]
    assert folders
    for folder in folders:
        commands = (folder / "commands.txt").read_text(encoding="utf-8")
        assert "paqdetr train" in commands or "make quickstart" in commands, folder
        assert (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file(), folder


def test_other_numbers_of_queries_are_read_from_the_kept_file(script: Callable[[str], ModuleType]) -> None:
    report = json.loads((REPO / "docs" / "results" / "query_count.json").read_text("utf-8"))
    table = script("benchmarks/query_count.py").markdown(report)
    assert {model["name"] for model in report["models"]} == {"paq_dino_nano", "dino_nano"}
    assert table.count("**") == 2 * len(report["models"]), "the number each was trained with is in bold"
    assert f"<!-- query_count -->\n{table}\n<!--" in (REPO / "docs" / "convert.md").read_text("utf-8")
