"""What it costs to watch queries: the collector's own time over an evaluation's, and the live figures' over a training step's.

python benchmarks/query_usage_cost.py --data data/digits-small --json docs/results/query_usage_cost.json

Both are measured where they happen, by a timer around them within one evaluation or one training: other work on the machine
meets numerator and denominator alike. Times are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
from common import provenance

import paqdetr
import paqdetr.training.figures as figures
import paqdetr.training.step as step
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.evaluation.evaluate import evaluate_split
from paqdetr.metrics import QueryUsage
from paqdetr.models import create_model


class Timer:
    """Seconds spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*positional: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return function(*positional, **named)
            finally:
                self.seconds += time.process_time() - started

        return timed


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", default="paq_dino_nano")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = provenance(threads=arguments.threads, seed=0, packages=("paqdetr", "torch", "numpy", "scipy"))
    report |= {"model": arguments.model, "image_size": arguments.image_size}
    report["evaluation"] = evaluation(arguments)
    report["training"] = training(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def evaluation(arguments: argparse.Namespace) -> dict[str, Any]:
    """One evaluation of the validation split, the collector watching."""
    split = open_split(arguments.data, "val")
    torch.manual_seed(0)
    model = create_model(arguments.model, num_classes=len(split.classes), image_size=arguments.image_size).eval()
    model.classes = split.classes
    timer = Timer()

    class Timed(QueryUsage):
        see = timer.around(QueryUsage.see)

    evaluate_split(model, split)  # kernels are compiled, files are in memory
    usage = Timed(num_queries=model.config.num_queries)
    started = time.process_time()
    evaluate_split(model, split, observers=[usage])
    whole = time.process_time() - started
    return {
        "images": len(split),
        "num_queries": model.config.num_queries,
        "boxes_per_image": round(usage.report().boxes_per_image or 0, 3),
        "seconds": round(whole, 4),
        "collector_seconds": round(timer.seconds, 4),
        "percent": round(100 * timer.seconds / whole, 3),
    }


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Some steps of a training, everything that only the figures of queries need timed."""
    timer, started = Timer(), [0.0, 0.0]
    begin = arguments.steps // 4  # the first steps compile and allocate

    class Watch(paqdetr.Callback):
        def on_step(self, step: int, loss: float) -> None:
            if step == begin:
                started[0], timer.seconds = time.process_time(), 0.0
            elif step == arguments.steps:
                started[1] = time.process_time()

    originals = step.batch_use, step.mixture_figures, step.watch_gradients
    own = figures.Interval.add_use, figures.query_figures
    watch = step.watch_gradients

    def watch_gradients(content: torch.Tensor, into: torch.Tensor, *, scale: float = 1.0) -> None:
        """The hook runs in the backward pass: it is the hook that is timed."""

        class Content:
            requires_grad = content.requires_grad

            @staticmethod
            def register_hook(hook: Callable[[torch.Tensor], None]) -> None:
                content.register_hook(timer.around(hook))

        watch(Content(), into, scale=scale)  # type: ignore[arg-type]

    step.batch_use, step.mixture_figures = timer.around(step.batch_use), timer.around(step.mixture_figures)
    step.watch_gradients = watch_gradients
    figures.Interval.add_use, figures.query_figures = map(timer.around, own)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = paqdetr.train(
                arguments.model,
                data=arguments.data,
                output=Path(folder) / "run",
                device="cpu",
                callbacks=[Watch()],
                max_steps=arguments.steps + 1,  # the last one ends with an evaluation
                settings={"image_size": arguments.image_size, "workers": 0, "log_every": 10},
            )
            config = load_config(run.config_file)
    finally:
        step.batch_use, step.mixture_figures, step.watch_gradients = originals
        figures.Interval.add_use, figures.query_figures = own
    steps, whole = arguments.steps - begin, started[1] - started[0]
    return {
        "steps": steps,
        "batch_size": config.batch_size,
        "step_ms": round(1e3 * whole / steps, 3),
        "figures_ms": round(1e3 * timer.seconds / steps, 3),
        "percent": round(100 * timer.seconds / whole, 3),
    }


if __name__ == "__main__":
    main()
