from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from paqdetr.errors import ConfigError
from paqdetr.runs import Run
from paqdetr.training import Callback, train
from paqdetr.training.callbacks import require_trackers

pytestmark = pytest.mark.integration


class Stop(Exception):
    """Pulls the plug."""


class StopAt(Callback):
    def on_step(self, step: int, loss: float) -> None:
        if step == 4:
            raise Stop


def logged(run: Run) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, from TensorBoard's own files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.output / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_shows_each_record_once(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    """Also where a stopped training does steps again that it had logged."""

    def go(**more: Any) -> Run:
        settings = {**tiny_settings, "trackers": ("tensorboard",), "workers": 0}
        return train(
            "paq_dino_nano",
            data=tiny_digits,
            output=tmp_path / "run",
            device="cpu",
            epochs=3,
            settings=settings,
            **more,
        )

    with pytest.raises(Stop):
        go(callbacks=[StopAt()])
    run = go(resume=True)
    found = logged(run)
    rows = run.records("train")
    assert [step for step, _ in found["train/loss"]] == [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["train/loss"]] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert [step for step, _ in found["eval/AP"]] == [2, 4, 6]
    assert "eval/per_class/3" in found and "train/positives_per_box/1" in found
    assert "train/kind" not in found and "train/step" not in found


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paqdetr.training.callbacks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trackers: 'wandb' is not installed") as caught:
        require_trackers(("wandb",))
    assert "pip install wandb" in caught.value.remedy
    require_trackers(())
