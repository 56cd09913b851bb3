from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from paqdetr.checkpoint import read_checkpoint, read_header, write_checkpoint
from paqdetr.config import load_config
from paqdetr.data.digest import SplitDigest
from paqdetr.errors import CheckpointError
from paqdetr.structures import ClassTable
from paqdetr.training.optim import MovingAverage, build_optimizer
from paqdetr.training.state import Position, SavedState, load_state, save_state

CONFIG = load_config("paq_dino_nano")
POSITION = Position(epoch=3, step=17, best_ap=0.25, metrics_size=1234, seconds=5.5, stale=2)
RANDOM = [
    {"cpu": torch.arange(9, dtype=torch.uint8)},
    {"cpu": torch.ones(9, dtype=torch.uint8), "cuda": torch.zeros(3, dtype=torch.uint8)},
]


class Parts:
    """A small model with the other things a state holds, after a few steps; `layout` orders the weight's axes in memory."""

    def __init__(
        self, *, width: int = 4, seed: int = 0, steps: int = 0, layout: tuple[int, ...] = (0, 1, 2, 3)
    ) -> None:
        torch.manual_seed(seed)
        conv = nn.Conv2d(3, width, 3)
        back = [layout.index(axis) for axis in range(4)]
        conv.weight.data = conv.weight.data.permute(layout).contiguous().permute(back)
        self.model = nn.Sequential(conv, nn.BatchNorm2d(width))
        self.average = MovingAverage(self.model, 0.9)
        self.optimizer = build_optimizer(self.model, CONFIG)
        self.step(steps)

    def step(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(torch.randn(2, 3, 5, 5)).square().sum().backward()
            self.optimizer.step()
            self.average.update(self.model)

    def save(self, path: Path) -> None:
        save_state(
            path,
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
            position=POSITION,
            random=RANDOM,
            scaler={"scale": 1024.0, "_growth_tracker": 3},
            batches=5,
        )

    def load(self, path: Path) -> SavedState:
        return load_state(path, model=self.model, average=self.average, optimizer=self.optimizer)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((0, 1, 2, 3), id="contiguous"),
        pytest.param((0, 2, 3, 1), id="channels last"),
        pytest.param((3, 1, 0, 2), id="another order"),
    ],
)
def test_what_is_saved_comes_back(tmp_path: Path, layout: tuple[int, ...]) -> None:
    path = tmp_path / "state.safetensors"
    one, other = Parts(steps=3, layout=layout), Parts(seed=1, layout=layout)
    one.save(path)
    saved = other.load(path)
    assert saved.position == POSITION and saved.batches == 5
    assert saved.scaler == {"scale": 1024.0, "_growth_tracker": 3}
    for found, expected in zip(saved.random, RANDOM, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert other.average.updates == 3
    for module in ("model", "average"):
        mine, its = (getattr(p, module) for p in (one, other))
        mine, its = (m if isinstance(m, nn.Module) else m.model for m in (mine, its))
        for key, value in mine.state_dict().items():
            assert torch.equal(value, its.state_dict()[key]), key
    torch.manual_seed(7)
    one.step(2)
    torch.manual_seed(7)
    other.step(2)  # only equal if the optimiser's moments and counts came back too
    for mine, its in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, its)
    for mine, its in zip(one.average.model.parameters(), other.average.model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_position_in_epochs_of_another_length() -> None:
    """Two of five steps of the fourth epoch are done; with ten steps per epoch that is four of ten."""
    saved = SavedState(Position(epoch=3, step=17), RANDOM, None, batches=10, data=None)
    assert saved.position_for(batches=10, epoch_steps=5, accumulate=2).step == 17
    assert saved.position_for(batches=20, epoch_steps=10, accumulate=2).step == 34
    assert saved.position_for(batches=3, epoch_steps=2, accumulate=2).step == 6


@pytest.mark.parametrize(("changed", "other"), [((), False), (("train",), False), (("val",), True)])
def test_whether_the_validation_split_is_another(changed: tuple[str, ...], other: bool) -> None:
    def digest(image: int) -> SplitDigest:
        return SplitDigest(ClassTable((1,), ("cat",)), torch.tensor([[image, 10, 20]]), [f"{image}.jpg"])

    before = {name: digest(1) for name in ("train", "val")}
    saved = SavedState(Position(), RANDOM, None, batches=10, data=before)
    assert saved.has_other_validation(before | {name: digest(2) for name in changed}) is other
    assert saved.has_other_validation({name: own for name, own in before.items() if name not in changed}) is other
    unknown = SavedState(Position(), RANDOM, None, batches=10, data=None)  # of a version that did not note its data
    assert not unknown.has_other_validation(before)


def test_a_state_is_safetensors_with_a_readable_header(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    Parts(steps=1).save(path)
    assert read_header(path)["position"]["step"] == 17
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]  # no temporary file is left


def test_state_of_another_model(tmp_path: Path) -> None:
    Parts(steps=1).save(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"of another model: it has another shape for 0.weight"):
        Parts(width=5).load(tmp_path / "state.safetensors")


def test_state_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    Parts(steps=1).save(path)
    tensors, header = read_checkpoint(path)
    del header["position"]["step"]
    write_checkpoint(path, tensors, header)
    with pytest.raises(CheckpointError, match="not that of a training state of this version") as caught:
        Parts().load(path)
    assert header["version"] in caught.value.remedy
