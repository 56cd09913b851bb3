"""The figures in the README are those of the files in docs/results."""

from __future__ import annotations

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
