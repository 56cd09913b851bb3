"""Deformable attention: back ends against grid_sample, at the shapes of the encoder and the decoder.

python benchmarks/deform_attn.py --threads 2 --json docs/results/performance/deform_attn.json
python benchmarks/deform_attn.py --threads 1 --clock cpu --json docs/results/performance/deform_attn_one_thread.json
make docs        # writes the tables of docs/performance.md anew

`--clock cpu` counts the time that the process was given, which other work on the machine touches little; with more than one
thread it would count threads that wait for each other too.

Every shape and pass times all back ends in turn, over and over, in one process. Two limits are measured beside them:
- `memory`: copying as many bytes as value, locations, weights and output have together: each crosses the memory bus once;
- `core`: the same kernel with every place in the middle of a level, so that the rows it reads lie in the first cache. What is
  left is arithmetic and loads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads of OpenMP that spin for long take the cores from what runs next.
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
from common import compare, interleave, provenance, summary
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from paqdetr.ops import ms_deform_attn

Shapes = list[tuple[int, int]]
HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)
IMAGES = {"320x320": (320, 320), "640x640": (640, 640), "800x1333": (800, 1333)}
QUERIES = 900  # of the decoder
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["numba"], help="what to hold against the reference")
    parser.add_argument("--images", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu needs --threads 1")
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = provenance(
        threads=arguments.threads, seed=arguments.seed, packages=("paqdetr", "torch", "numba", "llvmlite", "numpy")
    )
    report |= {"heads": HEADS, "channels": CHANNELS, "points": POINTS, "batch": arguments.batch}
    report |= {"dtype": "float32", "clock": arguments.clock, "rounds": arguments.rounds}
    report |= {"first_call_seconds": first_call()}
    report["cases"] = []
    for part in ("encoder", "decoder"):
        for image in arguments.images:
            torch.manual_seed(arguments.seed)
            case = measure(
                part,
                image,
                backends=arguments.backends,
                batch=arguments.batch,
                rounds=arguments.rounds,
                clock=CLOCKS[arguments.clock],
            )
            report["cases"].append(case)
            print(json.dumps(case), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def problem(part: str, image: str, *, batch: int) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    """Value, shapes, locations and weights much as a trained model has them: places some two pixels around each token's own, or
    spread over a box around the centre of each of the decoder's queries."""
    height, width = IMAGES[image]
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, tokens, HEADS, CHANNELS)
    if part == "encoder":
        queries = tokens
        axes = [((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h) for h, w in shapes]
        centers = torch.cat([torch.cartesian_prod(y, x).flip(-1) for x, y in axes])[None, :, None, None, None]
        offsets = torch.randn(batch, queries, HEADS, levels, POINTS, 2) * 2.0 / sizes[:, None]
    else:
        queries = QUERIES
        centers = torch.rand(batch, queries, 1, 1, 1, 2)
        extent = torch.rand(batch, queries, 1, 1, 1, 2) * 0.3
        offsets = (torch.rand(batch, queries, HEADS, levels, POINTS, 2) - 0.5) * extent
    weights = torch.randn(batch, queries, HEADS, levels * POINTS).softmax(-1)
    return value, shapes, centers + offsets, weights.view(batch, queries, HEADS, levels, POINTS)


def measure(
    part: str, image: str, *, backends: list[str], batch: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """One shape: times of forward and of forward + backward, ratios, limits, bytes kept for backward."""
    value, shapes, locations, weights = problem(part, image, batch=batch)
    names = ["reference", *backends]
    gradient = torch.randn(batch, locations.shape[1], HEADS * CHANNELS)
    inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
    middle = torch.full_like(locations, 0.5)

    def forward(backend: Any, at: Tensor = locations) -> Callable[[], object]:
        return lambda: ms_deform_attn(value, shapes, at, weights, backend)

    def both(backend: Any) -> Callable[[], object]:
        def run() -> object:
            found = ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2], backend)
            return torch.autograd.grad(found, inputs, gradient)

        return run

    bytes_once = 4 * (value.numel() + locations.numel() + weights.numel() + gradient.numel())
    source, target = torch.zeros(2, bytes_once // 8)  # half is read, half is written
    limits = {"memory": lambda: target.copy_(source), "core": forward("auto", middle)}
    with torch.no_grad():
        seconds = interleave({name: forward(name) for name in names} | limits, rounds=rounds, clock=clock)
    rows = 4 * weights.numel()  # four corners of every point
    case: dict[str, Any] = {
        "part": part,
        "image": image,
        "shapes": shapes,
        "queries": locations.shape[1],
        "row_bytes": rows * CHANNELS * 4,
        "flops": rows * CHANNELS * 2,
        "bytes_once": bytes_once,
        "limits": {name: summary(seconds.pop(name)) for name in limits},
        "forward": compare(seconds, against="reference"),
    }
    seconds = interleave({name: both(name) for name in names}, rounds=rounds, clock=clock)
    case["forward_backward"] = compare(seconds, against="reference")
    case["saved_bytes"] = {name: saved_bytes(name, inputs, shapes) for name in names}
    return case


def saved_bytes(backend: Any, inputs: list[Tensor], shapes: Shapes) -> int:
    """Bytes of distinct storages that autograd keeps between forward and backward, inputs included."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2], backend)
    return sum(storages.values())


def first_call() -> dict[str, float]:
    """Seconds of the first forward, and of that and the first backward, of a new process, torch being imported: with an empty
    cache, and with what that process has left in it."""
    script = (
        "import time, torch\n"
        "from paqdetr.ops import ms_deform_attn\n"
        "x = [torch.randn(1, 4, 1, 32), torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1)]\n"
        "x = [y.requires_grad_() for y in x]\n"
        "started = time.perf_counter()\n"
        "found = ms_deform_attn(x[0], [(2, 2)], x[1], x[2], 'numba')\n"
        "print(time.perf_counter() - started)\n"
        "found.sum().backward()\n"
        "print(time.perf_counter() - started)\n"
    )
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        for name in ("empty_cache", "cached"):
            command = [sys.executable, "-c", script]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            forward, both = map(float, done.stdout.split())
            result[f"{name}_forward"] = round(forward, 3)
            result[f"{name}_forward_backward"] = round(both, 3)
    return result


if __name__ == "__main__":
    main()
