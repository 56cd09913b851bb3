"""Running out of memory ends with what was asked for and what to do, wherever it happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paqdetr.cli import run
from paqdetr.engine import Run, step
from paqdetr.engine.memory import memory_error


def test_a_gpus_complaint_is_told_in_short() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.19 GiB is free. "
        "Including non-PyTorch memory, this process has 14.57 GiB memory in use."
    )
    found = memory_error(error, "take less")
    assert found is not None
    assert str(found) == "the GPU has no memory left: it was asked for 2.50 GiB more (take less)"


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory\nCompile with ...", "MPS backend out of memory (MPS ...)"]
)
def test_other_complaints_of_gpus_name_no_amount(text: str) -> None:
    found = memory_error(RuntimeError(text))
    assert found is not None and found.message == "the GPU has no memory left"


@pytest.mark.parametrize(("allocate", "amount"), [(torch.empty, "3725290.30 GiB"), (np.empty, "7.11 PiB")])
def test_torch_and_numpy_really_run_out(allocate: Callable[[int], object], amount: str) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate(10**15)  # numbers of 4 bytes, and of 8
    found = memory_error(caught.value)
    assert found is not None
    assert found.message == f"the machine has no memory left: it was asked for {amount} more"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError(1)])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert memory_error(error) is None


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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from paqdetr import models

    monkeypatch.setattr(models, "load", lambda *args, **kwargs: torch.empty(10**15))
    assert run(["predict", "run", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "help: take smaller images or batches, or a smaller model" in capsys.readouterr().err
