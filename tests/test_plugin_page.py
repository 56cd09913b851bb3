"""docs/plugin.md runs as it stands: every Python block, in order, as one program."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


def test_costs_are_those_of_the_kept_files(script: Callable[[str], ModuleType]) -> None:
    module = script("benchmarks/paq_cost.py")
    files = sorted((PAGE.parent / "results" / "paq_cost").glob("*.json"))
    assert len(files) == 2
    for file in files:
        assert module.markdown(json.loads(file.read_text("utf-8"))) in PAGE.read_text("utf-8"), file.name


def test_the_short_training_is_that_of_the_kept_file(
    monkeypatch: pytest.MonkeyPatch, script: Callable[[str], ModuleType]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # the script sets it where it is missing
    module = script("benchmarks/plugin_digits.py")
    report = json.loads((PAGE.parent / "results" / "plugin_digits.json").read_text("utf-8"))
    table = module.markdown(report)
    assert {"host", "residual"} <= set(report["variants"])
    assert table in PAGE.read_text("utf-8")


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text("utf-8")) if "://" not in target]
    assert all((PAGE.parent / target).exists() for target in targets)
