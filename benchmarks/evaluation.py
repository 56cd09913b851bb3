"""The COCO figures of many detections: the library behind `paqdetr eval` against pycocotools, and against the model's own time.

python benchmarks/evaluation.py --json evaluation.json

Boxes and detections are made up: 20 classes, some 7 boxes per image, 100 detections per image around boxes and anywhere.
Inference is a pass of the nano over images of 320 x 320, one at a time: an evaluation has to take less.

python benchmarks/evaluation.py --coco-size --json coco_size.json

What COCO's val2017 would ask of everything behind `paqdetr eval --intervals`: 5,000 images, 80 classes, 36,000 boxes, 100
detections per image. Made up as well, a class as often as its rank allows, some three classes an image. Each part once: CPU time,
and peak memory of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import compare, interleave, provenance, summary

from paqdetr.metrics import MatchTable, evaluate_detections, figure_intervals
from paqdetr.models import create_model

CLASSES, DETECTIONS = 20, 100


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--coco-size", action="store_true", help="matching and intervals of 5,000 images")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = ("paqdetr", "torch", "numpy", "hotcoco", "pycocotools")
    report = provenance(threads=arguments.threads, seed=0, packages=packages)
    report |= coco_size() if arguments.coco_size else against_pycocotools(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def against_pycocotools(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU time of both libraries, in turns, and of the model."""
    truth, results = made(arguments.images)
    ours, theirs = evaluate_detections(truth, results).AP, pycocotools(truth, results)
    if abs(ours - theirs) > 1e-9:
        raise SystemExit(f"AP is {ours} and {theirs}: nothing is timed")
    times = interleave(
        {"pycocotools": lambda: pycocotools(truth, results), "paqdetr": lambda: evaluate_detections(truth, results)},
        rounds=arguments.rounds,
        warmup=0,
        clock=time.process_time,
    )
    return {
        "clock": "cpu",
        "rounds": arguments.rounds,
        "images": arguments.images,
        "detections": len(results),
        "AP": ours,
        "times": compare(times, against="pycocotools"),
        "inference_of_one_image": summary(inference(arguments.rounds)),
    }


def coco_size() -> dict[str, Any]:
    """CPU seconds and peak memory of the process in GB, which only grows, after each part."""
    truth, results = made_like_coco(images=5000, classes=80, boxes=36_000)
    report: dict[str, Any] = {
        "images": len(truth["images"]),
        "classes": len(truth["categories"]),
        "boxes": len(truth["annotations"]),
        "detections": len(results),
        "resamples": 1000,
        "peak_gb_before": peak_gb(),
        "parts": {},
    }

    def measured(name: str, call: Callable[[], Any]) -> Any:
        begun = time.process_time()
        found = call()
        report["parts"][name] = {"cpu_seconds": round(time.process_time() - begun, 1), "peak_gb": peak_gb()}
        print(name, report["parts"][name], flush=True)
        return found

    figures = measured("evaluate_detections", lambda: evaluate_detections(truth, results))
    table = measured("MatchTable.match", lambda: MatchTable.match(truth, results))
    own = measured("MatchTable.figures", table.figures)
    for name, values in own.figures.items():
        if abs(values[0] - getattr(figures, name)) > 1e-9:
            raise SystemExit(f"{name} is {values[0]} by the table and {getattr(figures, name)}: wrong")
    found = measured("figure_intervals", lambda: figure_intervals(table, samples=1000))
    return report | {"AP": found.figures["AP"].to_json()}


def peak_gb() -> float:
    """The most memory the process has had, in units of 2^30 bytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def made_like_coco(images: int, classes: int, boxes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results; the n-th class is in an n-th as many images as the first, sides are 8 to 400 pixels."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, classes + 1)
    popularity /= popularity.sum()
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    per_image = 1 + rng.multinomial(boxes - images, rng.dirichlet(np.full(images, 0.8)))
    for image, number in enumerate(per_image.tolist(), start=1):
        kinds = 1 + rng.choice(classes, size=int(rng.integers(1, 6)), p=popularity)
        sides = np.exp(rng.uniform(np.log(8), np.log(400), (number, 2)))
        own = np.concatenate([rng.uniform(0, 1, (number, 2)) * (640 - sides), sides], axis=1)
        labels = rng.choice(kinds, size=number)
        for label, (x, y, w, h) in zip(labels.tolist(), own.tolist(), strict=True):
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": 0}
            annotations.append(row | {"bbox": [x, y, w, h], "area": w * h})
        # Two thirds lie around boxes, mostly of the right class, and the better a box the higher its score; the rest anywhere.
        aim = rng.integers(0, number, DETECTIONS)
        error = np.exp(rng.uniform(-4, 0, DETECTIONS))
        found = own[aim] * np.exp(rng.normal(0, 0.3, (DETECTIONS, 4)) * error[:, None])
        of = np.where(rng.random(DETECTIONS) < 0.8, labels[aim], rng.choice(kinds, DETECTIONS))
        scores = np.clip(1 - error + rng.normal(0, 0.15, DETECTIONS), 0.001, 0.999)
        lost = rng.random(DETECTIONS) < 1 / 3
        found[lost] = rng.uniform(8, 320, (int(lost.sum()), 4))
        of[lost] = 1 + rng.choice(classes, int(lost.sum()), p=popularity)
        scores[lost] *= 0.4
        for label, score, box in zip(of.tolist(), scores.tolist(), found.tolist(), strict=True):
            results.append({"image_id": image, "category_id": label, "score": score, "bbox": box})
    truth = {
        "images": [{"id": i, "width": 640, "height": 640} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        "annotations": annotations,
    }
    return truth, results


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
