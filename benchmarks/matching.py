"""Matching of predictions with boxes, by assigner and number of boxes, against a plain loop over layers and images.

python benchmarks/matching.py --json matching.json

The plain loop is how published codes match: for each layer one cost matrix of all images' queries with all images' boxes, then
one Hungarian solution an image. Six layers, two images, 900 queries.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import compare, interleave, provenance
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from paqdetr.paq import FixedKAssigner, OneToOneAssigner, QualityAwareAssigner, SimOTAAssigner, match_layers
from paqdetr.structures import Targets

LAYERS, IMAGES, QUERIES, CLASSES = 6, 2, 900, 80
ASSIGNERS: dict[str, Any] = {
    "one_to_one": OneToOneAssigner,
    "quality_aware": QualityAwareAssigner,
    "fixed_k": FixedKAssigner,
    "simota": SimOTAAssigner,
}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[10, 50, 200, 800], help="an image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = provenance(threads=arguments.threads, seed=0, packages=("paqdetr", "torch", "scipy", "numpy"))
    report |= {"clock": "cpu", "rounds": arguments.rounds, "layers": LAYERS, "images": IMAGES}
    report |= {"queries": QUERIES, "cases": [measure(boxes, arguments.rounds) for boxes in arguments.boxes]}
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(boxes: int, rounds: int) -> dict[str, Any]:
    """All assigners on images of so many boxes."""
    torch.manual_seed(0)
    targets = [Targets(torch.randint(CLASSES, (boxes,)), made_boxes(boxes)) for _ in range(IMAGES)]
    logits = torch.randn(LAYERS, IMAGES, QUERIES, CLASSES) - 3
    # Half of the queries are near a box, as after some training.
    predicted = torch.stack([torch.stack([near(target.boxes) for target in targets]) for _ in range(LAYERS)])
    cases: dict[str, Callable[[], object]] = {"plain loop": lambda: plain(logits, predicted, targets)}
    for name, make in ASSIGNERS.items():
        assigners = [make()] * LAYERS
        cases[name] = lambda assigners=assigners: match_layers(logits, predicted, targets, assigners)
    expected = plain(logits, predicted, targets)
    found = match_layers(logits, predicted, targets, [OneToOneAssigner()] * LAYERS)
    for theirs, ours in zip(expected, found, strict=True):
        for (rows, columns), pairs in zip(theirs, ours, strict=True):
            if pairs.query_indices.tolist() != list(rows) or pairs.target_indices.tolist() != list(columns):
                raise SystemExit("the plain loop matches differently: nothing is timed")
    times = interleave(cases, rounds=rounds, warmup=1, clock=time.process_time)
    return {"boxes": boxes, "times": compare(times, against="plain loop")}


def plain(logits: Tensor, boxes: Tensor, targets: list[Targets]) -> list[list[Any]]:
    """One-to-one matches of every layer and image."""
    labels = torch.cat([target.labels for target in targets])
    truth = torch.cat([target.boxes for target in targets])
    sizes = [len(target) for target in targets]
    matches = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        probability, flat = layer_logits.flatten(0, 1).sigmoid(), layer_boxes.flatten(0, 1)
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        giou = generalized_box_iou(box_convert(flat, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
        cost = 5 * torch.cdist(flat, truth, p=1) + 2 * (positive - negative)[:, labels] - 2 * giou
        parts = cost.view(len(targets), -1, len(truth)).split(sizes, -1)
        matches.append([linear_sum_assignment(part[image]) for image, part in enumerate(parts)])
    return matches


def made_boxes(count: int) -> Tensor:
    return torch.cat([0.1 + 0.8 * torch.rand(count, 2), 0.02 + 0.1 * torch.rand(count, 2)], dim=1)


def near(truth: Tensor) -> Tensor:
    """(QUERIES, 4): half of them moved copies of boxes, the rest anywhere."""
    half = QUERIES // 2
    copies = truth[torch.randint(len(truth), (half,))]
    copies = (copies + 0.01 * torch.randn(half, 4)).clamp(0.01, 0.99)
    return torch.cat([copies, made_boxes(QUERIES - half)])


if __name__ == "__main__":
    main()
