"""Where a training step's time goes: throughput of a model, split by part of the network; or of several, side by side.

python benchmarks/train_step.py --data data/digits-small                 # paq_dino_nano at 256 px
python benchmarks/train_step.py --data data/digits-small --model dino_nano paq_dino_nano co_dino_nano --json step.json
python benchmarks/train_step.py --data data/digits-small --model dino_nano dino_nano,model.decoder_layers=3

Every figure is the median over the counted steps, in milliseconds a batch. Forward parts are timed with hooks, backward
as a whole; `--freeze` times the same step with the backbone frozen, which shows what its backward costs. Several models take
turns batch by batch, so that other work on the machine slows them alike. `kept_for_backward_mb` is what autograd holds
between forward and backward; `inference` is one image.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
from common import provenance
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from paqdetr.config import load_config, parse_overrides
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.loader import Batch, training_loader
from paqdetr.losses import build_criterion
from paqdetr.models.zoo import build_model
from paqdetr.training.optim import MovingAverage, build_optimizer

PARTS = ("backbone", "neck", "encoder", "start", "query_source", "denoising", "auxiliary", "decoder")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", nargs="+", default=["paq_dino_nano"], metavar="NAME[,KEY=VALUE...]")
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


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the parts of a step at one fixed image size, and one image in use."""
    split = open_split(arguments.data, "train")
    trainees = [Trainee(name, split, arguments) for name in arguments.model]
    loader, _ = training_loader(trainees[0].config, split, trainees[0].model.preprocessing)
    clock, done = time.perf_counter, 0
    while done < arguments.warmup + arguments.steps:
        waited = clock()
        for batch in loader:
            data = clock() - waited
            for trainee in trainees:
                trainee.step(batch, data)
            done += 1
            if done == arguments.warmup + arguments.steps:
                break
            waited = clock()
    for _ in range(arguments.warmup + arguments.steps):
        for trainee in trainees:
            trainee.detect(batch.images[:1])
    reports = [trainee.report(arguments.warmup, batch) for trainee in trainees]
    shared = {
        "image_size": arguments.image_size,
        "batch_size": trainees[0].config.batch_size,
        "frozen_backbone": arguments.freeze,
        **provenance(threads=torch.get_num_threads(), seed=0, packages=("torch", "paqdetr")),
    }
    return reports[0] | shared if len(reports) == 1 else {"models": reports, **shared}


class Trainee:
    """A model in training, and the times of its steps."""

    def __init__(self, name: str, split: DetectionDataset, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        # One size for all batches, so that medians compare like with like.
        model, *own = name.split(",")
        settings = {"image_size": arguments.image_size, "augment.scale": [1.0, 1.0], "workers": 0}
        config = load_config(model, settings | {"model.num_classes": len(split.classes)} | parse_overrides(own))
        self.name, self.config = name, config
        self.model = build_model(config, classes=split.classes, pretrained_backbone=False).train()
        if arguments.freeze:
            self.model.backbone.requires_grad_(False)
        if config.channels_last:
            self.model.backbone.to(memory_format=torch.channels_last)
        self.criterion, self.optimizer = build_criterion(config.loss), build_optimizer(self.model, config)
        self.average = MovingAverage(self.model, config.ema_decay)
        self.times: dict[str, list[float]] = defaultdict(list)
        for part in PARTS:
            module = getattr(self.model, part, None)
            if module is not None:
                _time_forward(module, self.times[part])

    def loss(self, batch: Batch) -> Tensor:
        """Forward and criterion."""
        images = batch.images
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        started = time.perf_counter()
        output = self.model(images, batch.padding_mask, batch.targets)
        self.times["forward"].append(time.perf_counter() - started)
        started = time.perf_counter()
        report = self.criterion(output, batch.targets, aux_losses=self.model.aux_losses())
        self.times["criterion"].append(time.perf_counter() - started)
        return report.total

    def step(self, batch: Batch, data: float) -> None:
        """One step; `data` is what the batch took."""
        self.model.train()
        first = time.perf_counter()
        total = self.loss(batch)
        marks = [time.perf_counter()]
        self.optimizer.zero_grad()
        total.backward()
        marks.append(time.perf_counter())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        marks.append(time.perf_counter())
        self.average.update(self.model)
        marks.append(time.perf_counter())
        for name, (start, end) in zip(("backward", "optimizer", "average"), pairwise(marks), strict=True):
            self.times[name].append(end - start)
        self.times["data"].append(data)
        self.times["step"].append(marks[-1] - first + data)

    def detect(self, image: Tensor) -> None:
        """One image in use."""
        self.model.eval()
        started = time.perf_counter()
        with torch.inference_mode():
            self.model(image)
        self.times["inference"].append(time.perf_counter() - started)

    def report(self, warmup: int, batch: Batch) -> dict[str, Any]:
        """Medians, and what a forward pass keeps for the backward pass."""
        medians = {name: 1000 * statistics.median(values[warmup:]) for name, values in self.times.items() if values}
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x
            return x

        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.model.train()
        with saved_tensors_hooks(keep, lambda x: x):
            self.loss(batch)
        size = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
        return {
            "model": self.name,
            "images_per_second": round(1000 * self.config.batch_size / medians["step"], 2),
            "milliseconds": {name: round(value, 1) for name, value in medians.items()},
            "kept_for_backward_mb": round(size / 2**20),
        }


def _time_forward(module: nn.Module, times: list[float]) -> None:
    started = [0.0]

    def before(*_: object) -> None:
        started[0] = time.perf_counter()

    def after(*_: object) -> None:
        if module.training:
            times.append(time.perf_counter() - started[0])

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


if __name__ == "__main__":
    main()
