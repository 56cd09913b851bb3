"""What a training does about broken predictions, alone and with other processes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from paqdetr.paq import NonFiniteError, NonFinitePolicy, OneToOneAssigner, Targets, match_layers

ERROR = NonFiniteError("predictions of layer2 are NaN for image(s) [7]", "lower the learning rate")


def test_raise_ends_the_training_and_lets_sound_steps_pass() -> None:
    policy = NonFinitePolicy()
    assert not policy.skips(None)
    with pytest.raises(NonFiniteError) as caught:
        policy.skips(ERROR)
    assert caught.value is ERROR and policy.skipped == 0


def test_skip_step_warns_counts_and_loses_patience(caplog: pytest.LogCaptureFixture) -> None:
    policy = NonFinitePolicy("skip-step", patience=2)
    with caplog.at_level(logging.WARNING):
        assert [policy.skips(error) for error in (ERROR, None, ERROR, ERROR, None)] == [True, False] + [
            True
        ] * 2 + [False]
    assert policy.skipped == 3
    assert "step left out (3 so far)" in caplog.text and "layer2" in caplog.text and "[7]" in caplog.text
    assert policy.skips(ERROR) and policy.skips(ERROR)
    with pytest.raises(NonFiniteError, match="layer2"):
        policy.skips(ERROR)


def test_a_training_goes_on_without_the_broken_step() -> None:
    model, policy = torch.nn.Linear(4, 4), NonFinitePolicy("skip-step")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    target = Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), image_id="b.jpg")
    moved = []
    for value in (1.0, math.nan, 1.0):
        before = model.weight.detach().clone()
        boxes = model(torch.full((1, 1, 3, 4), value)).sigmoid()  # (K, B, n, 4)
        error = None
        try:
            match_layers(torch.zeros(1, 1, 3, 2), boxes, [target], [OneToOneAssigner()])
        except NonFiniteError as found:
            error = found
            assert found.images == ("b.jpg",) and found.layers == ("layer1",)
        if not policy.skips(error):
            optimizer.zero_grad()
            boxes.sum().backward()
            optimizer.step()
        moved.append(not torch.equal(before, model.weight))
    assert moved == [True, False, True] and policy.skipped == 1


def _one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    policy = NonFinitePolicy("skip-step", patience=2)
    broken = [[False, True, False, False], [False, False, True, False]][rank]
    found = [policy.skips(ERROR if here else None) for here in broken]
    assert found == [False, True, True, False], found
    assert policy.skips(None if rank else ERROR) and policy.skips(None if rank else ERROR)
    try:
        policy.skips(None if rank else ERROR)
    except NonFiniteError as error:
        told = error.message
    assert ("another process" in told) == (rank == 1)
    (Path(folder) / f"done{rank}").touch()
    distributed.destroy_process_group()


def test_processes_leave_out_the_same_steps(tmp_path: Path) -> None:
    multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(action="ignore"), "action: expected 'raise' or 'skip-step', found 'ignore'"),
        (dict(patience=0), "patience: expected at least 1, found 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NonFinitePolicy(**settings)
