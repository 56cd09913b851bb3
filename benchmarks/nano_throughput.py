"""Training throughput of two commits: what has been won since the first slice.

git worktree add --detach ../first 1900991
python benchmarks/nano_throughput.py --data data/digits-small --against ../first --json nano_throughput.json

Both sides are real trainings of `paqdetr.train`, loading included, in a process each, on the same settings and data. They take
steps in turns: a round is one step of each, the order changes with every round, and the ratio is the median over rounds of the
times of the two. The first steps, in which memory and caches are filled, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import provenance

HERE = Path(__file__).resolve().parent
CLOCKS = ("cpu", "wall")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--against", required=True, type=Path, help="a checkout of the other commit")
    parser.add_argument("--model", default="paq_dino_nano")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[192, 256])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = provenance(
        threads=arguments.threads, seed=0, packages=("paqdetr", "torch", "torchvision", "timm", "numba")
    )
    for folder in (arguments.data, arguments.against):  # where they lie on this machine is nobody's business
        report["command"] = report["command"].replace(str(folder), folder.name)
    checkouts = {"before": arguments.against.resolve(), "now": HERE.parent}
    report |= {
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "commits": {name: commit_of(folder) for name, folder in checkouts.items()},
        "sizes": {},
    }
    for size in arguments.image_sizes:
        report["sizes"][str(size)] = measure(checkouts, size, arguments)
        print(json.dumps(report, indent=1))
        if arguments.json:  # after each size: a run of several takes long
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(checkouts: dict[str, Path], size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of both sides in turns."""
    settings = {
        "image_size": size,
        "augment.scale": [1.0, 1.0],  # all batches of one size, so that medians compare like with like
        "batch_size": arguments.batch_size,
        "epochs": 100,
        "workers": 0,
    }
    # What the command line of that commit set; now the package does it.
    waiting = {"before": {"GOMP_SPINCOUNT": "300000"}, "now": {}}
    sides = {name: Side(folder, settings, arguments, **waiting[name]) for name, folder in checkouts.items()}
    try:
        differing = sorted(differences(*(side.settings for side in sides.values())))
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(arguments.warmup + arguments.rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                step = sides[name].step()
                if number >= arguments.warmup:
                    seconds[name].append(step)
    finally:
        for side in sides.values():
            side.end()
    found: dict[str, Any] = {"settings_that_differ": differing}
    for clock in CLOCKS:
        pairs = [(a[clock], b[clock]) for a, b in zip(seconds["before"], seconds["now"], strict=True)]
        found[clock] = {
            "before_ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
            "now_ms": round(1e3 * statistics.median(b for _, b in pairs), 1),
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        }
    found["peak_gib"] = {name: steps[-1]["peak_gib"] for name, steps in seconds.items()}
    return found


class Side:
    """A training in a process of its own, on the sources of a checkout."""

    def __init__(
        self, checkout: Path, settings: dict[str, Any], arguments: argparse.Namespace, **environment: str
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), **environment}
        command = [
            sys.executable,
            str(HERE / "nano_worker.py"),
            arguments.model,
            str(arguments.data.resolve()),
        ]
        self._process = subprocess.Popen(
            [*command, str(arguments.threads), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._settings: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of model and losses; waits for the training to be ready."""
        if self._settings is None:
            self._settings = self._read()
        return self._settings

    def step(self) -> dict[str, float]:
        """Let it take one."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Let it stop."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"a training ended with code {self._process.wait()}")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that both commits know and do not agree on."""
    found: list[str] = []
    for key in before.keys() & now.keys():
        if isinstance(before[key], dict) and isinstance(now[key], dict):
            found += differences(before[key], now[key], f"{prefix}{key}.")
        elif before[key] != now[key]:
            found.append(f"{prefix}{key}: {before[key]} -> {now[key]}")
    return found


def commit_of(checkout: Path) -> str:
    """Short name of the commit, with a plus where files differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src") else "")


if __name__ == "__main__":
    main()
