"""How fast a model is on this machine: its attention, its inference, and a training step; timings are interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paqdetr.config import Config, load_config
from paqdetr.data.loader import Batch
from paqdetr.environment import machine, peak_memory, require_device
from paqdetr.errors import ConfigError
from paqdetr.loading import is_exported, load
from paqdetr.losses import build_criterion
from paqdetr.models import Detector
from paqdetr.models.zoo import build_model
from paqdetr.ops import choose_backend, ms_deform_attn
from paqdetr.runtime import Predictor
from paqdetr.serialize import Jsonable
from paqdetr.structures import Targets
from paqdetr.timing import compare, interleave
from paqdetr.training.optim import MovingAverage, build_optimizer
from paqdetr.training.setup import ready_to_train

_BOXES = 10
PARTS = ("attention", "inference", "training step")


@dataclass(frozen=True, slots=True)
class Bench(Jsonable):
    """What was measured.

    Attributes:
        model, against: names; None if the model was measured alone.
        device: where.
        image_size, batch_size: of square images of noise with ten boxes each.
        rounds: calls that each median is of.
        attention: the encoder's deformable attention, forward and backward, by back end: "reference" (grid_sample) and what runs.
        inference, training_step: milliseconds by model; `ratio` is how many times faster than `against` it is.
        images_per_second: of the model, in "inference" and "training_step".
        saved_mib: what autograd keeps for the backward pass of a step, by model.
        peak_memory_gib: of the process, or of the GPU.
        machine: processor, threads, memory.
    """

    model: str
    against: str | None
    device: str
    image_size: int
    batch_size: int
    rounds: int
    attention: dict[str, dict[str, float]]
    inference: dict[str, dict[str, float]]
    training_step: dict[str, dict[str, float]]
    images_per_second: dict[str, float]
    saved_mib: dict[str, float]
    peak_memory_gib: float
    machine: dict[str, Any]


def bench(
    model: str,
    *,
    against: str | None = None,
    image_size: int = 640,
    batch_size: int = 1,
    device: str | None = None,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
    settings: dict[str, Any] | None = None,
) -> Bench:
    """Time a model with random weights on noise, in turns with another.

    Args:
        model: a name of `list_models()` or a YAML file.
        against: another.
        image_size: side of the images in pixels.
        batch_size: images that go through together.
        device: "cpu", "cuda", ...; the best there is if None.
        rounds: calls of each case that count, after two that do not.
        progress: called with (rounds done, rounds in all) over all three measurements.
        settings: of both models, with dotted keys.

    Raises:
        ConfigError: an unknown model or setting, or `against` is the model itself.
    """
    where = require_device(device)
    torch.manual_seed(0)
    config = load_config(model, settings or {})
    names = [model] if against is None else [model, against]
    if len(set(names)) < len(names):
        raise ConfigError(f"--against {against}: is the model itself", "name another one")
    batch = noise_batch(batch_size, image_size, image_size, boxes=_BOXES, num_classes=config.model.num_classes)
    sides = {name: Workload(load_config(name, settings or {}), batch, where) for name in names}

    def part(number: int) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(number * total + done, len(PARTS) * total)

        return report

    def waiting(call: Callable[[], object]) -> Callable[[], object]:
        if where.type != "cuda":
            return call

        def finished() -> None:
            call()
            torch.cuda.synchronize(where)

        return finished

    attention = interleave(
        {name: waiting(call) for name, call in _attention(config, image_size, batch_size, where).items()},
        rounds=rounds,
        progress=part(0),
    )
    for side in sides.values():
        side.model.eval()
    inference = interleave({name: waiting(side.infer) for name, side in sides.items()}, rounds=rounds, progress=part(1))
    for side in sides.values():
        side.model.train()
    steps = interleave({name: waiting(side.step) for name, side in sides.items()}, rounds=rounds, progress=part(2))
    base = against or model
    used, trained = compare(inference, against=base), compare(steps, against=base)
    return Bench(
        model=model,
        against=against,
        device=str(where),
        image_size=image_size,
        batch_size=batch_size,
        rounds=rounds,
        attention=compare(attention, against="reference"),
        inference=used,
        training_step=trained,
        images_per_second={
            name: round(1e3 * batch_size / found[model]["median_ms"], 2)
            for name, found in (("inference", used), ("training_step", trained))
        },
        saved_mib={name: round(side.saved() / 2**20, 1) for name, side in sides.items()},
        peak_memory_gib=round(peak_memory(where), 3),
        machine=machine(),
    )


def bench_files(
    files: Sequence[str],
    *,
    image_size: int | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time trained and exported models on noise, in turns: the model alone, without reading and resizing of images.

    Args:
        files: what `paqdetr.load` reads. Times are held against the last one's.
        image_size: side of the images of a checkpoint in pixels; that of the first exported model, else the checkpoint's own.
            An exported model has its own size.
        batch_size, rounds, progress: as of `bench`.
        device: of checkpoints, the best there is if None; exported models run on the CPU, and refuse another one.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: one file is given twice, or an image size for exported models alone, or a device that does not go with one.
    """
    if len(set(files)) < len(files):
        raise ConfigError(f"--against {files[-1]}: is the model itself", "name another one")
    if image_size is not None and all(map(is_exported, files)):
        raise ConfigError(
            f"image size {image_size}: an exported model has a size of its own",
            f"leave it out; `paqdetr export RUN --image-size {image_size}` makes a model of this size",
        )
    where = require_device(device)
    models = {name: load(name, device=device if is_exported(name) else str(where)) for name in files}
    sizes = [(m.preprocessing.height, m.preprocessing.width) for m in models.values() if isinstance(m, Predictor)]
    cases: dict[str, Callable[[], object]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, model in models.items():
        if isinstance(model, Predictor):
            shapes[name] = (model.preprocessing.height, model.preprocessing.width)
            noise = np.random.default_rng(0).integers(256, size=(batch_size, *shapes[name], 3), dtype=np.uint8)
            cases[name] = partial(model.run, noise)
        else:
            own = (image_size, image_size) if image_size else model.preprocessing.target_size(640, 640)
            shapes[name] = own if image_size or not sizes else sizes[0]
            cases[name] = partial(_infer, model, torch.randn(batch_size, 3, *shapes[name], device=where))
    seconds = interleave(cases, rounds=rounds, progress=progress)
    return {
        "inference": compare(seconds, against=files[-1]),
        "image_size": {name: list(shape) for name, shape in shapes.items()},
        "engine": {
            name: m.engine.name if isinstance(m, Predictor) else f"torch, {where}" for name, m in models.items()
        },
        "batch_size": batch_size,
        "rounds": rounds,
        "machine": machine(),
    }


def _infer(model: Detector, images: Tensor) -> None:
    with torch.inference_mode():
        model(images).pred_boxes.cpu()  # which waits for a GPU


class Workload:
    """A model with random weights in use and in training, always on the same batch."""

    def __init__(self, config: Config, batch: Batch, device: torch.device | str) -> None:
        self.config = config
        self.model = ready_to_train(build_model(config), config, torch.device(device))
        last = torch.channels_last if config.channels_last else torch.contiguous_format
        self.batch = replace(batch, images=batch.images.contiguous(memory_format=last)).to(device)
        self._optimizer = build_optimizer(self.model, config)
        self._average = MovingAverage(self.model, config.ema_decay)

    def infer(self) -> None:
        with torch.inference_mode():
            self.model(self.batch.images)

    def step(self) -> None:
        self._optimizer.zero_grad()
        batch_loss(self.model, self.config, self.batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._optimizer.step()
        self._average.update(self.model)

    def saved(self) -> int:
        """Bytes that a step keeps for its backward pass."""
        return saved_bytes(lambda: batch_loss(self.model, self.config, self.batch))


def batch_loss(model: Detector, config: Config, batch: Batch) -> Tensor:
    """What a training would minimise on a batch: scalar."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.amp)
    with torch.autocast(batch.images.device.type, dtype=half, enabled=half is not None):
        output = model(batch.images, batch.padding_mask, batch.targets)
    report = build_criterion(config.loss)(output, batch.targets, aux_losses=model.aux_losses())
    return report.total


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps between forward and backward: every storage once, parameters left out."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is given away twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def _attention(config: Config, image_size: int, batch_size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """The encoder's sampling, forward and backward, by back end."""
    model = config.model
    sides = [-(-image_size // stride) for stride in model.level_strides]
    shapes = [(side, side) for side in sides]
    tokens = sum(height * width for height, width in shapes)
    queries = sum(height * width for height, width in shapes[-(model.encoder_query_levels or len(shapes)) :])
    heads, points = model.num_heads, model.num_points
    value = torch.randn(batch_size, tokens, heads, model.dim // heads, device=device)
    locations = torch.rand(batch_size, queries, heads, len(shapes), points, 2, device=device)
    weights = torch.rand(batch_size, queries, heads, len(shapes), points, device=device)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def call(backend: Any) -> Callable[[], None]:
        def both_ways() -> None:
            out = ms_deform_attn(value, shapes, locations, weights, backend=backend)
            torch.autograd.grad(out.sum(), leaves)

        return both_ways

    chosen = choose_backend(device, tokens=tokens)
    return {name: call(name) for name in dict.fromkeys(("reference", chosen))}


def noise_batch(
    images: int, height: int, width: int, *, boxes: int, num_classes: int, device: torch.device | str = "cpu"
) -> Batch:
    """Images of noise with so many boxes each, anywhere, made on the device."""
    targets = [
        Targets(
            torch.randint(num_classes, (boxes,)),
            torch.cat([0.3 + 0.4 * torch.rand(boxes, 2), 0.1 + 0.2 * torch.rand(boxes, 2)], dim=1),
            number,
            (height, width),
        )
        for number in range(images)
    ]
    return Batch(torch.randn(images, 3, height, width, device=device), None, targets).to(device)
