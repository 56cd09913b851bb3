"""Inference, training step and memory of models or settings against each other, on noise.

    python benchmarks/variants.py dino_nano paq_dino_nano --json paq_whole.json
    python benchmarks/variants.py paq_dino_nano "paq_dino_nano checkpoint_activations=true" --image-size 320

A variant is a model and settings of its own; the first one is what the others are compared with. All take turns in one process,
timed by what it was given. A training step is everything but loading: forward pass, matching and losses, backward pass,
clipping, optimizer, moving average.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import compare, interleave, provenance

from paqdetr.config import load_config, parse_overrides
from paqdetr.data.loader import Batch
from paqdetr.structures import Targets
from paqdetr.training.bench import Workload

_BOXES = 10


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help='such as "dino_nano model.num_queries=50"')
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="of a training step; inference takes one image")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = provenance(threads=1, seed=0, packages=("paqdetr", "torch", "timm", "numba"))
    report |= {"clock": "cpu", "rounds": arguments.rounds, "image_size": arguments.image_size}
    report |= {"batch_size": arguments.batch_size, "boxes": _BOXES} | measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants in turns."""
    images = torch.randn(
        arguments.batch_size, 3, arguments.image_size, arguments.image_size, generator=torch.Generator().manual_seed(0)
    )
    sides = {name: workload(name, images) for name in arguments.variants}
    for side in sides.values():
        side.model.eval()
    inference = interleave(
        {name: side.infer for name, side in sides.items()}, rounds=arguments.rounds, warmup=1, clock=time.process_time
    )
    for side in sides.values():
        side.model.train()
    kept = {name: side.saved() for name, side in sides.items()}
    steps = interleave(
        {name: side.step for name, side in sides.items()}, rounds=arguments.rounds, warmup=1, clock=time.process_time
    )
    first = arguments.variants[0]
    return {
        "inference": compare(inference, against=first),
        "training_step": compare(steps, against=first),
        "saved_bytes": kept,
        "parameters": {name: sum(p.numel() for p in side.model.parameters()) for name, side in sides.items()},
    }


def workload(variant: str, images: torch.Tensor) -> Workload:
    """One variant in use and in training."""
    torch.manual_seed(0)
    model, *settings = variant.split()
    config = load_config(model, parse_overrides(settings))
    targets = [made_targets(config.model.num_classes) for _ in images]
    return Workload(config, Batch(images, None, targets), "cpu")


def made_targets(num_classes: int) -> Targets:
    """Ten boxes anywhere."""
    boxes = torch.cat([0.3 + 0.4 * torch.rand(_BOXES, 2), 0.1 + 0.2 * torch.rand(_BOXES, 2)], dim=1)
    return Targets(torch.randint(num_classes, (_BOXES,)), boxes)


if __name__ == "__main__":
    main()
