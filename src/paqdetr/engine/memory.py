"""What a training step needs of memory, and the largest batch that fits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch
from paqdetr.engine.processes import Processes
from paqdetr.errors import ConfigError
from paqdetr.losses import build_criterion
from paqdetr.models import Detector
from paqdetr.models.zoo import build_model
from paqdetr.preprocessing import Preprocessing
from paqdetr.structures import Targets

# Of what is free: the rest is for what no estimate sees, and for other programs.
_USABLE = 0.8
# Peak over saved activations: gradients of activations and work space of kernels. docs/training.md says what it was held against.
_WORKSPACE = 1.5
_LARGEST = 512


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a training step needs in each process.

    Attributes:
        weights: of the model and of its moving average.
        gradients: of trainable parameters; twice if several processes exchange them.
        optimizer: AdamW's two moments.
        step: activations that do not depend on the number of images.
        image: activations of one image of the largest size, with most boxes.
    """

    weights: int
    gradients: int
    optimizer: int
    step: int
    image: int

    def total(self, batch_size: int) -> int:
        """Bytes with so many images."""
        fixed = self.weights + self.gradients + self.optimizer
        return fixed + int(_WORKSPACE * max(self.step + batch_size * self.image, 0))


def peak_memory() -> float:
    """Peak memory of the process in GiB; on a GPU, of the device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def available_memory(device: torch.device) -> int:
    """Bytes that are free: of the GPU, or of the machine within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:  # version 2 of control groups, which containers have
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(limit - used, 0))


def worst_batch(config: Config, split: DetectionDataset, preprocessing: Preprocessing, size: int) -> Batch:
    """Noise of the largest size that the settings make of this split's images, with as many boxes as its fullest image has."""
    scale = max(config.augment.scale)
    height, width = max(
        (
            preprocessing.target_size(high, wide, scale)
            for high, wide in np.unique(split.sizes, axis=0).tolist()
        ),
        key=lambda side: side[0] * side[1],
    )
    boxes = max(len(split.labels(index)) for index in range(len(split)))
    targets = [
        Targets(
            torch.arange(boxes) % len(split.classes),
            torch.rand(boxes, 4) * 0.2 + 0.4,
            number,
            (height, width),
        )
        for number in range(size)
    ]
    return Batch(torch.randn(size, 3, height, width), None, targets)


def step_memory(config: Config, split: DetectionDataset, *, processes: int = 1) -> StepMemory:
    """Estimate from the tensors that a forward pass keeps for the backward pass, with one and with two images."""
    torch.manual_seed(config.seed)
    model = build_model(config, classes=split.classes).train()
    model.checkpoint_activations(config.checkpoint_activations)
    saved = [
        saved_bytes(model, config, worst_batch(config, split, model.preprocessing, size)) for size in (1, 2)
    ]
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return StepMemory(
        weights=2 * weights,
        gradients=trainable * (2 if processes > 1 else 1),
        optimizer=2 * trainable,
        step=2 * saved[0] - saved[1],
        image=saved[1] - saved[0],
    )


def largest_batch(config: Config, split: DetectionDataset, processes: Processes) -> int:
    """The largest `batch_size` that fits into the memory of every process: tried on a GPU, estimated on a CPU.

    Raises:
        ConfigError: not even one image fits.
    """
    limit = min(max(len(split) // processes.count, 1), _LARGEST)
    device = processes.device
    if device.type == "cuda":
        size = search_largest(lambda batch: _runs(config, split, batch, device), limit)
    else:
        memory = step_memory(config, split, processes=processes.count)
        room = _USABLE * available_memory(device) / processes.count
        size = search_largest(lambda batch: memory.total(batch) <= room, limit)
    sizes = processes.gather(size)
    size = int(processes.broadcast(min(sizes) if sizes is not None else 0))
    if size == 0:
        raise ConfigError(
            f"--auto-batch: not even one image fits into the memory of {device}",
            "choose a smaller image_size or model",
        )
    return size


def search_largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, if all smaller ones do; 0 if 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _runs(config: Config, split: DetectionDataset, size: int, device: torch.device) -> bool:
    """Whether two steps fit into a GPU, with some room."""
    model = optimizer = batch = None
    try:
        torch.cuda.reset_peak_memory_stats(device)
        model = build_model(config, classes=split.classes).to(device).train()
        model.checkpoint_activations(config.checkpoint_activations)
        average = build_model(config, classes=split.classes).to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        batch = worst_batch(config, split, model.preprocessing, size).to(device)
        for _ in range(2):
            optimizer.zero_grad()
            batch_loss(model, config, batch).backward()
            optimizer.step()
        del average
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device) < 0.92 * total
    except torch.OutOfMemoryError:
        return False
    finally:
        del model, optimizer, batch
        torch.cuda.empty_cache()


def batch_loss(model: Detector, config: Config, batch: Batch) -> Tensor:
    """What a training would minimise on a batch: scalar."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.amp)
    with torch.autocast(batch.images.device.type, dtype=half, enabled=half is not None):
        output = model(batch.images, batch.padding_mask, batch.targets)
    report = build_criterion(config.loss)(output, batch.targets, aux_losses=model.aux_losses())
    return report.total


def saved_bytes(model: Detector, config: Config, batch: Batch) -> int:
    """Bytes of the distinct tensors that autograd keeps, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_loss(model, config, batch)
    del loss
    return sum(kept.values())
