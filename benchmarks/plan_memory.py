"""What `paqdetr plan` says of memory and time, beside what the training then takes.

    python benchmarks/plan_memory.py --data digits --json docs/results/plan_memory.json

Each case is planned, and then trained for `--steps` steps by `paqdetr train` in a process of its own, whose peak its run reports.
`--cases 0 2` runs some of them; the others stay in the file as they are. Cases without evaluation train on a copy of the data
without its val split.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import provenance

from paqdetr.config import load_config
from paqdetr.runs import Run
from paqdetr.training.plan import plan_training
from paqdetr.training.setup import open_splits, with_classes

# model, image size, batch size, whether there is a val split, processes that load images
CASES = (
    ("dino_nano", 192, 2, True, 0),
    ("paq_dino_nano", 256, 4, True, 0),
    ("deformable_detr_nano", 320, 8, True, 0),
    ("dino_nano", 320, 4, False, 0),
    ("paq_dino_nano", 192, 8, False, 2),
)


def measure(case: tuple[str, int, int, bool, int], data: Path, steps: int) -> dict[str, Any]:
    """A row of the table."""
    model, size, batch, evaluated, workers = case
    settings = {"image_size": size, "batch_size": batch, "workers": workers, "max_steps": steps, "eval_every": 100}
    with tempfile.TemporaryDirectory() as folder:
        if not evaluated:
            data = Path(shutil.copytree(data, Path(folder) / "data"))
            for path in data.glob("val*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        config = load_config(model, settings)
        train_split, val_split = open_splits(data, config)
        plan = plan_training(with_classes(config, train_split), train_split, val_split, device="cpu")
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "paqdetr", "train", model, *words, "--data", str(data)]
        subprocess.run([*command, "--output", f"{folder}/run", "--device", "cpu"], check=True, capture_output=True)
        (finished,) = Run(Path(folder) / "run").records("finished")
    peak = finished["peak_memory_gib"]
    return {
        "model": model,
        **settings,
        "images": len(train_split),
        "evaluated_images": 0 if val_split is None else len(val_split),
        "planned": plan.memory,
        "peak_memory_gib": peak,
        "off_by": round(plan.memory["peak"] / peak - 1, 4),
        "planned_step_seconds": plan.step_seconds,
        "step_seconds": round(finished["seconds"] / steps, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="digits of `paqdetr data make digits`")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    chosen = parser.parse_args()
    packages = ("paqdetr", "torch", "torchvision", "numba", "timm", "hotcoco")
    content: dict[str, Any] = json.loads(chosen.json.read_text()) if chosen.json.exists() else {"rows": {}}
    for number in chosen.cases:
        row = measure(CASES[number], chosen.data, chosen.steps)
        print(f"{number}: planned {row['planned']['peak']:.2f} GiB, took {row['peak_memory_gib']:.2f}", flush=True)
        made = provenance(threads=1, seed=0, packages=packages)
        row = {"command": made.pop("command")} | row
        content = content | made | {"rows": content["rows"] | {str(number): row}}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
