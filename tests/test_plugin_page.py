"""docs/plugin.md runs as it stands: every Python block, in order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plugin.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run(blocks: list[str], names: dict[str, object]) -> None:
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)  # an assert of the page is one of this test


def test_a_detr_of_ones_own_and_those_of_transformers(one_thread: None) -> None:
    *own, transformers = BLOCKS
    names: dict[str, object] = {}
    run(own, names)
    pytest.importorskip("transformers")
    run([transformers], names)


def test_attaching_takes_20_lines() -> None:
    (block,) = [block for block in BLOCKS if "class PaqDETR" in block]
    lines = [line for line in block.splitlines() if line.strip()]
    assert lines[0].startswith("from paqdetr.paq import") and len(lines) <= 20


def test_the_minimal_detr_knows_nothing_of_paqdetr() -> None:
    assert "class TinyDETR" in BLOCKS[0] and "paqdetr" not in BLOCKS[0] + BLOCKS[1]
