"""How many files of the package a training image and a key of the settings pass; see CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from paqdetr.config import load_config

pytestmark = pytest.mark.integration

# Kernels, and what is behind the door of those of attention, are left out: a library's inside.
KERNELS = {
    f"ops/{name}.py"
    for name in ("choice", "registered", "cpu", "compiled", "numba_kernels", "simd", "threads", "depthwise")
}


def test_an_image_from_the_disk_to_the_loss(
    script: Callable[[str], ModuleType], tiny_digits: Path, tiny_settings: dict[str, Any]
) -> None:
    config = load_config("paq_dino_nano", {**tiny_settings, "workers": 0})
    files = script("tools/trace_files.py").disk_to_loss(config, tiny_digits)
    assert {"data/loader.py", "images.py", "models/detector.py", "paq/assignment.py", "losses/criterion.py"} <= set(
        files
    )
    assert len(set(files) - KERNELS) <= 26, files


def test_a_key_from_the_command_line_to_its_module(script: Callable[[str], ModuleType]) -> None:
    files = script("tools/trace_files.py").key_to_module("model.num_patterns", "8", "paq/patterns.py")
    assert files[-1] == "paq/patterns.py" and "config/model.py" in files
    assert len(files) <= 7, files
