"""docs/settings.md is what the settings themselves say, and names every one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from paqdetr.config import known_keys

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    file = REPO / "benchmarks" / "settings_page.py"
    if not file.is_file():
        pytest.skip("needs a checkout: benchmarks/ is not in the archive")
    spec = importlib.util.spec_from_file_location("settings_page", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_in_step(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    assert maker.write(page) == page, "run python benchmarks/settings_page.py"


def test_page_names_every_setting(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    missing = [key for key in known_keys() if f"| `{key}` |" not in page]
    assert not missing


def test_a_table_says_type_range_default_and_meaning(maker: ModuleType) -> None:
    rows = maker.table("augment").splitlines()
    assert "| `augment.flip` | float, >= 0, <= 1 | `0.5` |  | probability of a horizontal flip |" in rows
    model = maker.table("model")
    assert "| `model.frozen_stride` | int, >= 0 | `4` | `8` |" in model
    assert "| `model.bias_std` | float or null, >= 0 | `2` |" in model
    with pytest.raises(SystemExit, match="no section 'engine'"):
        maker.table("engine")
    with pytest.raises(SystemExit, match="settings training"):
        maker.write("# a page without tables")
