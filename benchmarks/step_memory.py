"""Holds the memory that `paqdetr plan` and `--auto-batch` estimate on a CPU against the peak of real processes.

python benchmarks/step_memory.py --data data/digits-small --json memory.json [--size 320] [--batches 1 4 8]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

MEASURE = """
import resource, sys
import psutil
import torch
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.engine.memory import batch_loss, worst_batch
from paqdetr.engine.setup import with_classes
from paqdetr.models.zoo import build_model
import paqdetr.engine.train

model_name, data, size, batch_size = sys.argv[1:]
split = open_split(data, "train")
config = with_classes(load_config(model_name, {"image_size": int(size)}), split)
torch.manual_seed(0)
torch.set_num_threads(1)
before = psutil.Process().memory_info().rss
if int(batch_size):
    model, average = (build_model(config, classes=split.classes).train() for _ in range(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        batch_loss(model, config, worst_batch(config, split, model.preprocessing, int(batch_size))).backward()
        optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="paq_dino_nano")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()

    import torch

    from paqdetr.config import load_config
    from paqdetr.data.dataset import open_split
    from paqdetr.engine.environment import machine
    from paqdetr.engine.memory import step_memory
    from paqdetr.engine.setup import with_classes

    split = open_split(options.data, "train")
    config = with_classes(load_config(options.model, {"image_size": options.size}), split)
    memory = step_memory(config, split)
    rows = []
    for batch_size in options.batches:
        command = [
            sys.executable,
            "-c",
            MEASURE,
            options.model,
            options.data,
            str(options.size),
            str(batch_size),
        ]
        measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        estimated = memory.total(batch_size)
        rows.append({"batch_size": batch_size, "estimated": estimated, "measured": measured})
        print(
            f"batch {batch_size}: estimated {estimated / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB"
        )
    content = {
        "model": options.model,
        "image_size": options.size,
        "rows": rows,
        "torch": torch.__version__,
        "machine": machine(),
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
