"""docs/settings.md is what the settings themselves say, and names every one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from paqdetr.config import known_keys

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tools/settings_page.py")


def test_page_is_in_step(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    assert maker.write(page) == page, "run python tools/settings_page.py"


def test_page_names_every_setting(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    missing = [key for key in known_keys() if f"| `{key}` |" not in page]
    assert not missing


def test_a_table_says_type_range_default_and_meaning(maker: ModuleType) -> None:
    rows = maker.table("augment").splitlines()
    assert "| `augment.flip` | float, >= 0, <= 1 | `0.5` |  | probability of a horizontal flip |" in rows
    model = maker.table("model")
    assert "| `model.frozen_stride` | int, >= 0, <= 1024 | `4` | `8` |" in model
    assert "| `model.bias_std` | float or null, >= 0 | `2` |" in model
    with pytest.raises(SystemExit, match="no section 'engine'"):
        maker.table("engine")
    with pytest.raises(SystemExit, match="settings training"):
        maker.write("# a page without tables")
