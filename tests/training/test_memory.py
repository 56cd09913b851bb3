"""Running out of memory ends with what was asked for and what to do, wherever it happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from paqdetr.cli import run
from paqdetr.runs import Run
from paqdetr.training import step

pytestmark = pytest.mark.integration


def test_a_training_that_runs_out_says_what_helps_and_goes_on(
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_pictures: None,
) -> None:
    real, calls = step.TrainingStep.__call__, []

    def limited(self: step.TrainingStep, *args: Any, **kwargs: Any) -> step.Step:
        calls.append(1)
        if len(calls) == 2:
            torch.empty(10**15)
        return real(self, *args, **kwargs)

    settings = {**tiny_settings, "epochs": 1, "save_every_steps": 1}
    command = ["train", "dino_nano", "--data", str(tiny_digits), "--output", str(tmp_path / "run")]
    command += ["--device", "cpu", *(f"{key}={value}" for key, value in settings.items())]
    with monkeypatch.context() as patch:
        patch.setattr(step.TrainingStep, "__call__", limited)
        assert run(command) == 2  # no defect, but what a user can mend
    told = capsys.readouterr().err
    assert "error: the machine has no memory left" in told and "--auto-batch" in told
    assert run([*command, "--resume"]) == 0
    assert [row["step"] for row in Run(tmp_path / "run").records("start")] == [0, 1]


def test_a_command_that_trains_nothing_says_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_run: Run
) -> None:
    from paqdetr import models

    monkeypatch.setattr(models, "load", lambda *args, **kwargs: torch.empty(10**15))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert run(["predict", str(tiny_run.output), str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "help: take smaller images or batches, or a smaller model" in capsys.readouterr().err
