"""Memory of the training loader's processes, epoch by epoch, on synthetic annotations.

    python benchmarks/loader_memory.py --records 20000 --workers 4 --epochs 3 --json loader_memory.json

Images are one constant picture of 32 pixels, so that what grows is annotations alone. `--records-as objects` keeps them as
Python lists and dicts instead, as many data sets do, to show what the flat arrays are for: a forked worker that reads a
Python object writes to its reference count, and the page it lies on is copied.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from paqdetr._version import __version__
from paqdetr.config import load_config
from paqdetr.data.annotations import Builder
from paqdetr.data.augment import Augment
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import ImageLoader, TrainingImages, training_loader
from paqdetr.preprocessing import Normalization, Preprocessing
from paqdetr.structures import ClassTable

SIDE = 32
PREPROCESSING = Preprocessing(SIDE, 32, Normalization(mean=(127.0,) * 3, std=(128.0,) * 3))


class Constant(TrainingImages):
    """Everything but the decoding."""

    _picture = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)

    def _pixels(self, index: int) -> torch.Tensor:
        self.split.path(index)  # what a decoder would be given
        return self._picture


class OfObjects(DetectionDataset):
    """The same records as lists of dicts of numbers."""

    def keep_objects(self) -> None:
        self.rows: list[list[dict[str, Any]]] = [
            [
                {"bbox": box.tolist(), "category": int(label)}
                for box, label in zip(super(OfObjects, self).boxes(i), super(OfObjects, self).labels(i), strict=True)
            ]
            for i in range(len(self))
        ]

    def boxes(self, index: int) -> np.ndarray:
        return np.array([row["bbox"] for row in self.rows[index]], dtype=np.float32).reshape(-1, 4)

    def labels(self, index: int) -> np.ndarray:
        return np.array([row["category"] for row in self.rows[index]], dtype=np.int64)


def synthetic(records: int, boxes: int, seed: int) -> Builder:
    """`boxes` an image on average."""
    rng = np.random.default_rng(seed)
    builder = Builder()
    for number in range(records):
        image = builder.add_image(number, f"folder/{number:012d}.jpg", height=SIDE, width=SIDE)
        for _ in range(rng.poisson(boxes)):
            x, y = rng.uniform(0, SIDE - 8, 2)
            builder.add_box(image, int(rng.integers(80)), [x, y, *rng.uniform(2, 8, 2)])
    return builder


def memory(process: psutil.Process) -> float:
    """MiB that belong to a process alone.

    Not its share of common pages: libraries are shared with processes that have nothing to do with this one, and come and go.
    """
    return round(process.memory_full_info().uss / 2**20, 2)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the epochs and measures after each."""
    torch.set_num_threads(1)
    classes = ClassTable.numbered(80)
    built = synthetic(arguments.records, arguments.boxes, arguments.seed).build(
        source=Path("synthetic"), image_dir=Path("synthetic"), classes=classes
    )
    kind = OfObjects if arguments.records_as == "objects" else DetectionDataset
    split = kind(built, name="train")
    if isinstance(split, OfObjects):
        split.keep_objects()
    config = load_config("paq_dino_nano", {"batch_size": 16, "image_size": SIDE, "augment.scale": [1, 1]})
    images = Constant(split=split, augment=Augment(config.augment, PREPROCESSING), cache_gib=0)
    _, batches = training_loader(config, split, PREPROCESSING)
    loader = ImageLoader(images, batches, workers=arguments.workers)
    known = {child.pid for child in psutil.Process().children(recursive=True)}
    epochs = []
    for batches.epoch in range(arguments.epochs):
        started = time.perf_counter()
        count = sum(len(batch.targets) for batch in loader)
        workers = [p for p in psutil.Process().children(recursive=True) if p.pid not in known]
        workers = [p for p in workers if "resource_tracker" not in " ".join(p.cmdline())]
        each = [memory(process) for process in workers]
        epochs.append(
            {
                "epoch": batches.epoch,
                "images": count,
                "seconds": round(time.perf_counter() - started, 1),
                "workers": each,
                "of_workers": round(sum(each), 1),
                "of_all": round(sum(each) + memory(psutil.Process()), 1),
            }
        )
        print({key: value for key, value in epochs[-1].items() if key != "workers"}, flush=True)
    first, last = epochs[0], epochs[-1]
    return {
        "settings": vars(arguments) | {"json": None},
        "versions": {
            "paqdetr": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "boxes": len(built.boxes),
        "epochs": epochs,
        "growth_of_workers": round(last["of_workers"] / first["of_workers"] - 1, 4),
        "growth_of_all": round(last["of_all"] / first["of_all"] - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--boxes", type=int, default=8, help="an image, on average")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--records-as", choices=["arrays", "objects"], default="arrays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = measure(arguments)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    own, everything = found["growth_of_workers"], found["growth_of_all"]
    print(f"growth from the first epoch to the last: workers' own {own:+.1%}, all {everything:+.1%}")


if __name__ == "__main__":
    main()
