"""Where a training step's time goes: throughput of a model, split by part of the network.

python benchmarks/train_step.py --data data/digits-small                 # paq_dino_nano at 256 px
python benchmarks/train_step.py --data data/digits-small --model dino_nano --json step.json

Every figure is the median over the counted steps, in milliseconds a batch. Forward parts are timed with hooks, backward
as a whole; `--freeze` times the same step with the backbone frozen, which shows what its backward costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
from torch import nn

import paqdetr
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.data.loader import training_loader
from paqdetr.losses import build_criterion
from paqdetr.models.zoo import build_model
from paqdetr.training.optim import MovingAverage, build_optimizer

PARTS = ("backbone", "neck", "encoder", "proposal_head", "query_source", "denoising", "decoder")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", default="paq_dino_nano")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--freeze", action="store_true", help="freeze the backbone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Time the parts of a step at one fixed image size."""
    torch.manual_seed(0)
    # One size for all batches, so that medians compare like with like.
    settings = {"image_size": arguments.image_size, "augment.scale": [1.0, 1.0], "workers": 0}
    config = load_config(arguments.model, settings)
    split = open_split(arguments.data, "train")
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": len(split.classes)})})
    model = build_model(config, classes=split.classes, pretrained_backbone=False).train()
    if arguments.freeze:
        model.backbone.requires_grad_(False)
    if config.channels_last:
        model.backbone.to(memory_format=torch.channels_last)
    criterion, optimizer = build_criterion(config.loss), build_optimizer(model, config)
    average = MovingAverage(model, config.ema_decay)
    loader, _ = training_loader(config, split, model.preprocessing)
    times: dict[str, list[float]] = defaultdict(list)
    for part in PARTS:
        module = getattr(model, part, None)
        if module is not None:
            _time_forward(module, times[part])

    clock = time.perf_counter
    done, started = 0, clock()
    while done < arguments.warmup + arguments.steps:
        for batch in loader:
            marks = [clock()]
            images = batch.images
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            output = model(images, batch.padding_mask, batch.targets)
            marks.append(clock())
            report = criterion(output, batch.targets, aux_losses=model.query_source.aux_losses())
            marks.append(clock())
            optimizer.zero_grad()
            report.total.backward()
            marks.append(clock())
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            marks.append(clock())
            average.update(model)
            marks.append(clock())
            times["data"].append(marks[0] - started)
            for name, i in (
                ("forward", 0),
                ("criterion", 1),
                ("backward", 2),
                ("optimizer", 3),
                ("average", 4),
            ):
                times[name].append(marks[i + 1] - marks[i])
            times["step"].append(marks[-1] - started)
            started = clock()
            done += 1
            if done == arguments.warmup + arguments.steps:
                break
    medians = {name: 1000 * statistics.median(values[arguments.warmup :]) for name, values in times.items()}
    return {
        "model": arguments.model,
        "image_size": arguments.image_size,
        "batch_size": config.batch_size,
        "frozen_backbone": arguments.freeze,
        "images_per_second": round(1000 * config.batch_size / medians["step"], 2),
        "milliseconds": {name: round(value, 1) for name, value in medians.items()},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "paqdetr": paqdetr.__version__,
    }


def _time_forward(module: nn.Module, times: list[float]) -> None:
    started = [0.0]

    def before(*_: object) -> None:
        started[0] = time.perf_counter()

    def after(*_: object) -> None:
        times.append(time.perf_counter() - started[0])

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


if __name__ == "__main__":
    main()
