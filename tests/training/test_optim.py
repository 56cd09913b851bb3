from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

from paqdetr.config import Config, load_config
from paqdetr.models import create_model
from paqdetr.paq import PatternQueries
from paqdetr.training.optim import (
    MovingAverage,
    build_optimizer,
    build_schedule,
    lr_factor,
    lr_scale,
    parameter_groups,
    step_images,
)


def config(**settings: Any) -> Config:
    return load_config("paq_dino_nano", {"model.dim": 32, "model.ffn_dim": 64, **settings})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return create_model("paq_dino_nano", num_classes=3, dim=32, ffn_dim=64)


def test_every_trainable_parameter_is_in_exactly_one_group(model: nn.Module) -> None:
    groups = parameter_groups(model, config())
    listed = [id(parameter) for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trainable
    assert len(trainable) < len(list(model.parameters()))  # some are frozen, and left out


def test_rate_and_decay_of_every_parameter(model: nn.Module) -> None:
    settings = config(lr=1e-3, backbone_lr=1e-4, offsets_lr_scale=0.1, weight_decay=0.05)
    of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, rate = "rest", 1e-3
        if name.startswith("backbone."):
            kind, rate = "backbone", 1e-4
        elif "sampling_offsets" in name:
            kind, rate = "offsets", pytest.approx(1e-4)
        assert of[id(parameter)] == (rate, 0.0 if parameter.ndim == 1 else 0.05), name
        seen.add((kind, parameter.ndim == 1))
    # The backbone's norms are frozen, so it has no one-dimensional parameter here.
    assert seen == {("backbone", False), *((kind, flat) for kind in ("rest", "offsets") for flat in (True, False))}


def test_a_bias_that_is_a_table_does_not_decay() -> None:
    model = PatternQueries(5, 4, 8, 1, extractor="pooled", head="factorised", head_rank=3)
    decays = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(model, config(weight_decay=0.05))
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    assert isinstance(model.head.bias, torch.Tensor) and model.head.bias.ndim == 2
    assert decays[id(model.head.bias)] == 0.0
    assert decays[id(model.head.queries)] == decays[id(model.patterns)] == 0.05


def test_optimizer_has_the_groups(model: nn.Module) -> None:
    optimizer = build_optimizer(model, config(lr=1e-3, backbone_lr=1e-4))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 1e-4}
    assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)


def test_warm_up_by_hand() -> None:
    settings = config(warmup_steps=4)
    assert [lr_factor(settings, step, 100) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert lr_factor(settings, 4, 100) == 1.0


def test_warm_up_takes_at_most_a_tenth() -> None:
    assert lr_factor(config(warmup_steps=1000), 3, 30) == 1.0
    assert lr_factor(config(warmup_steps=1000), 2, 30) == 0.75
    assert lr_factor(config(warmup_steps=0), 0, 30) == 1.0


def test_step_schedule_by_hand() -> None:
    settings = config(schedule="step", drop_at=0.75, warmup_steps=0)
    assert [lr_factor(settings, step, 8) for step in range(8)] == [1.0] * 6 + [0.1] * 2


def test_cosine_schedule_by_hand() -> None:
    settings = config(schedule="cosine", warmup_steps=10)
    assert lr_factor(settings, 10, 110) == 1.0
    assert lr_factor(settings, 60, 110) == pytest.approx(0.505)  # half way between 1 and 0.01
    assert lr_factor(settings, 35, 110) == pytest.approx(0.01 + 0.99 * (0.5 + math.sqrt(2) / 4))
    assert lr_factor(settings, 110, 110) == pytest.approx(0.01)
    assert lr_factor(settings, 500, 110) == pytest.approx(0.01)


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_schedule_taken_up_again_gives_the_same_rates(model: nn.Module, done: int) -> None:
    settings = config(lr=1e-3, backbone_lr=1e-4, warmup_steps=2)

    def rates(start: int) -> list[list[float]]:
        optimizer = build_optimizer(model, settings)
        for group in optimizer.param_groups:
            group["lr"] *= lr_factor(settings, start, 20)  # as a saved optimiser might have it
        schedule = build_schedule(optimizer, settings, 20, done=start)
        found = []
        for _ in range(start, 20):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return found

    assert rates(done) == rates(0)[done:]
    assert rates(0)[0][0] == pytest.approx(1e-4 / 3)


def test_moving_average_against_a_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = MovingAverage(model, 0.4)
    expected: list[torch.Tensor] = []
    for step in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))  # the norm's running figures change
        average.update(model)
        # The first update copies; later ones keep (1 + t) / (10 + t) = 2/11, 3/12, ..., at most 0.4.
        keep = 0.0 if step == 0 else min(0.4, (1 + step) / (10 + step))
        now = [value.detach().clone().double() for value in model.state_dict().values()]
        expected = expected or now
        expected = [keep * old + (1 - keep) * new for old, new in zip(expected, now, strict=True)]
    assert average.updates == 8
    assert keep == 0.4
    for (name, value), wanted in zip(average.model.state_dict().items(), expected, strict=True):
        if "num_batches_tracked" in name:
            assert value == 8  # a count is copied, not averaged
        else:
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_moving_average_is_torchs_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half())

    def average(old: Any, new: Any, updates: Any) -> None:
        keep = min(0.7, (1 + int(updates)) / (10 + int(updates)))
        (torch._foreach_lerp_(old, new, 1 - keep) if old[0].is_floating_point() else torch._foreach_copy_(old, new))

    ours, torchs = MovingAverage(model, 0.7), AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model[:2](torch.randn(5, 3))
        ours.update(model)
        torchs.update_parameters(model)
        expected = torchs.module.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())


def test_moving_average_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    average = MovingAverage(nn.Linear(3, 4), 0.9)
    with FakeTensorMode():
        model = nn.Linear(3, 4, device="cuda")
        average.model = nn.Linear(3, 4, device="cuda")  # tensors of this kind cannot be copied
        monkeypatch.setattr(torch.Tensor, "to", None)  # a count that is a tensor would be sent there
        for _ in range(3):
            average.update(model)
    assert average.updates == 3


def test_moving_average_without_decay_is_a_copy() -> None:
    model = nn.Linear(2, 2)
    average = MovingAverage(model, 0.0)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        average.update(model)
    assert torch.equal(average.model.weight, model.weight)  # type: ignore[arg-type]
    assert average.model.weight is not model.weight


def test_a_restored_average_goes_on_counting() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, 0.9)
    average.updates = 5
    with torch.no_grad():
        average.model.weight.fill_(1.0)  # type: ignore[operator]
        model.weight.fill_(3.0)
    average.update(model)
    assert average.updates == 6
    assert average.model.weight.item() == pytest.approx(6 / 15 * 1 + 9 / 15 * 3)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("rule", "batch", "accumulate", "processes", "expected"),
    [
        ("none", 4, 2, 8, 1.0),
        ("linear", 2, 1, 1, 1 / 8),
        ("linear", 4, 2, 4, 2.0),
        ("sqrt", 4, 4, 4, 2.0),
        ("sqrt", 16, 1, 1, 1.0),
    ],
)
def test_rates_for_other_batch_sizes(rule: str, batch: int, accumulate: int, processes: int, expected: float) -> None:
    settings = load_config("paq_dino_nano", {"lr_rule": rule, "batch_size": batch, "accumulate": accumulate})
    assert lr_scale(settings, step_images(settings, 100, processes)) == pytest.approx(expected)
    assert step_images(settings, 1, processes) == batch * processes  # no step has more batches than an epoch
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    rates = {group["initial_lr"] for group in parameter_groups(model, settings, scale=expected)}
    assert rates == {settings.lr * expected, settings.backbone_lr * expected}
