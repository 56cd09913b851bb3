from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from paqdetr.cli import run
from paqdetr.config import Config, load_config
from paqdetr.data.dataset import open_split
from paqdetr.distributed import Processes
from paqdetr.environment import available_memory
from paqdetr.errors import ConfigError
from paqdetr.models.backbone import normalization_of
from paqdetr.models.zoo import build_model
from paqdetr.preprocessing import Preprocessing
from paqdetr.training.memory import largest_batch, peaks_of_steps, worst_batch
from paqdetr.training.plan import Overfit, overfit_one_batch, plan_training, with_totals
from paqdetr.training.setup import with_classes

pytestmark = pytest.mark.integration

MEMORY = "paqdetr.training.memory.available_memory"
PEAKS = "paqdetr.training.memory.peaks_of_steps"


@pytest.fixture
def config(tiny_digits: Path, tiny_settings: dict[str, Any]) -> Config:
    settings = {**tiny_settings, "workers": 0, "batch_size": 2, "epochs": 3}
    return with_classes(load_config("paq_dino_nano", settings), open_split(tiny_digits, "train"))


def test_a_plan_adds_up(config: Config, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(call: Any, *arguments: object, progress: Any) -> Any:
        return call(*arguments, progress)

    monkeypatch.setattr("paqdetr.training.plan.in_own_process", in_this_process)
    peaks = iter((0.5, 0.75, 2.0, 2.25))  # before, with the model, after the steps, after the evaluation
    monkeypatch.setattr("paqdetr.training.plan.peak_memory", lambda _: next(peaks))
    reports: list[tuple[int, int]] = []
    train_split, val_split = (open_split(tiny_digits, name) for name in ("train", "val"))
    settings = config.model_copy(update={"eval_every": 2, "accumulate": 2, "lr_rule": "linear"})
    plan = plan_training(
        settings, train_split, val_split, device="cpu", steps=3, progress=lambda *done: reports.append(done)
    )
    assert reports == [
        (n, 11) for n in range(1, 12)
    ]  # two steps warm up, three are timed, two are the largest; four images
    assert (plan.images, plan.batches, plan.step_images) == (8, 4, 4)
    assert (plan.epoch_steps, plan.total_steps, plan.measured_steps) == (2, 6, 3)
    assert plan.lr == pytest.approx(config.lr * 4 / 16)
    assert plan.step_seconds > 0 and plan.evaluation_seconds >= 0
    assert plan.epoch_seconds == pytest.approx(2 * plan.step_seconds, abs=0.06)
    # epochs 2 and 3 are evaluated
    expected = 6 * plan.step_seconds + 2 * plan.evaluation_seconds
    assert plan.total_seconds == pytest.approx(expected, abs=0.2)
    cached = 8 * 3 * 96 * 96 / 2**30  # of which the steps have decoded all
    parts = {
        "process": 0.5,
        "model": 0.25,
        "step": 1.25 - cached,
        "evaluation": 0.25,
        "cached images": cached,
        "workers": 0,
    }
    assert {name: plan.memory[name] for name in parts} == pytest.approx(parts, abs=0.001)
    assert plan.memory["peak"] == plan.memory["total"] == 2.25 and plan.fits
    model = build_model(config)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < plan.trainable < plan.parameters  # the stem of the backbone is frozen
    json.dumps(plan.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("device", "workers", "apart", "peak", "total"),
    [("cpu", 1.0, True, 2.0, 6.0), ("cpu", 0.0, False, 5.0, 5.0), ("cuda", 1.0, True, 2.0, 2.0)],
)
def test_memory_beside_the_training_process(
    device: str, workers: float, apart: bool, peak: float, total: float
) -> None:
    """Workers decode images into memory that they share, which is the host's; a GPU has what the training has on it."""
    memory = {"process": 0.5, "model": 0.25, "step": 1.0, "evaluation": 0.25, "cached images": 3.0, "workers": workers}
    found = with_totals(memory, torch.device(device), images_apart=apart)
    assert (found["peak"], found["total"]) == (peak, total)


@pytest.mark.integration
def test_peaks_are_those_of_a_process_that_trains(config: Config, tiny_digits: Path) -> None:
    split = open_split(tiny_digits, "train")
    one, eight = peaks_of_steps(config.model_copy(update={"image_size": 320}), split, (1, 8))
    assert 2**28 < one < 2**32  # Python and torch alone take some hundred MiB
    assert 7 * 2**20 < eight - one < 2**31  # of seven images and what the network makes of them
    with pytest.raises(ConfigError, match="sync_batch_norm"):
        peaks_of_steps(config.model_copy(update={"sync_batch_norm": True}), split, (1,))


def test_the_worst_batch(config: Config, tiny_digits: Path) -> None:
    split = open_split(tiny_digits, "train")
    preprocessing = build_model(config).preprocessing
    batch = worst_batch(config, split, preprocessing, 3)
    assert batch.images.shape == (3, 3, 96, 96)
    most = max(len(split.labels(index)) for index in range(len(split)))
    assert [len(target) for target in batch.targets] == [most] * 3
    assert max(int(target.labels.max()) for target in batch.targets) < len(split.classes)


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        ([(60, 90), (90, 60)], {}, (96, 96)),  # of 64 x 96 and 96 x 64 pixels
        ([(60, 90), (30, 90)], {}, (64, 96)),
        ([(90, 90)], {"image_size": (64, 200)}, (64, 64)),
        ([(90, 90)], {"image_size": (64, 200), "augment.crop_style": "detr"}, (96, 96)),  # 64 * 600 / 384 = 100
        ([(90, 90)], {"image_size": (64, 200), "augment.crop_style": "detr", "augment.crop": 0.0}, (64, 64)),
        ([(90, 90)], {"image_size": (64, 200), "augment.keep_small": 8.0}, (128, 128)),  # half as wide as high
        ([(60, 60)], {"image_size": (64, 200), "size_divisor": 1, "pad_divisor": 48}, (96, 96)),
    ],
)
def test_the_worst_batch_is_padded_to_the_highest_and_the_widest(
    sizes: list[tuple[int, int]], settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    given = {"image_size": 96, "size_divisor": 32, "augment.scale": (0.5, 1.0), **settings}
    config = load_config("paq_dino_nano", given)
    split = MagicMock(sizes=np.array(sizes), labels=lambda index: [0] * (index + 1), classes=["a", "b"])
    split.__len__.return_value = len(sizes)
    preprocessing = Preprocessing.of(config, normalization_of("resnet18.a1_in1k"))
    batch = worst_batch(config, split, preprocessing, 2)
    assert batch.images.shape[2:] == expected
    assert (batch.padding_mask is None) == (len(sizes) == 1 and expected == (64, 64))


def test_an_epoch_keeps_its_steps(config: Config, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_split(tiny_digits, "train")  # of 8 images
    monkeypatch.setattr(PEAKS, lambda *_, **__: [1, 2])
    assert largest_batch(config, split, Processes()) == 1
    monkeypatch.setattr("paqdetr.training.memory._LEAST_STEPS", 2)
    assert largest_batch(config, split, Processes()) == 4
    assert largest_batch(config.model_copy(update={"accumulate": 2}), split, Processes()) == 2


def test_a_batch_size_beside_the_largest_batch(
    tmp_path: Path, tiny_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (["plan"], ["train", "--output", str(tmp_path / "run")]):
        command = [*verb, "dino_nano", "batch_size=4", "--data", str(tiny_digits), "--auto-batch"]
        assert run(command) == 2
        assert "batch_size=4 and --auto-batch, which finds one" in capsys.readouterr().err


def test_the_largest_batch_is_what_memory_allows(
    config: Config, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_split(tiny_digits, "train")
    monkeypatch.setattr(PEAKS, lambda *_, **__: [700, 800])  # and 100 for each further image
    monkeypatch.setattr("paqdetr.training.memory._LEAST_STEPS", 1)
    for free, size in ((875, 1), (999, 1), (1001, 2), (1250, 4), (10**9, 8)):  # 80 % of it; 8 images in all
        monkeypatch.setattr(MEMORY, lambda device, free=free: free)
        assert largest_batch(config, split, Processes()) == size
    monkeypatch.setattr(MEMORY, lambda device: 874)
    with pytest.raises(ConfigError, match="not even one image fits"):
        largest_batch(config, split, Processes())


@pytest.mark.parametrize("fits", [0, 1, 5, 99])
def test_a_gpu_tries_batches_until_one_fits(
    fits: int, config: Config, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def take(config: Config, split: object, size: int, device: torch.device) -> None:
        assert shares == [0.92]  # some room is left
        if size > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("paqdetr.training.memory._take_steps", take)
    monkeypatch.setattr("paqdetr.training.memory._LEAST_STEPS", 1)

    def limit(share: float, device: Any = None) -> None:  # as torch's own: of a device it wants the number
        if device is not None:
            torch.cuda._utils._get_device_index(device)
        shares.append(share)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: shares.append(0.0))
    split = open_split(tiny_digits, "train")
    processes = Processes(device="cuda")
    if fits:
        assert max(1, 0.8 * min(fits, 8)) <= largest_batch(config, split, processes) <= fits
    else:
        with pytest.raises(ConfigError, match="not even one image fits"):
            largest_batch(config, split, processes)
    assert shares == [0.92, 1.0, 0.0]


def test_memory_of_this_machine() -> None:
    import psutil

    assert 0 < available_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps of files that were read is free."""
    files = {"max": "1000", "current": "900", "stat": "anon 300\nfile 600\ninactive_file 500\nactive_file 100\n"}

    class Fake:
        def __init__(self, path: str) -> None:
            self.name = path.removeprefix("/sys/fs/cgroup/memory.")

        def read_text(self, encoding: str) -> str:
            return files[self.name]

    monkeypatch.setattr("paqdetr.environment.Path", Fake)
    assert available_memory(torch.device("cpu")) == 600


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
    config = with_classes(load_config("paq_dino_nano", {"image_size": 160, "batch_size": 4, "workers": 0}), split)
    assert overfit_one_batch(config, split, steps=250, device="cpu").learnt


@pytest.mark.integration
def test_the_command(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paqdetr.training.memory._LEAST_STEPS", 1)
    values = {**tiny_settings, "workers": 0, "epochs": 3}
    settings = [f"{key}={value}" for key, value in values.items() if key != "batch_size"]
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
    values = {**tiny_settings, "workers": 0, "max_steps": 1}
    settings = [f"{key}={value}" for key, value in values.items() if key != "batch_size"]
    arguments = ["train", "paq_dino_nano", *settings, "--data", str(tiny_digits), "--device", "cpu", "--auto-batch"]
    monkeypatch.setattr(PEAKS, lambda *_, **__: [1, 2])
    monkeypatch.setattr("paqdetr.training.memory._LEAST_STEPS", 1)
    assert run([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").batch_size == 8
    # What memory is free later does not matter.
    monkeypatch.setattr(MEMORY, lambda device: 1000)
    capsys.readouterr()
    assert run([*arguments, "--output", str(tmp_path / "run"), "--resume"]) == 0
