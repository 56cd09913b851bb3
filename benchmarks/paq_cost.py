"""What PaQ adds to a host: parameters, arithmetic, memory and time, by form of its modules.

python benchmarks/paq_cost.py --model dino_nano --json nano.json
python benchmarks/paq_cost.py --model dino_r50 --json r50.json

PaQ's modules are timed alone, on the encoder memory of a real forward pass, and set against a whole step of the host without PaQ:
whole steps with and without PaQ differ by less than their own noise. Times are CPU time of one thread, so that other programs on
the machine count little; a share is the median of a form over the median of the host, which are timed in turns. Training batches
have padding (a quarter of one image's width), inference has none.

A training step of the module is its forward and backward pass and the AdamW update of its parameters; one of the host is
forward, criterion, backward, clipping and update. Matching is the difference between quality-aware and one-to-one assignment
of the same predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import paqdetr
from paqdetr.config import load_config
from paqdetr.losses import build_criterion
from paqdetr.models.proposals import QueryInit, query_features
from paqdetr.models.tokens import Tokens
from paqdetr.models.zoo import build_model
from paqdetr.paq import OneToOneAssigner, PatternQueries, QualityAwareAssigner, match_layers
from paqdetr.structures import Targets
from paqdetr.training.bench import saved_bytes
from paqdetr.training.optim import build_optimizer

FORMS: dict[str, dict[str, Any]] = {
    f"{extractor}/{head}": {"extractor": extractor, "head": head}
    for extractor in ("fused", "pooled")
    for head in ("dense", "factorised")
} | {"query features": {"mixture_input": "query"}, "fused/dense and query features": {"mixture_input": "both"}}
# PaQ-DETR (arXiv 2603.06917), DINO with ResNet-50 at 800 x 1333; parameters in millions, GFLOPs, GB, images per second.
PUBLISHED = {"parameters": [42.0, 43.8], "flops": [196, 205], "memory": [3.67, 4.15], "fps": [15.8, 15.4]}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dino_r50", help="a host without PaQ")
    parser.add_argument("--image-size", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=10, help="an image")
    parser.add_argument("--repeats", type=int, default=20, help="of the modules and the matching")
    parser.add_argument("--host-repeats", type=int, default=5, help="of whole steps, between those")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # CPU time of several threads would count their waiting
    report = measure(arguments)
    print_table(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one host and the forms."""
    torch.manual_seed(0)
    config = load_config(arguments.model)
    host = build_model(config, pretrained_backbone=False)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    padding = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
    padding[-1, :, -(arguments.image_size // 4) :] = True
    targets = [random_targets(arguments.boxes, config.model.num_classes) for _ in images]
    criterion = build_criterion(config.loss)
    optimizer = build_optimizer(host, config)

    def host_step() -> None:
        output = host.train()(images, padding, targets)
        report = criterion(output, targets, aux_losses=host.query_source.aux_losses())
        optimizer.zero_grad()
        report.total.backward()
        nn.utils.clip_grad_norm_(host.parameters(), config.clip_norm)
        optimizer.step()

    @torch.no_grad()
    def host_inference() -> None:
        host.eval()(images)

    seen: list[tuple[Tokens, QueryInit]] = []
    handle = host.start.register_forward_hook(lambda module, inputs, start: seen.append((inputs[0], start)))
    with torch.no_grad():
        host.eval()(images)
        host.eval()(images, padding)
    handle.remove()
    plain, padded = seen
    static = sum(p.numel() for p in host.query_source.parameters())

    model = config.model
    forms: dict[str, PatternQueries] = {
        name: PatternQueries(
            model.num_queries, model.num_patterns, model.dim, model.num_levels, head_rank=model.head_rank, **settings
        )
        for name, settings in FORMS.items()
    }
    training = {name: training_step(form, *padded, model.num_heads) for name, form in forms.items()}
    inference = {name: inference_step(form, *plain, model.num_heads) for name, form in forms.items()}
    matching = matching_steps(host, images, targets)

    steps = {f"{name}/training": step for name, step in training.items()}
    steps |= {f"{name}/inference": step for name, step in inference.items()}
    steps |= {f"matching/{name}": step for name, step in matching.items()}
    host_steps = {"host/training": host_step, "host/inference": host_inference}
    times: dict[str, list[float]] = {name: [] for name in (*steps, *host_steps)}
    for step in (*steps.values(), *host_steps.values()):
        step()  # warm up
    for turn in range(arguments.host_repeats):
        for name, step in host_steps.items():
            times[name].append(timed(step))
        done, until = (arguments.repeats * t // arguments.host_repeats for t in (turn, turn + 1))
        for _ in range(done, until):
            for name, step in steps.items():
                times[name].append(timed(step))
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}  # ms

    host_flops = flops(host, images[:1])
    host_parameters = sum(p.numel() for p in host.parameters())
    saved = saved_bytes(lambda: criterion(host.train()(images, padding, targets), targets).total)
    rows = {}
    for name, form in forms.items():
        parameters = sum(p.numel() for p in form.parameters()) - static
        activations = saved_bytes(lambda form=form: mixed(form, *padded, model.num_heads).sum())
        tokens, features = (plain[0].values[:1], query_features(plain[1], plain[0], num_heads=model.num_heads)[:1])
        form_flops = flops(form, tokens, plain[0].spatial_shapes, None, None, features)
        rows[name] = {
            "parameters_added": parameters,
            "parameters_percent": round(100 * parameters / host_parameters, 2),
            "gflops_added": round(form_flops / 1e9, 4),
            "flops_percent": round(100 * form_flops / host_flops, 2),
            # Weights, gradients and two moments of AdamW, and what autograd keeps.
            "memory_added_mb": round((16 * parameters + activations) / 1e6, 2),
            "training_ms": round(median[f"{name}/training"], 2),
            "training_percent": round(100 * median[f"{name}/training"] / median["host/training"], 3),
            "inference_ms": round(median[f"{name}/inference"], 2),
            "inference_percent": round(100 * median[f"{name}/inference"] / median["host/inference"], 3),
        }
    return {
        "model": arguments.model,
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "num_queries": model.num_queries,
        "num_patterns": model.num_patterns,
        "tokens": plain[0].values.shape[1],
        "repeats": arguments.repeats,
        "host": {
            "parameters": host_parameters,
            "gflops": round(host_flops / 1e9, 2),
            "memory_mb": round((16 * host_parameters + saved) / 1e6, 1),
            "training_ms": round(median["host/training"], 1),
            "inference_ms": round(median["host/inference"], 1),
        },
        "forms": rows,
        "matching": {
            "one_to_one_ms": round(median["matching/one_to_one"], 2),
            "quality_aware_ms": round(median["matching/quality_aware"], 2),
        },
        "published": PUBLISHED,
        "host_repeats": arguments.host_repeats,
        "threads": 1,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "paqdetr": paqdetr.__version__,
    }


def mixed(form: PatternQueries, memory: Tokens, start: QueryInit, num_heads: int) -> Tensor:
    """Content (B, n, d); reading what queries look at, which a two-stage host has at hand, is part of it."""
    features = None
    if form.query_head is not None:
        features = query_features(start, memory, num_heads=num_heads).detach()
    return form(memory.values, memory.spatial_shapes, memory.padding_mask, None, features).content


def training_step(form: PatternQueries, memory: Tokens, start: QueryInit, num_heads: int) -> Callable[[], None]:
    """Forward, backward and AdamW update of one form, with the diversity of its patterns."""
    optimizer = torch.optim.AdamW(form.parameters(), 1e-4)
    memory = memory.with_values(memory.values.detach().clone().requires_grad_())

    def step() -> None:
        content = mixed(form.train(), memory, start, num_heads)
        optimizer.zero_grad()
        (content.sum() + form.aux_losses()["diversity"]).backward()
        optimizer.step()

    return step


def inference_step(form: PatternQueries, memory: Tokens, start: QueryInit, num_heads: int) -> Callable[[], None]:
    """A forward pass of one form."""

    @torch.no_grad()
    def step() -> None:
        mixed(form.eval(), memory, start, num_heads)

    return step


def matching_steps(host: nn.Module, images: Tensor, targets: list[Targets]) -> dict[str, Callable[[], None]]:
    """The matching of a step under either rule."""
    with torch.no_grad():
        layers = host.eval()(images).layers
    count = layers.logits.shape[0]
    rules = {
        "one_to_one": [OneToOneAssigner()] * count,
        "quality_aware": [QualityAwareAssigner()] * (count - 1) + [OneToOneAssigner()],
    }

    def step_of(assigners: list[Any]) -> Callable[[], None]:
        return lambda: void(match_layers(layers.logits, layers.boxes, targets, assigners))

    return {name: step_of(assigners) for name, assigners in rules.items()}


def void(value: object) -> None:
    """Drop it."""


def random_targets(count: int, num_classes: int) -> Targets:
    """Boxes of many sizes inside the image."""
    size = 0.05 + 0.4 * torch.rand(count, 2)
    centre = size / 2 + torch.rand(count, 2) * (1 - size)
    return Targets(torch.randint(num_classes, (count,)), torch.cat([centre, size], dim=1))


def timed(step: Callable[[], None]) -> float:
    """Seconds of CPU time."""
    started = time.process_time()
    step()
    return time.process_time() - started


def flops(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of one call, each counted once."""
    learns = [p for p in module.parameters() if p.requires_grad]
    module.eval().requires_grad_(False)  # the counter's hooks want no half-differentiable graph
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    for parameter in learns:
        parameter.requires_grad_()
    return counter.get_total_flops() // 2


def print_table(report: dict[str, Any]) -> None:
    """The shares of each form."""
    host = report["host"]
    print(
        f"{report['model']}, {report['image_size']} px, batch {report['batch_size']}, n {report['num_queries']}, "
        f"m {report['num_patterns']}: {host['parameters'] / 1e6:.1f} M parameters, {host['gflops']:.1f} GFLOPs, "
        f"{host['training_ms']:.0f} ms a training step, {host['inference_ms']:.0f} ms in inference"
    )
    print(f"{'form':32}{'parameters':>18}{'GFLOPs':>18}{'memory MB':>11}{'training ms':>20}{'inference ms':>20}")
    for name, row in report["forms"].items():
        print(
            f"{name:32}{row['parameters_added'] / 1e6:>9.2f} M {row['parameters_percent']:>5.1f} %"
            f"{row['gflops_added']:>10.3f} {row['flops_percent']:>5.2f} %{row['memory_added_mb']:>11.1f}"
            f"{row['training_ms']:>11.1f} {row['training_percent']:>6.2f} %"
            f"{row['inference_ms']:>11.1f} {row['inference_percent']:>6.2f} %"
        )
    matching = report["matching"]
    print(
        f"matching: {matching['one_to_one_ms']:.1f} ms one-to-one, {matching['quality_aware_ms']:.1f} ms quality-aware"
    )


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/plugin.md."""
    host = report["host"]
    lines = [
        f"| {report['model']}, {report['image_size']} px, batch {report['batch_size']} | parameters | GFLOPs per image | "
        "memory of a step | training step | inference |",
        "|---|---|---|---|---|---|",
        f"| the host without PaQ | {host['parameters'] / 1e6:.1f} M | {host['gflops']:.1f} | {host['memory_mb'] / 1e3:.2f} GB | "
        f"{host['training_ms'] / 1e3:.2f} s | {host['inference_ms'] / 1e3:.2f} s |",
    ]
    lines += [
        f"| {name} | +{row['parameters_added'] / 1e6:.2f} M | +{row['gflops_added']:.2f} ({row['flops_percent']:.2f} %) | "
        f"+{row['memory_added_mb'] / 1e3:.2f} GB | +{row['training_ms']:.0f} ms (**{row['training_percent']:.2f} %**) | "
        f"+{row['inference_ms']:.0f} ms (**{row['inference_percent']:.2f} %**) |"
        for name, row in report["forms"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
