from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from paqdetr.cli import run
from paqdetr.config import Config, load_config
from paqdetr.data.dataset import open_split
from paqdetr.engine.memory import available_memory, largest_batch, search_largest, step_memory, worst_batch
from paqdetr.engine.plan import Overfit, overfit_one_batch, plan_training
from paqdetr.engine.processes import Processes
from paqdetr.engine.setup import with_classes
from paqdetr.errors import ConfigError
from paqdetr.models.zoo import build_model

MEMORY = "paqdetr.engine.memory.available_memory"


@pytest.fixture
def config(tiny_digits: Path, tiny_settings: dict[str, Any]) -> Config:
    settings = {**tiny_settings, "workers": 0, "batch_size": 2, "epochs": 3}
    return with_classes(load_config("paq_dino_nano", settings), open_split(tiny_digits, "train"))


def test_a_plan_adds_up(config: Config, tiny_digits: Path) -> None:
    train_split, val_split = (open_split(tiny_digits, name) for name in ("train", "val"))
    settings = config.model_copy(update={"eval_every": 2, "accumulate": 2, "lr_rule": "linear"})
    plan = plan_training(settings, train_split, val_split, device="cpu", steps=3)
    assert (plan.images, plan.batches, plan.step_images) == (8, 4, 4)
    assert (plan.epoch_steps, plan.total_steps, plan.measured_steps) == (2, 6, 3)
    assert plan.lr == pytest.approx(config.lr * 4 / 16)
    assert plan.step_seconds > 0 and plan.evaluation_seconds >= 0
    assert plan.epoch_seconds == pytest.approx(2 * plan.step_seconds, abs=0.06)
    # epochs 2 and 3 are evaluated
    expected = 6 * plan.step_seconds + 2 * plan.evaluation_seconds
    assert plan.total_seconds == pytest.approx(expected, abs=0.2)
    parts = [plan.memory[name] for name in ("weights", "gradients", "optimizer", "activations")]
    assert plan.memory["total"] == pytest.approx(sum(parts), abs=0.003) and plan.fits
    model = build_model(config)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < plan.trainable < plan.parameters  # the stem of the backbone is frozen
    json.dumps(plan.to_json(), allow_nan=False)


def test_memory_grows_with_images_and_their_size(config: Config, tiny_digits: Path) -> None:
    split = open_split(tiny_digits, "train")
    small = step_memory(config, split)
    large = step_memory(config.model_copy(update={"image_size": 192}), split)
    assert small.weights == large.weights and small.optimizer == 2 * small.gradients
    assert 2 < large.image / small.image < 6  # four times the pixels; queries stay as they are
    assert small.total(4) - small.total(3) == pytest.approx(small.total(2) - small.total(1), abs=2)
    assert step_memory(config, split, processes=2).gradients == 2 * small.gradients


def test_the_worst_batch(config: Config, tiny_digits: Path) -> None:
    split = open_split(tiny_digits, "train")
    preprocessing = build_model(config).preprocessing
    batch = worst_batch(config, split, preprocessing, 3)
    assert batch.images.shape == (3, 3, 96, 96)
    most = max(len(split.labels(index)) for index in range(len(split)))
    assert [len(target) for target in batch.targets] == [most] * 3
    assert max(int(target.labels.max()) for target in batch.targets) < len(split.classes)


@pytest.mark.parametrize(
    ("limit", "largest"), [(100, 0), (100, 1), (100, 7), (100, 64), (100, 100), (5, 999), (1, 1)]
)
def test_the_search_for_the_largest_batch(limit: int, largest: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= largest

    assert search_largest(fits, limit) == min(largest, limit)
    assert len(tried) == len(set(tried)) <= 2 * math.log2(limit + 1) + 2 and max(tried) <= limit


def test_the_largest_batch_is_what_memory_allows(
    config: Config, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_split(tiny_digits, "train")
    memory = step_memory(config, split)
    for size in (1, 3):
        room = int((memory.total(size) + memory.total(size + 1)) / 2 / 0.8)
        monkeypatch.setattr(MEMORY, lambda device, room=room: room)
        assert largest_batch(config, split, Processes()) == size
    monkeypatch.setattr(MEMORY, lambda device: 2**50)
    assert largest_batch(config, split, Processes()) == 8  # no more than there are images
    monkeypatch.setattr(MEMORY, lambda device: 1000)
    with pytest.raises(ConfigError, match="not even one image fits"):
        largest_batch(config, split, Processes())


def test_memory_of_this_machine() -> None:
    import psutil
    import torch

    assert 0 < available_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_one_batch_is_overfitted(config: Config, tiny_digits: Path) -> None:
    """A few steps lower the loss; learning by heart is for the slow test."""
    split = open_split(tiny_digits, "train")
    tried = overfit_one_batch(config, split, steps=12, device="cpu")
    assert tried.images == 2 and tried.boxes == len(split.labels(0)) + len(split.labels(1))
    assert len(tried.losses) == 12 and tried.losses[-1] < tried.losses[0]
    assert 0 <= tried.found <= 1 and not tried.learnt and tried.to_json()["learnt"] is False
    assert Overfit(1, 10, [1.0], found=0.9, wrong=0).learnt


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart(tmp_path: Path) -> None:
    """About two minutes on two cores."""
    from paqdetr.data.digits import make_digits

    data = make_digits(tmp_path / "digits", size=160, train=4, val=1, test=1)
    split = open_split(data, "train")
    config = with_classes(
        load_config("paq_dino_nano", {"image_size": 160, "batch_size": 4, "workers": 0}), split
    )
    assert overfit_one_batch(config, split, steps=250, device="cpu").learnt


def test_the_command(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"{key}={value}" for key, value in {**tiny_settings, "workers": 0, "epochs": 3}.items()]
    arguments = ["plan", "paq_dino_nano", *settings, "--data", str(tiny_digits), "--device", "cpu"]
    before = sorted(tmp_path.rglob("*"))
    assert run([*arguments, "--steps", "1", "--json", str(tmp_path / "plan.json"), "--auto-batch"]) == 0
    said = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["batch_size"] == 8 and "(batch_size 8, accumulate 1)" in said
    assert "1 an epoch, 3 in all" in said and "GiB of" in said
    assert run([*arguments, "--overfit", "2"]) == 2
    said = capsys.readouterr()
    assert "2 steps: loss" in said.out and "not learnt" in said.err.splitlines()[-2]
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "plan.json"]


def test_a_training_with_the_largest_batch(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = [f"{key}={value}" for key, value in {**tiny_settings, "workers": 0, "max_steps": 1}.items()]
    arguments = [
        "train",
        "paq_dino_nano",
        *settings,
        "--data",
        str(tiny_digits),
        "--device",
        "cpu",
        "--auto-batch",
    ]
    assert run([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").batch_size == 8
    # What memory is free later does not matter.
    monkeypatch.setattr(MEMORY, lambda device: 1000)
    capsys.readouterr()
    assert run([*arguments, "--output", str(tmp_path / "run"), "--resume"]) == 0
