"""Writes the tables of docs/performance.md from the files in docs/results/performance.

python tools/performance_tables.py

A table stands in the page between `<!-- NAME -->` and `<!-- end of NAME -->` and is written by a function of TABLES from
docs/results/performance/NAME.json. A new benchmark is a json, a function, and two such lines in the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "performance.md"
RESULTS = REPO / "docs" / "results" / "performance"

Report = dict[str, Any]


def attention(report: Report) -> str:
    """Back ends against the reference, and against what the machine can do."""
    fast = next(name for name in report["cases"][0]["forward"] if name != "reference")
    speed = [["shape", "forward, reference", fast, "ratio", "forward + backward, reference", fast, "ratio"]]
    speed[0] += ["kept for backward, reference", fast]
    limits = [["shape", fast, "all rows in the first cache", "share", "copying", "rows read, GB/s", "GFLOP/s"]]
    for case in report["cases"]:
        forward, both, saved = case["forward"], case["forward_backward"], case["saved_bytes"]
        name = f"{case['part']} {case['image']}, {case['queries']:,} queries"
        kept = [f"{saved[key] / 1e6:.0f} MB" for key in ("reference", fast)]
        speed.append([name, *_times(forward, fast), *_times(both, fast), *kept])
        own = forward[fast]["median_ms"]
        core, copying = (case["limits"][key]["median_ms"] for key in ("core", "memory"))
        rates = [f"{case[key] / own / 1e6:.0f}" for key in ("row_bytes", "flops")]
        limits.append([name, _number(own), _number(core), f"{core / own:.0%}", _number(copying), *rates])
    first = report["first_call_seconds"]
    return "\n\n".join(
        [
            _made_by(report),
            _table(speed),
            "How far the forward pass is from what the machine could do:",
            _table(limits),
            f"First call of a process, import of {fast} included: {first['empty_cache_forward']:.1f} s forward and "
            f"{first['empty_cache_forward_backward']:.1f} s forward + backward with an empty cache, "
            f"{first['cached_forward']:.1f} s and {first['cached_forward_backward']:.1f} s later.",
        ]
    )


def whole_model(report: Report) -> str:
    """Inference, training step and memory against transformers."""
    inference, training = report["inference"], report["training_step"]
    theirs, ours = report["saved_bytes"]["transformers"], report["saved_bytes"]["paqdetr"]
    height, width = report["image"]
    rows = [["", "transformers", "paqdetr", "ratio"]]
    for name, compared in (
        (f"inference, 1 image of {height}x{width}", inference),
        (f"training step, {report['batch']} images", training),
    ):
        times = [_number(compared[key]["median_ms"]) for key in ("transformers", "paqdetr")]
        rows.append([name, *times, f"**{compared['paqdetr']['ratio']:.2f}x**"])
    rows.append(
        ["kept for backward in that step", f"{theirs / 1e6:.0f} MB", f"{ours / 1e6:.0f} MB", f"{ours / theirs:.2f}"]
    )
    share = report["attention_share_of_transformers_inference"]
    return "\n\n".join(
        [
            _made_by(report),
            _table(rows),
            f"Form: {report['form']}. Outputs differ by at most {report['largest_difference_of_outputs']:.0e}. "
            f"Sampling takes {share:.0%} of transformers' inference here, so that an attention without any cost would make it "
            f"{report['limit']:.2f} times as fast: Amdahl's limit.",
        ]
    )


def nano_throughput(report: Report) -> str:
    """A training step of the nano now and at the first slice."""
    rows = [["image size", "CPU, before", "now", "ratio", "clock, before", "now", "ratio"]]
    for size, found in report["sizes"].items():
        row = [size]
        for clock in ("cpu", "wall"):
            times = found[clock]
            row += [*(_number(times[key]) for key in ("before_ms", "now_ms")), f"**{times['ratio']:.2f}x**"]
        rows.append(row)
    commits = report["commits"]
    text = f"{report['model']}, batches of {report['batch_size']}; before: commit {commits['before']}, now: {commits['now']}."
    return "\n\n".join([_made_by(report), _table(rows), text])


def matching(report: Report) -> str:
    """Assigners by the number of boxes."""
    names = [name for name in report["cases"][0]["times"] if name != "plain loop"]
    rows = [["boxes an image", "plain loop", *(heading for name in names for heading in (name, "ratio"))]]
    for case in report["cases"]:
        times = case["times"]
        row = [str(case["boxes"]), _number(times["plain loop"]["median_ms"])]
        for name in names:
            row += [_number(times[name]["median_ms"]), f"**{times[name]['ratio']:.2f}x**"]
        rows.append(row)
    text = f"{report['layers']} layers, {report['images']} images, {report['queries']} queries."
    return "\n\n".join([_made_by(report), _table(rows), text])


def evaluation(report: Report) -> str:
    """COCO figures against pycocotools, and against inference."""
    times, one = report["times"], report["inference_of_one_image"]["median_ms"]
    rows = [["", "pycocotools", "paqdetr", "ratio", "inference of these images by the nano"]]
    figures = [_number(times[name]["median_ms"]) for name in ("pycocotools", "paqdetr")]
    images, ratio = report["images"], f"**{times['paqdetr']['ratio']:.1f}x**"
    rows.append(
        [f"{images} images, {report['detections']:,} detections", *figures, ratio, f"**{_number(one * images)}**"]
    )
    return "\n\n".join([_made_by(report), _table(rows)])


def loading(report: Report) -> str:
    """Images a second of each loader."""
    rows = [["loader", "images a second", "ratio"]]
    for name, rate in report["images_per_second"].items():
        rows.append([name, f"{rate:.0f}", f"**{report['times'][name]['ratio']:.2f}x**"])
    (height, width), (to_height, to_width) = report["first_image"], report["first_batch"]
    text = f"{report['images']} images of {height}x{width}, scaled to {to_height}x{to_width}; batches of {report['batch_size']}."
    return "\n\n".join([_made_by(report), _table(rows), text])


def variants(report: Report) -> str:
    """Variants of a model against the first of them: how much longer they take, and what they keep."""
    first = next(iter(report["inference"]))
    rows = [["", "inference", "times", "training step", "times", "kept for backward", "times"]]
    for name, kept in report["saved_bytes"].items():
        row = [f"`{name}`"]
        for part in ("inference", "training_step"):
            times = report[part][name]
            row += [_number(times["median_ms"]), f"**{1 / times['ratio']:.2f}**"]
        rows.append([*row, f"{kept / 1e6:.0f} MB", f"**{kept / report['saved_bytes'][first]:.2f}**"])
    size = report["image_size"]
    text = (
        f"{size}x{size} pixels, one image in inference, {report['batch_size']} in a step, {report['boxes']} boxes each."
    )
    return "\n\n".join([_made_by(report), _table(rows), text])


def compiling(report: Report) -> str:
    """Eager forms against compiled ones."""
    rows = [["", "form", "time", "ratio", "first calls, s of CPU", "graph breaks", "difference"]]
    for part in (name for name in ("inference", "training") if name in report):
        for name, times in report[part]["times"].items():
            row = [part, name, _number(times["median_ms"]), f"**{times['ratio']:.2f}x**"]
            made = report[part]["compiled"].get(name)
            rest = ["", "", ""]
            if made:
                rest = [f"{made['first_calls_cpu_seconds']:.0f}", str(made["graph_breaks"])]
                difference = made["relative_difference"]
                rest.append(f"{difference:.0e}" if difference else "0")
            rows.append(row + rest)
    size = report["image_size"]
    text = f"{report['model']}, {size}x{size} pixels: one image in inference, {report['batch_size']} in training."
    return "\n\n".join([_made_by(report), _table(rows), text])


def operators(report: Report) -> str:
    """Operators of the package against torch's."""
    rows = [["", "torch", "paqdetr", "ratio"]]
    for name, times in report["cases"].items():
        figures = [_number(times[key]["median_ms"]) for key in ("torch", "paqdetr")]
        rows.append([name, *figures, f"**{times['paqdetr']['ratio']:.1f}x**"])
    return "\n\n".join([_made_by(report), _table(rows)])


TABLES: dict[str, Callable[[Report], str]] = {
    "deform_attn": attention,
    "deform_attn_one_thread": attention,
    "whole_model": whole_model,
    "nano_throughput": nano_throughput,
    "operators": operators,
    "paq_whole": variants,
    "checkpointing": variants,
    "compile_backbone": compiling,
    "compile_inference": compiling,
    "matching": matching,
    "loading": loading,
    "evaluation": evaluation,
}


def write(page: str) -> str:
    """The page with every table made anew.

    Raises:
        SystemExit: a table's place is missing in the page, or its json in the folder.
    """
    for name, table in TABLES.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            raise SystemExit(f"{file.relative_to(REPO)} is missing: run the benchmark that writes it")
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{PAGE.relative_to(REPO)} has no place for {name}: no {start} ... {end}")
        content = table(json.loads(file.read_text(encoding="utf-8")))
        page = pattern.sub(lambda _, text=f"{start}\n{content}\n{end}": text, page)
    return page


def _made_by(report: Report) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    threads = "1 thread" if report["threads"] == 1 else f"{report['threads']} threads"
    clock = {"wall": "time on the clock", "cpu": "time the process was given"}[report.get("clock", "wall")]
    command = [f"{name}={value}" for name, value in report["environment"].items()] + [report["command"]]
    load = report["load_average_before"]
    parts = [
        f"`{' '.join(command)}`: {threads} of {report['cores']} cores, {report['processor']}",
        f"{report['system']}, Python {report['python']}, {versions}",
        f"seed {report['seed']}. Medians of {report['rounds']} rounds, milliseconds, {clock}.",
    ]
    return ", ".join(parts) + (f" Load average before it: {load[0]:.1f}." if load else "")


def _times(compared: Report, name: str) -> list[str]:
    reference, own = compared["reference"], compared[name]
    return [_number(reference["median_ms"]), _number(own["median_ms"]), f"**{own['ratio']:.1f}x**"]


def _number(x: float) -> str:
    """Three digits that say something."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the page."""
    PAGE.write_text(write(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(TABLES)} tables written", file=sys.stderr)


if __name__ == "__main__":
    main()
