"""Everything a training needs to go on as if it had never stopped, in one file without pickle."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paqdetr.checkpoint import load_tensors, read_checkpoint, write_checkpoint
from paqdetr.data.digest import DataDigest, data_changes, digest_from_state, digest_to_state
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.training.optim import MovingAverage


@dataclass(frozen=True, slots=True)
class Position:
    """Where a training stands.

    Attributes:
        epoch: whole epochs done, their evaluation included.
        step: optimiser steps done; those since the last whole epoch say which batches are done.
        best_ap: best validation AP so far; -1 before the first evaluation.
        stale: evaluations since the best one.
        skipped: steps left out in a row, up to now, because loss or gradient were not finite.
        metrics_size: bytes of metrics.jsonl that belong to this state.
        seconds: spent in training so far.
    """

    epoch: int = 0
    step: int = 0
    best_ap: float = -1.0
    stale: int = 0
    skipped: int = 0
    metrics_size: int = 0
    seconds: float = 0.0


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout and denoising noise draw from, uint8 (n,), by device ("cpu", "cuda"...)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put them back; a state of a device that is not here is left alone."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def save_state(
    path: Path,
    *,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
    position: Position,
    random: list[dict[str, Tensor]],
    scaler: Mapping[str, Any] | None = None,
    batches: int = 0,
    data: DataDigest | None = None,
) -> None:
    """Write the state atomically.

    Args:
        random: `random_state` of every process, in their order.
        scaler: the gradient scaler's state in fp16.
        batches: of an epoch.
        data: by which a change of the data is noticed.

    Raises:
        StorageError: the file cannot be written; an earlier one is still there.
    """
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.model.state_dict().items()}
    scalars: dict[str, dict[str, float]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    for rank, states in enumerate(random):
        tensors |= {f"random.{rank}.{device}": state for device, state in states.items()}
    images, data_header = digest_to_state(data or {})
    tensors |= {f"data.{name}": tensor for name, tensor in images.items()}
    header: dict[str, Any] = {
        "position": asdict(position),
        "updates": average.updates,
        "optimizer": scalars,
        "scaler": scaler,
        "batches": batches,
        "data": None if data is None else data_header,
    }
    write_checkpoint(path, tensors, header)


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a state file says besides the tensors that `load_state` has put into their places."""

    position: Position
    random: list[dict[str, Tensor]]
    scaler: dict[str, Any] | None
    batches: int
    data: DataDigest | None

    def require(
        self,
        path: Path,
        *,
        processes: int,
        batches: int,
        data: DataDigest,
        max_steps: int | None = None,
        accept_new_data: bool = False,
    ) -> None:
        """Raise ConfigError unless it is of so many processes, and of the same data with as many batches per epoch."""
        if len(self.random) != processes:
            raise ConfigError(
                f"{path}: the run was started with {len(self.random)} processes, now there are {processes}",
                "resume with as many, or start a new run with another --output",
            )
        changes = "" if self.data is None else data_changes(self.data, data)
        if self.data is not None and "train" in self.data and "train" in data:
            before, now = self.data["train"].classes, data["train"].classes
            if moved := [(own, its) for own, its in before.rows_in(now) if own != its]:
                own, its = moved[0]
                raise ConfigError(
                    f"{path}: the classes are in another order: {now.names[its]!r} was number {own + 1} and is number {its + 1}, "
                    "so that what was learnt of one would be called another",
                    "bring them into the old order, or start a new run with init= and this run's folder, which goes by names",
                )
        if not changes and self.batches != batches:
            changes = f"an epoch had {self.batches} batches, now it has {batches}"
        if changes and not accept_new_data:
            raise ConfigError(
                f"{path}: the data are not those that the run was started with: {changes}",
                "resume with the same data, or go on with these: --resume --accept-new-data (accept_new_data=True in Python)",
            )
        if self.batches != batches and max_steps is not None:
            raise ConfigError(
                f"{path}: an epoch had {self.batches} batches, now it has {batches}, and max_steps={max_steps} counts steps of "
                "the epochs as they were",
                "resume with the same data, or start a new run on these with init= and this run's folder",
            )
        if changes or self.data is None:
            found = (
                f"going on with other data: {changes}"
                if changes
                else ("the run is of a version that did not note its data: whether they are the same is not checked")
            )
            logging.getLogger(__name__).warning("%s: %s", path, found)

    def position_for(self, *, batches: int, epoch_steps: int, accumulate: int) -> Position:
        """The position, where epochs have become longer or shorter: as much of the epoch in hand is done as before."""
        if self.batches == batches:
            return self.position
        old_steps = -(-self.batches // accumulate)
        done = self.position.step - self.position.epoch * old_steps
        return replace(self.position, step=self.position.epoch * epoch_steps + done * epoch_steps // old_steps)

    def has_other_validation(self, data: DataDigest) -> bool:
        """Whether these data differ from those of the state in another split than `train`."""
        before, now = ({name: own for name, own in d.items() if name != "train"} for d in (self.data or data, data))
        return bool(data_changes(before, now))


def load_state(path: Path, *, model: nn.Module, average: MovingAverage, optimizer: torch.optim.Optimizer) -> SavedState:
    """Put a saved state back.

    Raises:
        CheckpointError: the file is damaged, of another version or of another model.
    """
    tensors, header = read_checkpoint(path)
    load_tensors(model, _strip(tensors, "model."), str(path))
    load_tensors(average.model, _strip(tensors, "average."), str(path))
    try:
        average.updates = int(header["updates"])
        position = Position(**{field.name: header["position"][field.name] for field in fields(Position)})
        ranks = {int(name.split(".")[0]) for name in _strip(tensors, "random.")}
        random = [_strip(tensors, f"random.{rank}.") for rank in sorted(ranks)]
        data = digest_from_state(_strip(tensors, "data."), header.get("data"))
        state: dict[int, dict[str, Any]] = {}
        for name, value in _strip(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        for index, entries in header["optimizer"].items():
            state.setdefault(int(index), {}).update(entries)
        # Learning rates are the schedule's: they follow from the settings and the step.
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        # The file holds them contiguous. Fused AdamW on a CPU reads weight, gradient and moments in the order of memory: of a
        # weight that is channels last, it would take the moments of other elements.
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        return SavedState(position, random, header["scaler"], int(header["batches"]), data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its header is not that of a training state of this version ({error})",
            f"resume with version {header.get('version')}, which wrote it",
        ) from None


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
