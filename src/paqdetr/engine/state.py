"""Everything a training needs to go on as if it had never stopped: weights, average, optimiser, step, best figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paqdetr.checkpoint import load_tensors, read_checkpoint, write_checkpoint
from paqdetr.engine.optim import MovingAverage


@dataclass(frozen=True, slots=True)
class Position:
    """Where a training stands.

    Attributes:
        epoch: whole epochs done.
        step: optimiser steps done.
        best_ap: best validation AP so far; -1 before the first evaluation.
        metrics_size: bytes of metrics.jsonl that belong to this state.
        seconds: spent in training so far.
    """

    epoch: int = 0
    step: int = 0
    best_ap: float = -1.0
    metrics_size: int = 0
    seconds: float = 0.0


def save_state(
    path: Path,
    *,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
    position: Position,
) -> None:
    """Write the state atomically, without pickle. Taken at the end of an epoch, when no random number matters any more:
    every epoch seeds anew."""
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.model.state_dict().items()}
    scalars: dict[str, dict[str, float]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    header: dict[str, Any] = {
        "position": asdict(position),
        "updates": average.updates,
        "optimizer": scalars,
    }
    write_checkpoint(path, {key: value.clone() for key, value in tensors.items()}, header)


def load_state(
    path: Path, *, model: nn.Module, average: MovingAverage, optimizer: torch.optim.Optimizer
) -> Position:
    """Put a saved state back.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    tensors, header = read_checkpoint(path)
    load_tensors(model, _strip(tensors, "model."), str(path))
    load_tensors(average.model, _strip(tensors, "average."), str(path))
    average.restore(int(header["updates"]))
    state: dict[int, dict[str, Any]] = {}
    for name, value in _strip(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    for index, entries in header["optimizer"].items():
        state.setdefault(int(index), {}).update(entries)
    # Learning rates are the schedule's: they follow from the settings and the step.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Position(**header["position"])


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
