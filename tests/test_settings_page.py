"""docs/settings.md names every setting, with what the setting itself says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from paqdetr.config import known_keys

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tools/settings_tables.py")


def test_page_names_every_setting() -> None:
    page = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    missing = [key for key in known_keys() if f"| `{key}` |" not in page]
    assert not missing


def test_a_table_says_type_range_default_and_meaning(maker: ModuleType) -> None:
    rows = maker.table("augment").splitlines()
    assert "| `augment.flip` | probability of a horizontal flip | float, >= 0, <= 1 | `0.5` |  |" in rows
    model = {row.split("`")[1]: row for row in maker.table("model").splitlines()[2:]}
    assert model["model.frozen_stride"].endswith("| int, >= 0, <= 1024 | `4` | `8` |")
    assert "| float or null, >= 0 | `2` |" in model["model.bias_std"]
