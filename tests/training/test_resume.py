"""An interrupted training, taken up again, ends as if it had never stopped."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from same_end import require_same_end

from paqdetr.checkpoint import read_checkpoint, write_checkpoint
from paqdetr.config import load_config
from paqdetr.errors import CheckpointError, ConfigError, OutOfMemoryError
from paqdetr.models.zoo import build_model
from paqdetr.runs import Run
from paqdetr.training import Callback, train

MODULE = importlib.import_module("paqdetr.training.trainer")


class Stop(Exception):
    """Pulls the plug."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, loss: float) -> None:
        if step == self.step:
            raise Stop


class Told(Callback):
    def __init__(self) -> None:
        self.first = -1
        self.steps: list[int] = []

    def on_start(self, plan: Any) -> None:
        self.first = plan.first_step

    def on_step(self, step: int, loss: float) -> None:
        self.steps.append(step)


Go = Callable[..., Run]


@pytest.fixture(scope="module")
def go(tiny_digits: Path, tiny_settings: dict[str, Any]) -> Iterator[Go]:
    """`go(output, **settings)` trains four epochs of two steps, in one thread, and draws no pictures."""

    def train_four(output: Path, **arguments: Any) -> Run:
        fixed = {"data": tiny_digits, "device": "cpu", "epochs": 4, "settings": tiny_settings}
        return train("paq_dino_nano", output=output, **fixed | arguments)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("training_curves", "draw_predictions"):
            patch.setattr(MODULE, name, lambda *args, **kwargs: None)
        yield train_four
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The training that is never interrupted."""
    return go(tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize(
    ("stop", "workers", "first"),
    [
        pytest.param(5, 0, 4, id="in the third epoch"),
        pytest.param(1, 0, 0, id="in the first epoch"),
        pytest.param(7, 2, 6, id="then with worker processes"),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(
    tmp_path: Path, go: Go, straight: Run, stop: int, workers: int, first: int
) -> None:
    with pytest.raises(Stop):
        go(tmp_path / "halves", callbacks=[StopAt(stop)])
    halves = Run(tmp_path / "halves")
    assert not halves.finished
    torch.manual_seed(12345)  # what happens in between does not matter
    told = Told()
    if workers:
        assert go(halves.output, resume=True, callbacks=[told], workers=workers) == halves
    else:  # its folder says everything
        assert train(halves.output, resume=True, device="cpu", callbacks=[told]) == halves
    assert halves.finished and told.first == first and told.steps == list(range(first + 1, 9))
    assert [record["step"] for record in halves.records("train")] == list(range(1, 9))
    assert [record["step"] for record in halves.records("start")] == ([0, first] if first else [0])
    require_same_end(straight, halves)


@pytest.mark.integration
def test_one_to_many_schedule_resumes(tmp_path: Path, go: Go, tiny_settings: dict[str, Any]) -> None:
    """One-to-many assignment ends in the second part of the training."""
    settings = tiny_settings | {
        "model.distinct_proposals": 0.8,
        "model.mixture": "residual",
        "loss.one_to_many_until": 0.8,
        "loss.min_positives": 2,
    }
    straight = go(tmp_path / "straight", settings=settings)
    with pytest.raises(Stop):
        go(tmp_path / "halves", settings=settings, callbacks=[StopAt(5)])
    halves = go(tmp_path / "halves", settings=settings, resume=True)
    require_same_end(straight, halves)
    positives = [record["positives_per_box"][0] for record in halves.records("train")]
    assert [count >= 2 for count in positives] == [True] * 7 + [False]  # 7 of 8 steps begin before 0.8


@pytest.mark.integration
def test_a_record_after_a_resumption_covers_fewer_steps(
    tmp_path: Path, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    drawn: list[str] = []

    class Losses(Callback):
        def on_step(self, step: int, loss: float) -> None:
            losses.append(loss)

    settings = {"log_every": 4, "save_every_steps": 1, "batch_size": 1, "epochs": 1}
    with pytest.raises(Stop):
        go(tmp_path / "one", callbacks=[StopAt(3)], **settings)
    for name in ("training_curves", "draw_predictions"):
        monkeypatch.setattr(MODULE, name, lambda *_, name=name, **__: drawn.append(name))
    run = go(tmp_path / "one", resume=True, callbacks=[Losses()], **settings)
    first, second = run.records("train")
    assert (first["step"], second["step"]) == (4, 8)
    assert first["loss"] == pytest.approx(sum(losses[:2]) / 2, abs=1e-5)  # of steps 3 and 4
    assert second["loss"] == pytest.approx(sum(losses[2:]) / 4, abs=1e-5)
    assert sorted(drawn) == ["draw_predictions", "training_curves"]  # of a resumed run, too


def without_boxes(data: Path) -> None:
    content = json.loads((data / "train.json").read_text())
    content["annotations"].pop()
    (data / "train.json").write_text(json.dumps(content))


def with_half_of_the_images(data: Path) -> None:
    content = json.loads((data / "train.json").read_text())
    kept = {image["id"] for image in content["images"][:4]}
    content["images"] = content["images"][:4]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    (data / "train.json").write_text(json.dumps(content))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "message", "steps"),
    [
        (without_boxes, r"train: 1 image with other boxes \(00000", [5, 6, 7, 8]),
        (with_half_of_the_images, "train: 4 images removed", [3, 4]),  # epochs are half as long now
    ],
)
def test_other_data_are_refused_unless_accepted(
    tmp_path: Path,
    go: Go,
    tiny_digits: Path,
    change: Callable[[Path], None],
    message: str,
    steps: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    with pytest.raises(Stop):
        go(tmp_path / "run", data=data, callbacks=[StopAt(5)])
    run = Run(tmp_path / "run")
    change(data)
    before = snapshot(run.output)
    with pytest.raises(ConfigError, match=message) as caught:
        go(run.output, data=data, resume=True)
    assert "--accept-new-data" in caught.value.remedy and snapshot(run.output) == before
    told = Told()
    go(run.output, data=data, resume=True, accept_new_data=True, callbacks=[told])
    assert told.steps == steps and run.finished
    assert "going on with other data: train: " in caplog.text
    assert go(run.output, data=data, resume=True) == run  # of the new data now


@pytest.mark.integration
def test_what_was_learnt_of_a_class_is_called_nothing_else(tmp_path: Path, go: Go, tiny_digits: Path) -> None:
    data = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    with pytest.raises(Stop):
        go(tmp_path / "run", data=data, callbacks=[StopAt(5)])
    for split in ("train", "val"):
        content = json.loads((data / f"{split}.json").read_text())
        one, other = content["categories"][2:4]
        one["name"], other["name"] = other["name"], one["name"]
        (data / f"{split}.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match="the classes are in another order: '3' was number 4 and is number 3"
    ) as caught:
        go(tmp_path / "run", data=data, resume=True, accept_new_data=True)
    assert "init=" in caught.value.remedy


@pytest.mark.integration
def test_a_limit_of_steps_is_of_epochs_of_one_length(tmp_path: Path, go: Go, tiny_digits: Path) -> None:
    data = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    with pytest.raises(Stop):
        go(tmp_path / "run", data=data, max_steps=7, callbacks=[StopAt(5)])
    with_half_of_the_images(data)
    with pytest.raises(ConfigError, match="an epoch had 2 batches, now it has 1, and max_steps=7 counts steps"):
        go(tmp_path / "run", data=data, max_steps=7, resume=True, accept_new_data=True)


@pytest.mark.integration
def test_new_data_are_for_a_resumption(tmp_path: Path, go: Go) -> None:
    with pytest.raises(ConfigError, match="is for a resumption"):
        go(tmp_path / "run", accept_new_data=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_a_run_of_a_version_that_did_not_note_its_data(
    tmp_path: Path, go: Go, straight: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Stop):
        go(tmp_path / "run", callbacks=[StopAt(5)])
    run = Run(tmp_path / "run")
    tensors, header = read_checkpoint(run.state_file)
    del header["data"]
    header["intervals"] = [{"steps": 0, "images": 0, "sums": {}, "positives": [], "batches_with_boxes": 0}]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("data.")}
    write_checkpoint(run.state_file, tensors, header)
    go(run.output, resume=True)
    assert caplog.text.count("whether they are the same is not checked") == 1
    require_same_end(straight, run)


class OutOfMemory(Callback):
    def on_step(self, step: int, loss: float) -> None:
        raise MemoryError

    def on_end(self) -> None:
        raise ValueError("a callback's last word")


@pytest.mark.integration
def test_a_failing_first_step_leaves_nothing_in_the_way(
    tmp_path: Path, go: Go, caplog: pytest.LogCaptureFixture
) -> None:
    for resume in (False, True):
        with pytest.raises(OutOfMemoryError):
            go(tmp_path / "run", callbacks=[OutOfMemory(), OutOfMemory()], max_steps=1)
        assert caplog.text.count("on_end of OutOfMemory: ValueError: a callback's last word") == 2
        caplog.clear()
        run = go(tmp_path / "run", max_steps=1, batch_size=2, resume=resume)
        assert run.finished and load_config(run.config_file).batch_size == 2
        assert [row["kind"] for row in run.records()] == ["start", "train", "eval", "finished"]
        shutil.rmtree(run.output)


@pytest.mark.integration
def test_pictures_that_cannot_be_drawn_do_not_cost_the_training(
    tmp_path: Path, go: Go, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("ParseException: Expected end of text, found '$'")

    monkeypatch.setattr(MODULE, "training_curves", fail)
    assert go(tmp_path / "run", max_steps=1).finished
    assert "pictures of the run could be drawn: ParseException" in caplog.text


@pytest.mark.integration
def test_stopped_between_evaluation_and_state(
    tmp_path: Path, go: Go, straight: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the second epoch is there, its state is not: the evaluation is done again."""
    save_state, calls = MODULE.save_state, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Stop
        save_state(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(MODULE, "save_state", interrupted)
        go(tmp_path / "halves")
    halves = go(tmp_path / "halves", resume=True)
    assert [record["epoch"] for record in halves.records("eval")] == [1, 2, 3, 4]
    require_same_end(straight, halves)


@pytest.mark.integration
def test_resume_starts_what_is_not_there(tmp_path: Path, go: Go) -> None:
    run = go(tmp_path / "run", resume=True, max_steps=1)
    assert run.finished and [record["step"] for record in run.records("train")] == [1]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.integration
def test_a_finished_run_is_left_alone(tmp_path: Path, go: Go) -> None:
    run = go(tmp_path / "run", max_steps=1)
    before = snapshot(run.output)
    told = Told()
    assert go(run.output, resume=True, max_steps=1, callbacks=[told]).finished
    assert snapshot(run.output) == before and told.first == -1 and told.steps == []
    with pytest.raises(ConfigError, match="there is a run already, and nothing is overwritten"):
        go(run.output, max_steps=1)
    with pytest.raises(ConfigError, match=r"was started with lr=\S+, now it is 0\.123"):
        go(run.output, resume=True, max_steps=1, lr=0.123)
    with pytest.raises(ConfigError, match=r"model\.num_patterns=64, now it is 8"):
        go(run.output, resume=True, max_steps=1, **{"model.num_patterns": 8})
    assert snapshot(run.output) == before


@pytest.mark.integration
def test_a_damaged_state_is_named_and_kept(tmp_path: Path, go: Go) -> None:
    with pytest.raises(Stop):
        go(tmp_path / "run", callbacks=[StopAt(3)])
    run = Run(tmp_path / "run")
    run.state_file.write_bytes(run.state_file.read_bytes()[:5000])
    before = snapshot(run.output)
    with pytest.raises(CheckpointError, match=r"training_state\.safetensors: not a readable safetensors file"):
        go(run.output, resume=True)
    assert snapshot(run.output) == before


@pytest.mark.integration
@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
def test_a_damaged_checkpoint_is_named_at_once(tmp_path: Path, go: Go, name: str) -> None:
    """And removed, it costs what it was, not the training."""
    with pytest.raises(Stop):
        go(tmp_path / "run", callbacks=[StopAt(3)])
    run = Run(tmp_path / "run")
    content = bytearray((run.output / name).read_bytes())
    content[-1] ^= 1
    (run.output / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: damaged") as caught:
        go(run.output, resume=True)
    assert "remove it" in caught.value.remedy
    (run.output / name).unlink()
    assert go(run.output, resume=True).finished
    read_checkpoint(run.output / name)


class StopEvaluation(Callback):
    def on_evaluation_progress(self, done: int, total: int) -> None:
        raise Stop


@pytest.mark.integration
def test_what_ends_an_evaluation_costs_no_step(tmp_path: Path, go: Go, straight: Run) -> None:
    with pytest.raises(Stop):
        go(tmp_path / "run", callbacks=[StopEvaluation()])
    told = Told()
    run = go(tmp_path / "run", resume=True, callbacks=[told])
    assert told.first == 2 and told.steps == list(range(3, 9))
    require_same_end(straight, run)


@pytest.mark.integration
def test_a_resumption_needs_no_imagenet_weights(
    tmp_path: Path, go: Go, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And before the first evaluation, it misses no best checkpoint."""
    built: list[bool] = []

    def build(config: Any, *, classes: Any, pretrained_backbone: bool) -> Any:
        built.append(pretrained_backbone)
        return build_model(config, classes=classes)

    monkeypatch.setattr("paqdetr.models.files.build_model", build)
    settings = {"pretrained_backbone": True, "epochs": 2, "eval_every": 2}
    with pytest.raises(Stop):
        go(tmp_path / "run", callbacks=[StopAt(3)], **settings)
    assert go(tmp_path / "run", resume=True, **settings).finished
    assert built == [True, False] and "is gone" not in caplog.text
