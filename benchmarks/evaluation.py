"""The COCO figures of many detections: the library behind `paqdetr eval` against pycocotools, and against the model's own time.

python benchmarks/evaluation.py --json evaluation.json

Boxes and detections are made up: 20 classes, some 7 boxes an image, 100 detections an image around boxes and anywhere.
Inference is a pass of the nano over images of 320 x 320, one at a time: an evaluation has to take less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import compare, interleave, provenance, summary

from paqdetr.metrics import evaluate_detections
from paqdetr.models import create_model

CLASSES, DETECTIONS = 20, 100


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = ("paqdetr", "torch", "numpy", "hotcoco", "pycocotools")
    report = provenance(threads=arguments.threads, seed=0, packages=packages)
    truth, results = made(arguments.images)
    ours, theirs = evaluate_detections(truth, results).AP, pycocotools(truth, results)
    if abs(ours - theirs) > 1e-9:
        raise SystemExit(f"AP is {ours} and {theirs}: nothing is timed")
    times = interleave(
        {
            "pycocotools": lambda: pycocotools(truth, results),
            "paqdetr": lambda: evaluate_detections(truth, results),
        },
        rounds=arguments.rounds,
        warmup=0,
        clock=time.process_time,
    )
    report |= {
        "clock": "cpu",
        "rounds": arguments.rounds,
        "images": arguments.images,
        "detections": len(results),
        "AP": ours,
        "times": compare(times, against="pycocotools"),
        "inference_of_one_image": summary(inference(arguments.rounds)),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def made(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results, as COCO has them."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(1, images + 1):
        boxes = []
        for _ in range(rng.integers(1, 14)):
            x, y, w, h = [*rng.uniform(0, 500, 2), *rng.uniform(8, 140, 2)]
            boxes.append((int(rng.integers(1, CLASSES + 1)), np.array([x, y, w, h])))
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": boxes[-1][0], "iscrowd": 0}
            annotations.append(row | {"bbox": [x, y, w, h], "area": w * h})
        for number in range(DETECTIONS):
            category, box = boxes[number % len(boxes)]
            moved = box + rng.normal(0, 6, 4) if number < 40 else np.abs(rng.uniform(1, 300, 4))
            moved[2:] = np.maximum(moved[2:], 1)
            row = {"image_id": image, "category_id": category, "score": float(rng.uniform())}
            results.append(row | {"bbox": moved.tolist()})
    truth = {
        "images": [{"id": i, "width": 640, "height": 640} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    return truth, results


def pycocotools(truth: dict[str, Any], results: list[dict[str, Any]]) -> float:
    """AP."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def inference(rounds: int) -> list[float]:
    """CPU seconds of single images."""
    model, image = create_model("paq_dino_nano").eval(), torch.randn(1, 3, 320, 320)

    def call() -> None:
        with torch.inference_mode():
            model(image)

    return interleave({"model": call}, rounds=rounds, clock=time.process_time)["model"]


if __name__ == "__main__":
    main()
