"""What it costs a training that idle threads of torch look out for work before they sleep, beside other programs.

python benchmarks/idle_threads.py --data data/digits-small --busy 2 --json idle_threads.json

One training of the nano for each setting of GOMP_SPINCOUNT, which take steps in turns, while `--busy` processes compute something
else. 300000 is what GNU OpenMP does if nobody says anything, 10000 what `import paqdetr` sets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import compare, provenance
from nano_throughput import HERE, Side

GNU = "300000"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--counts", nargs="+", default=["10000", "1000", "0"])
    parser.add_argument("--model", default="paq_dino_nano")
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = provenance(threads=arguments.threads, seed=0, packages=("paqdetr", "torch", "numba"))
    report["command"] = report["command"].replace(str(arguments.data), arguments.data.name)
    counts = [GNU, *arguments.counts]
    settings = {"image_size": arguments.image_size, "augment.scale": [1.0, 1.0], "epochs": 100, "workers": 0}
    sides = {
        count: Side(
            HERE.parent, settings, arguments, GOMP_SPINCOUNT=count, OMP_NUM_THREADS=str(arguments.threads)
        )
        for count in counts
    }
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        for side in sides.values():
            assert side.settings  # all are ready
        wall: dict[str, list[float]] = {count: [] for count in counts}
        cpu: dict[str, list[float]] = {count: [] for count in counts}
        for number in range(arguments.warmup + arguments.rounds):
            for count, side in sides.items():
                step = side.step()
                if number >= arguments.warmup:
                    wall[count].append(step["wall"])
                    cpu[count].append(step["cpu"])
    finally:
        for other in others:
            other.kill()
        for side in sides.values():
            side.end()
    report |= {
        "model": arguments.model,
        "image_size": arguments.image_size,
        "busy": arguments.busy,
        "rounds": arguments.rounds,
        "wall": compare(wall, against=GNU),
        "cpu": compare(cpu, against=GNU),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
