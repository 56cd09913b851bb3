"""Whether `torch.compile` makes a nano faster on a CPU: inference and the gradients of a training step, eager and compiled.

    python benchmarks/compile_trial.py --json compile_trial.json

Needs a C++ compiler. Forms take turns: everything eager, only the backbone compiled, the whole detector compiled (matching
and losses stay eager in all: they wait for the host). Nothing is timed unless the compiled forms give the results of eager:
the weights are the same, and the noise of denoising is drawn from the same seed. Compiling starts with an empty cache, unless
TORCHINDUCTOR_CACHE_DIR says where one is; its time is that of this process and of the compilers it started, until the second
call returns.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="compile_trial"))
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from common import compare, interleave, provenance
from torch import Tensor, nn

from paqdetr.config import Config, load_config
from paqdetr.data.loader import Batch
from paqdetr.engine.memory import batch_loss
from paqdetr.engine.setup import ready_to_train
from paqdetr.models.zoo import build_model
from paqdetr.structures import Targets

FORMS = ("eager", "backbone", "model")
PARTS = ("inference", "training")
_BOXES = 10


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dino_nano")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument(
        "--batch-size", type=int, default=4, help="of the training step; inference takes one image"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest relative difference that is let through"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = provenance(threads=1, seed=0, packages=("paqdetr", "torch", "timm", "numba"))
    cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    report |= {"clock": "cpu", "rounds": arguments.rounds, "model": arguments.model}
    report |= {
        "cache": "kept" if cache.is_dir() and any(cache.iterdir()) else "empty",
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
    }
    report |= measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both parts, all forms."""
    config = load_config(arguments.model)
    torch.manual_seed(0)
    eager = ready_to_train(build_model(config, pretrained_backbone=False), config, torch.device("cpu"))
    with torch.no_grad():  # away from zeros and ones: what an image looks like has to reach the outputs
        for parameter in eager.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    targets = [made_targets(config.model.num_classes) for _ in images]
    batch = Batch(images.contiguous(memory_format=layout), None, targets)
    forms = {name: compiled(eager, name) for name in arguments.forms}
    found: dict[str, Any] = {}
    for part in arguments.parts:
        train = part == "training"
        made = gradients if train else inference
        calls: dict[str, Callable[[], Tensor]] = {}
        costs: dict[str, Any] = {}
        expected = torch.zeros(())
        for name, model in forms.items():
            model.train(train)
            calls[name] = made(model, config, batch)
            torch._dynamo.utils.counters.clear()
            started = cpu_time(), time.perf_counter()
            calls[name]()
            result = calls[name]()
            spent = cpu_time() - started[0], time.perf_counter() - started[1]
            if name == "eager":
                expected = result
                continue
            breaks = torch._dynamo.utils.counters["graph_break"]
            difference = float((result - expected).norm() / expected.norm())
            costs[name] = {
                "first_calls_cpu_seconds": round(spent[0], 1),
                "first_calls_seconds": round(spent[1], 1),
                "graph_breaks": sum(breaks.values()),
                "reasons": sorted({reason.strip().splitlines()[0] for reason in breaks}),
                "relative_difference": difference,
            }
            print(part, name, costs[name], flush=True)
            if difference > arguments.tolerance:
                raise SystemExit(
                    f"{part}, {name}: {difference:.1e} away from eager results: nothing is timed"
                )
        times = interleave(calls, rounds=arguments.rounds, warmup=1, clock=time.process_time)
        found[part] = {"times": compare(times, against="eager"), "compiled": costs}
        print(part, found[part]["times"], flush=True)
    return found


def compiled(eager: nn.Module, form: str) -> Any:
    """A model of its own, of the same weights."""
    model = deepcopy(eager)
    if form == "backbone":
        model.backbone.compile(dynamic=False)
    elif form == "model":
        model.compile(dynamic=False)
    return model


def inference(model: Any, config: Config, batch: Batch) -> Callable[[], Tensor]:
    """Logits and boxes of one image."""

    @torch.inference_mode()
    def call() -> Tensor:
        layers = model(batch.images[:1]).layers
        return torch.cat([layers.logits.flatten(), layers.boxes.flatten()])

    return call


def gradients(model: Any, config: Config, batch: Batch) -> Callable[[], Tensor]:
    """All gradients of a step, the noise always the same."""

    def call() -> Tensor:
        torch.manual_seed(1)
        model.zero_grad()
        batch_loss(model, config, batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    return call


def made_targets(num_classes: int) -> Targets:
    """Ten boxes anywhere."""
    boxes = torch.cat([0.3 + 0.4 * torch.rand(_BOXES, 2), 0.1 + 0.2 * torch.rand(_BOXES, 2)], dim=1)
    return Targets(torch.randint(num_classes, (_BOXES,)), boxes)


def cpu_time() -> float:
    """Seconds of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
