"""What a training step needs of memory, and the largest batch that fits."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size

from paqdetr.config import Config, load_config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch
from paqdetr.distributed import Processes
from paqdetr.environment import available_memory, peak_resident
from paqdetr.errors import ConfigError, OutOfMemoryError, UserError, memory_error
from paqdetr.models.backbone import normalization_of
from paqdetr.preprocessing import Preprocessing
from paqdetr.runs import Run
from paqdetr.training.bench import Workload, noise_batch

# Of what is free on a CPU, and of all that a GPU has: the rest is for fragments, and for other programs.
_USABLE = {"cpu": 0.8, "cuda": 0.92}
_LARGEST = 512


def worst_batch(config: Config, split: DetectionDataset, preprocessing: Preprocessing, size: int) -> Batch:
    """Noise of the largest size that the settings make of this split's images, with as many boxes as its fullest image has."""
    scale = max(config.augment.scale)
    height, width = max(
        (preprocessing.target_size(high, wide, scale) for high, wide in np.unique(split.sizes, axis=0).tolist()),
        key=lambda side: side[0] * side[1],
    )
    boxes = max(len(split.labels(index)) for index in range(len(split)))
    return noise_batch(size, height, width, boxes=boxes, num_classes=len(split.classes))


def peaks_of_steps(
    config: Config, split: DetectionDataset, sizes: Sequence[int], *, device: torch.device | str = "cpu"
) -> list[int]:
    """The most bytes that a process has which trains two steps on the worst batch, for ascending numbers of images.

    A process of its own takes the steps: memory of this one, once asked for, would not come back.

    Raises:
        OutOfMemoryError: the steps do not fit into memory.
    """
    made = subprocess.run(
        [sys.executable, "-c", "from paqdetr.training.memory import _measure; _measure()"],
        input=pickle.dumps((config, split, list(sizes), torch.device(device))),
        capture_output=True,
    )
    if made.returncode in (-9, 137):  # the system's answer to a process that takes too much
        raise OutOfMemoryError(
            f"a training step of {max(sizes)} images does not fit into the memory of {device}",
            "choose a smaller batch_size, image_size or model, or checkpoint_activations=true",
        )
    if made.returncode != 0:
        raise RuntimeError(
            f"measuring a training step ended with {made.returncode}: {made.stderr.decode(errors='replace')}"
        )
    result = pickle.loads(made.stdout)
    if isinstance(result, Exception):
        raise result
    return result


def _measure() -> None:
    """The process of `peaks_of_steps`: arguments through stdin, peaks or what the user did wrong through stdout."""
    config, split, sizes, device = pickle.load(sys.stdin.buffer)
    peaks: list[int] = []
    result: list[int] | UserError = peaks
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for size in sizes:
                _take_steps(config, split, size, device)
                on_gpu = device.type == "cuda"
                peaks.append(torch.cuda.max_memory_reserved(device) if on_gpu else peak_resident())
    except UserError as error:
        result = error
    except Exception as error:
        if (lacking := memory_error(error)) is None:
            raise
        result = lacking
    sys.stdout.buffer.write(pickle.dumps(result))


def _take_steps(config: Config, split: DetectionDataset, size: int, device: torch.device) -> None:
    preprocessing = Preprocessing(config.image_size, config.size_divisor, normalization_of(config.model.backbone))
    work = Workload(config, worst_batch(config, split, preprocessing, size), device)
    work.model.train()
    for _ in range(2):
        work.step()


def with_largest_batch(config: Config, split: DetectionDataset, run: Run, processes: Processes) -> Config:
    """The settings with the largest batch that fits, or the one that an earlier start of the run has found."""
    if run.config_file.is_file() and not run.empty:
        size = load_config(run.config_file).batch_size
    else:
        size = largest_batch(config, split, processes)
    return config.model_copy(update={"batch_size": size})


def largest_batch(config: Config, split: DetectionDataset, processes: Processes) -> int:
    """The largest `batch_size` that fits into the memory of every process.

    A GPU tries batches until one fits. On a CPU, where too large a batch would be the end of the process or of others, steps of
    one and of two images say what each further image takes.

    Raises:
        ConfigError: not even one image fits.
    """
    limit = min(max(len(split) // processes.count, 1), _LARGEST)
    if processes.device.type == "cuda":
        sizes = processes.gather(_largest_on_gpu(config, split, processes.device, limit))
        size = min(sizes) if sizes is not None else 0
    else:
        size = _largest_on_cpu(config, split, processes, limit) if processes.main else 0
    size = int(processes.broadcast(size))
    if size == 0:
        raise ConfigError(
            f"--auto-batch: not even one image fits into the memory of {processes.device}",
            "choose a smaller image_size or model",
        )
    return size


def _largest_on_gpu(config: Config, split: DetectionDataset, device: torch.device, limit: int) -> int:
    @find_executable_batch_size(starting_batch_size=limit)
    def fitting(batch_size: int) -> int:
        _take_steps(config, split, batch_size, device)
        return batch_size

    torch.cuda.set_per_process_memory_fraction(_USABLE["cuda"], device)
    try:
        return fitting()  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _largest_on_cpu(config: Config, split: DetectionDataset, processes: Processes, limit: int) -> int:
    room = int(_USABLE["cpu"] * available_memory(processes.device) / processes.count)
    try:
        one, two = peaks_of_steps(config, split, (1, 2))
    except OutOfMemoryError:
        return 0
    return 0 if one > room else min(limit, 1 + (room - one) // max(two - one, 1))
