from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paqdetr.config import load_config
from paqdetr.errors import ConfigError
from paqdetr.runs import Run
from paqdetr.training import Callback, train
from paqdetr.training.callbacks import finish_trackers, require_trackers, start_trackers, track

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


class Tracker:
    """In place of one of accelerate's."""

    name = "mlflow"

    def __init__(self, *, fails: bool) -> None:
        self.fails, self.got = fails, []

    def log(self, values: dict[str, float], step: int) -> None:
        self.got.append((step, values))
        if self.fails:
            raise OSError("connection refused")

    def finish(self) -> None:
        self.log({}, 0)


def test_a_tracker_that_fails_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Tracker(fails=True), Tracker(fails=False)
    accelerator: Any = SimpleNamespace(trackers=[bad, good])
    for step in (1, 2):
        track(accelerator, {"kind": "eval", "step": step, "per_class": {"traffic light (red), x+y": 0.5}})
    assert [step for step, _ in good.got] == [1, 2] and [step for step, _ in bad.got] == [1, 0]  # and its end
    assert good.got[0][1] == {"eval/per_class/traffic light _red__ x_y": 0.5}
    assert caplog.text.count("tracker mlflow: OSError: connection refused") == 2
    good.fails = True
    finish_trackers(accelerator)
    assert caplog.text.count("connection refused") == 3


def test_trackers_know_a_run_by_its_id(tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []
    accelerator: Any = SimpleNamespace(init_trackers=lambda *_, init_kwargs, **__: started.append(init_kwargs))
    config = load_config("dino_nano", {"trackers": ("tensorboard", "wandb", "trackio")})
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        Run(tmp_path / folder).add_environment({"id": folder[0] * 32})
        start_trackers(accelerator, Run(tmp_path / folder), config, step=0)
    assert [options["wandb"]["id"] for options in started] == ["a" * 32, "b" * 32]
    assert [options["trackio"]["name"] for options in started] == ["run-aaaaaaaa", "run-bbbbbbbb"]
    assert started[0]["tensorboard"] == {"purge_step": 1}  # of a start that saved nothing, too


def test_a_tracker_that_cannot_start(tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("connection refused")

    accelerator: Any = SimpleNamespace(init_trackers=refuse)
    config = load_config("dino_nano", {"trackers": ("mlflow",)})
    with pytest.raises(ConfigError, match=r"trackers=\['mlflow'\]: they cannot start \(OSError: connection refused\)"):
        start_trackers(accelerator, Run(tmp_path), config, step=0)
