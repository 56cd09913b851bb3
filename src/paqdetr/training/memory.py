"""What a training step needs of memory, and the largest batch that fits."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from subprocess import PIPE
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size

from paqdetr.config import AugmentConfig, Config, load_config
from paqdetr.data.augment import DETR_WINDOW
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch
from paqdetr.distributed import Processes
from paqdetr.environment import available_memory, peak_resident
from paqdetr.errors import ConfigError, OutOfMemoryError, UserError, memory_error
from paqdetr.models.backbone import normalization_of
from paqdetr.preprocessing import Preprocessing
from paqdetr.runs import Run
from paqdetr.training.bench import Workload, noise_batch

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
_LESS = "choose a smaller batch_size, image_size or model, or checkpoint_activations=true"
# Of what is free on a CPU, and of all that a GPU has: the rest is for fragments, and for other programs.
_USABLE = {"cpu": 0.8, "cuda": 0.92}
_LARGEST = 512
# Steps that an epoch keeps, whatever fits: a DETR learns by steps, and warm-up and moving average alone take some hundred.
_LEAST_STEPS = 30


def worst_batch(
    config: Config,
    split: DetectionDataset,
    preprocessing: Preprocessing,
    size: int,
    *,
    device: torch.device | str = "cpu",
) -> Batch:
    """Noise as high as the highest and as wide as the widest image that the settings make of this split's, with as many boxes as
    its fullest one has: what is left of both orientations fills one batch, which is padded to both."""
    scale, pad = max(config.augment.scale), preprocessing.pad_divisor
    pictures = {
        picture
        for high, wide in np.unique(split.sizes, axis=0).tolist()
        for picture in _extremes(config.augment, high, wide)
    }
    sizes = {preprocessing.target_size(*picture, scale) for picture in pictures}
    height, width = (-(-max(sides) // pad) * pad for sides in zip(*sizes, strict=True))
    boxes = max(len(split.labels(index)) for index in range(len(split)))
    batch = noise_batch(size, height, width, boxes=boxes, num_classes=len(split.classes), device=device)
    if sizes == {(height, width)}:
        return batch
    mask = torch.zeros(size, height, width, dtype=torch.bool, device=device)
    mask[0, -1] = True  # a mask without padding is none on a CPU
    return replace(batch, padding_mask=mask)


def _extremes(augment: AugmentConfig, height: int, width: int) -> list[tuple[int, int]]:
    """A picture's (height, width), and those of crops that may be the highest or the widest after the resize, which makes their
    ratios alone count."""
    found = [(height, width)]
    if not augment.crop:
        return found
    detr = augment.crop_style == "detr"
    if detr:
        found += [DETR_WINDOW, DETR_WINDOW[::-1]]
    if augment.keep_small:  # a crop may grow in one direction alone
        low, high = DETR_WINDOW if detr else (augment.crop_size[0], 1.0)
        sides = (min(height, width),) * 2 if detr else (height, width)
        least = [min(max(round(side * low / high), 1), side) for side in sides]
        found += [(height, least[1]), (least[0], width)]
    return found


def peaks_of_steps(config: Config, split: DetectionDataset, sizes: Sequence[int]) -> list[int]:
    """The most bytes that a process has which trains two steps on the worst batch, on the CPU, for ascending numbers of images.

    Raises:
        OutOfMemoryError: the steps do not fit into memory.
    """
    return in_own_process(_peaks, config, split, list(sizes))


def _peaks(config: Config, split: DetectionDataset, sizes: list[int], progress: Progress) -> list[int]:
    peaks: list[int] = []
    for done, size in enumerate(sizes, start=1):
        _take_steps(config, split, size, torch.device("cpu"))
        peaks.append(peak_resident())
        progress(done, len(sizes))
    return peaks


def in_own_process(
    call: Callable[..., Result], config: Config, *arguments: object, progress: Progress = lambda done, total: None
) -> Result:
    """What a function returns that tries a training. A process of its own runs it: memory of this one, once asked for, would not
    come back.

    Args:
        call: of a module. Its last argument is its own `progress`.
        config: its first argument.
        progress: called here with what the function reports.

    Raises:
        OutOfMemoryError: what it does needs more memory than there is.
        UserError: as it does.
    """
    code = "from paqdetr import _threads; _threads.postpone_compiler(); from paqdetr.training.memory import _serve; _serve()"
    command = [sys.executable, "-c", code]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=log) as process:
        assert process.stdin is not None and process.stdout is not None
        answer = None
        try:
            with process.stdin:
                pickle.dump((call, config, *arguments), process.stdin)
            while answer is None:
                content = pickle.load(process.stdout)
                if isinstance(content, tuple):
                    progress(*content)
                else:
                    answer = content
        except (EOFError, BrokenPipeError):
            code = process.wait()
            if code in (-9, 137):  # the system's answer to a process that takes too much
                raise OutOfMemoryError(
                    f"a training with batch_size={config.batch_size} does not fit into memory", _LESS
                ) from None
            log.seek(0)
            raise RuntimeError(f"trying a training ended with {code}: {log.read().decode(errors='replace')}") from None
        except BaseException:  # Ctrl-C above all
            process.kill()
            raise
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _serve() -> None:
    """The process of `in_own_process`. What to call comes through stdin; through stdout go pickles: (done, total) as often as it
    likes, and at last a list of one, what it returned or what the user did wrong."""
    call, *arguments = pickle.load(sys.stdin.buffer)
    out = sys.stdout.buffer

    def send(message: object) -> None:
        pickle.dump(message, out)
        out.flush()

    result: object
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = call(*arguments, lambda done, total: send((done, total)))
    except UserError as error:
        result = error
    except Exception as error:
        if (lacking := memory_error(error)) is None:
            raise
        result = lacking
    send([result])


def _take_steps(config: Config, split: DetectionDataset, size: int, device: torch.device) -> None:
    preprocessing = Preprocessing.of(config, normalization_of(config.model.backbone))
    work = Workload(config, worst_batch(config, split, preprocessing, size, device=device), device)
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
    """The largest `batch_size` that fits into the memory of every process and leaves an epoch 30 optimiser steps.

    A GPU tries batches until one fits. On a CPU, where too large a batch would be the end of the process or of others, steps of
    one and of two images say what each further image takes.

    Raises:
        ConfigError: not even one image fits.
    """
    limit = min(max(len(split) // (processes.count * config.accumulate * _LEAST_STEPS), 1), _LARGEST)
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

    # Without a device: the process's own, which "cuda" alone would not name.
    torch.cuda.set_per_process_memory_fraction(_USABLE["cuda"])
    try:
        return fitting()  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the run reports its own


def _largest_on_cpu(config: Config, split: DetectionDataset, processes: Processes, limit: int) -> int:
    room = int(_USABLE["cpu"] * available_memory(processes.device) / processes.count)
    try:
        one, two = peaks_of_steps(config, split, (1, 2))
    except OutOfMemoryError:
        return 0
    return 0 if one > room else min(limit, 1 + (room - one) // max(two - one, 1))
