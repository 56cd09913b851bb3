"""Every verb on data that have a split to train on alone: each says so, and names only files that exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import paqdetr
from paqdetr.cli import run
from paqdetr.runs import Run

pytestmark = pytest.mark.integration


@pytest.fixture
def data(tiny_digits: Path, tmp_path: Path) -> Path:
    """Without val; test is left, which nobody validates on."""
    root = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    (root / "val.json").unlink()
    return root


@pytest.fixture
def overrides(tiny_settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in {**tiny_settings, "epochs": 1, "max_steps": 2, "workers": 0}.items()]


def test_check(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(data)]) == 0
    assert "warning: no val split: training prints no AP" in capsys.readouterr().out


def test_plan(data: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "paq_dino_nano", *overrides, "--data", str(data), "--device", "cpu", "--steps", "1"]
    assert run(command) == 0
    said = capsys.readouterr()
    assert "has no val split: no AP is computed" in said.err and "without evaluation" in said.out


def test_train_eval_and_analyze(
    data: Path,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ["train", "paq_dino_nano", *overrides, "--data", str(data), "--device", "cpu"]
    assert run([*command, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "has no val split: no AP is computed" in caplog.text and "none: no val split" in said.out
    named = re.findall(r"\S+\.(?:png|safetensors)", said.out + said.err.partition("pictures:")[2])
    assert len(named) == 2 and all(Path(name).is_file() for name in named)
    assert not (tmp_path / "run" / "predictions.png").exists()

    assert run(["eval", str(tmp_path / "run"), "--data", str(data), "--json", str(tmp_path / "e.json")]) == 0
    said = capsys.readouterr()
    assert f"{data} has no split 'val': 'test' is used" in caplog.text and "digits test" in " ".join(said.out.split())
    expected = paqdetr.evaluate(tmp_path / "run", data=data, split="test").figures
    assert json.loads((tmp_path / "e.json").read_text())["AP50"] == pytest.approx(expected.AP50, abs=1e-6)

    report = ["analyze", str(tmp_path / "run"), "--data", str(data), "--output", str(tmp_path / "report")]
    assert run([*report, "--images", "1", "--resamples", "10", "--device", "cpu"]) == 0
    assert caplog.text.count("has no split 'val': 'test' is used") == 2


def test_a_training_that_holds_out_images(
    data: Path,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ["train", "paq_dino_nano", *overrides, "val_fraction=0.25", "--data", str(data), "--device", "cpu"]
    assert run([*command, "--output", str(tmp_path / "run")]) == 0
    assert "val_fraction=0.25: 2 of 8 images validate" in caplog.text
    trained = Run(tmp_path / "run")
    (record,) = trained.records("eval")
    assert record["split"] == "val" and record["AP"] == trained.metrics["AP"]
    assert (tmp_path / "run" / "predictions.png").is_file()
