"""How long commands take to start: CPU seconds and memory of fresh interpreters, beside `import torch` alone.

    python benchmarks/start_up.py --data data/digits-small --run runs/quickstart --output docs/results/performance/start_up.json

CPU seconds of a machine that others use are too long, all of them alike: compare with those of `import torch` beside them.
Needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import provenance

PAQDETR = [sys.executable, "-m", "paqdetr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set with val")
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    data, run = str(arguments.data.resolve()), str(arguments.run.resolve())
    image = str(min((arguments.data / "val").resolve().iterdir()))
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [*PAQDETR, "--help"],
        "train MISSPELT": [*PAQDETR, "train", "dino_nanoo", "--data", data, "--output", "new"],
        "train, no such data": [*PAQDETR, "train", "dino_nano", "--data", "nowhere", "--output", "new"],
        "train, no such setting": [*PAQDETR, "train", "dino_nano", "--data", data, "--output", "new", "epochz=3"],
        "eval, no such checkpoint": [*PAQDETR, "eval", "missing.safetensors", "--data", data],
        "eval, no such split": [*PAQDETR, "eval", run, "--data", data, "--split", "tset"],
        "predict, no such picture": [*PAQDETR, "predict", run, "missing.jpg", "--output", "new"],
        "data check": [*PAQDETR, "data", "check", data],
        "data stats": [*PAQDETR, "data", "stats", data, "--overwrite"],
        "import paqdetr.metrics": [sys.executable, "-c", "import paqdetr.metrics"],
        "data preview, 12 pictures": [*PAQDETR, "data", "preview", data, "--overwrite"],
        "predict, one picture": [*PAQDETR, "predict", run, image, "--output", "found"],
    }
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                mistaken = "MISSPELT" in name or "no such" in name
                rows[name].append(measure(command, folder, 2 if mistaken else 0))
    found = {
        name: {"cpu_s": round(statistics.median(cpu for cpu, _ in each), 2), "gib": round(max(g for _, g in each), 2)}
        for name, each in rows.items()
    }
    for name, row in found.items():
        print(f"{name:28} {row['cpu_s']:6.2f} s {row['gib']:6.2f} GiB")
    made = provenance(threads=os.cpu_count() or 1, seed=0, packages=("torch", "torchvision", "timm", "numba"))
    content = {**made, "rounds": arguments.rounds, "load": os.getloadavg()[0], "commands": found}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(command: list[str], folder: str, code: int) -> tuple[float, float]:
    """CPU seconds and the most memory, in GiB, of a command that has to end with this exit code."""
    null = subprocess.DEVNULL
    child = subprocess.Popen(command, cwd=folder, stdin=null, stdout=null, stderr=null)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == code, (command, child.returncode)
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return used.ru_utime + used.ru_stime, used.ru_maxrss / unit


if __name__ == "__main__":
    main()
