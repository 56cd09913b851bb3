"""The figures in the README are those of the files in docs/results."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def test_every_result_says_how_it_was_made() -> None:
    folders = [path.parent for path in (REPO / "docs" / "results").glob("*/test.json")]
    assert folders
    for folder in folders:
        commands = (folder / "commands.txt").read_text(encoding="utf-8")
        assert any(verb in commands for verb in ("paqdetr train", "paqdetr study", "make quickstart")), folder
        assert (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file(), folder
