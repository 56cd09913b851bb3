"""The processes that train or evaluate together: one a device, started by torchrun or accelerate launch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor

from paqdetr.config import Config
from paqdetr.environment import require_device
from paqdetr.errors import ConfigError, UserError, WorkerError
from paqdetr.values import environment_integer

# One waits for another at most so long: for COCO figures of a large split, made by the first alone.
_PATIENCE = timedelta(hours=1)


class Processes:
    """This process and the others, and what they exchange. With one process nothing is sent anywhere.

    Attributes:
        index: of this process, from 0.
        count: how many there are.
        device: this process's.
    """

    def __init__(self, *, index: int = 0, count: int = 1, device: torch.device | str = "cpu") -> None:
        self.index, self.count, self.device = index, count, torch.device(device)

    @classmethod
    def of(cls, state: Accelerator | PartialState) -> Processes:
        """Those that accelerate knows of."""
        return cls(index=state.process_index, count=state.num_processes, device=state.device or "cpu")

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """Meet the processes that torchrun or accelerate launch has started; this one alone if there are no others.

        Raises:
            ConfigError: the device cannot be used.
        """
        local = {name: environment_integer(name, 0, low=0) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        count = environment_integer("WORLD_SIZE", 1, low=1)
        if count > 1 and device != "cpu" and torch.cuda.is_available():
            # As accelerate does below; before "cuda" is tried, which would be the first GPU for all.
            torch.cuda.set_device(local["LOCAL_RANK"] % torch.cuda.device_count())
        wanted = require_device(device)
        if count == 1:
            return cls(device=wanted)
        with _meeting():
            return cls.of(PartialState(cpu=wanted.type == "cpu", timeout=_PATIENCE))

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.index == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _reaching_all():
            dist.all_reduce(total)
            return total.tolist()

    def gather(self, item: Any) -> list[Any] | None:
        """What every process gave, in their order, for the main one; None for the others."""
        if self.count == 1:
            return [item]
        items: list[Any] | None = [None] * self.count if self.main else None
        with _reaching_all():
            dist.gather_object(item, items)
        return items

    def broadcast(self, item: Any) -> Any:
        """The main process's item, for all."""
        if self.count == 1:
            return item
        items = [item]
        with _reaching_all():
            dist.broadcast_object_list(items)
        return items[0]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the main process's."""
        if self.count > 1:
            with _reaching_all():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """All run the block to its end, or all raise the `UserError` of the first that could not."""
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        self.raise_together(failure)

    def raise_together(self, error: UserError | None) -> None:
        """Raise the first process's error in all of them, so that none waits for one that has ended.

        All have to call it, those without an error with None.
        """
        if self.count > 1:
            own = None if error is None else (type(error), error.message, error.remedy)
            errors: list[Any] = [None] * self.count
            with _reaching_all():
                dist.all_gather_object(errors, own)
            first = next((found for found in errors if found is not None), None)
            error = None if first is None else first[0](first[1], first[2])
            if error is not None:
                error.reported_elsewhere = not self.main
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.sum([0.0])


def leave() -> None:
    """Part from the other processes, at the end of a program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost_process(error: Exception) -> WorkerError | None:
    """What a user can do about the complaint of gloo or NCCL that another process cannot be reached; None for any other error."""
    text = str(error).strip().split("\n")[0]
    if not isinstance(error, dist.DistError) and not any(word in text for word in ("gloo", "NCCL")):
        return None
    reason = text.rpartition("] ")[2] if text.startswith("[") else text
    return WorkerError(
        f"another process of this command has ended or cannot be reached ({reason})",
        "its own message says why; start all of them again, a training with --resume",
    )


@contextmanager
def _reaching_all() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise lost from error


@contextmanager
def _meeting() -> Iterator[None]:
    """Say what is wrong where the environment announces processes that cannot be met, or has values that nobody can use."""
    try:
        yield
    except (ValueError, ImportError, dist.DistError) as error:
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, dist.DistError) or "environment variable" in str(error) or "MASTER_" in str(error):
            PartialState._reset_state()  # half filled
            count = os.environ.get("WORLD_SIZE")
            raise ConfigError(
                f"WORLD_SIZE={count} announces several processes, but they cannot meet: {reason}",
                "start them with torchrun, or unset WORLD_SIZE to train in one",
            ) from None
        found = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FORK_"))]
        if not found:
            raise
        AcceleratorState._reset_state(reset_partial_state=True)
        raise ConfigError(
            f"accelerate cannot start with {', '.join(sorted(found))} in the environment: {reason}",
            "correct it, or unset what you do not need",
        ) from None


def build_accelerator(config: Config, device: str | None, output: Path) -> Accelerator:
    """The accelerator that the settings ask for.

    Raises:
        ConfigError: device, precision or way of sharing out do not go together.
    """
    wanted = require_device(device)
    on_cpu = wanted.type == "cpu"
    if wanted.index:
        raise ConfigError(
            f"device {device!r}: training takes the first device it sees",
            f"set CUDA_VISIBLE_DEVICES={wanted.index} and use --device {wanted.type}",
        )
    if config.amp == "fp16" and on_cpu:
        raise ConfigError("amp='fp16' needs a GPU, and the device is the CPU", "use amp=bf16 or amp=no")
    if config.sync_batch_norm and on_cpu:
        raise ConfigError(
            "sync_batch_norm=True: torch synchronises batch norms on GPUs alone, and the device is the CPU",
            "use sync_batch_norm=false, or frozen norms",
        )
    # accelerate keeps one state a process, and refuses another training in it with other precision or device.
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        if state.mixed_precision != config.amp or (state.device.type == "cpu") != on_cpu:
            AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    # Of depthwise convolutions, on the first step; torch's own words: "not an error".
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Where nan_policy leaves out the very first step, it counts all the same.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    with _meeting():
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=config.amp,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=False),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
        )
    if accelerator.device.type != wanted.type:
        raise ConfigError(
            f"device {device!r}: accelerate would train on {accelerator.device.type} instead",
            f"use --device {accelerator.device.type}",
        )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    if accelerator.distributed_type not in known:
        raise ConfigError(
            f"accelerate is set to {accelerator.distributed_type.value}, and training keeps whole weights in each process",
            "start it with torchrun, or with `accelerate launch` without FSDP, DeepSpeed and the like",
        )
    return accelerator
