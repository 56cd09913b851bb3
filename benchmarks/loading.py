"""Images a second of the training loader, with and without its cache, against torchvision's COCO data set and transforms.

python benchmarks/loading.py --data data/digits-small --json loading.json

All read the same images in the same order in this process and scale them to the same size, without other changes; nothing is
timed unless pixels and boxes are equal. The last case adds what the recipe changes at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import compare, interleave, provenance
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from paqdetr.config import Config, load_config
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.data.loader import training_loader
from paqdetr.models.zoo import build_model
from paqdetr.preprocessing import Preprocessing

PLAIN = {"augment.crop": 0.0, "augment.flip": 0.0, "augment.color": 0.0, "augment.mosaic": 0.0}
PEER = "torchvision"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, type=Path, help="with train.json and train/, as `paqdetr data digits` writes"
    )
    parser.add_argument("--model", default="dino_nano")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = provenance(threads=1, seed=0, packages=("paqdetr", "torch", "torchvision", "pillow", "pycocotools"))
    report |= {"clock": "cpu", "rounds": arguments.rounds, "image_size": arguments.image_size}
    report |= measure(arguments)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All loaders in turns."""
    if "train" not in available_splits(arguments.data):
        raise SystemExit(f"{arguments.data}: has no train split")
    split = open_split(arguments.data, "train")
    base = {"image_size": arguments.image_size, "augment.scale": [1.0, 1.0], "workers": 0, "cache_images": 0}
    config = load_config(arguments.model, base | PLAIN)
    preprocessing = build_model(config, pretrained_backbone=False).preprocessing
    forms = {
        "paqdetr": config,
        "paqdetr, cached": load_config(arguments.model, base | PLAIN | {"cache_images": 2}),
        "paqdetr, cached, all changes of the recipe": load_config(arguments.model, base | {"cache_images": 2}),
    }
    loaders = {PEER: peer(config, split, preprocessing, arguments)}
    for name, form in forms.items():
        loaders[name] = training_loader(form, split, preprocessing)[0]
    first = {name: next(iter(loader)) for name, loader in loaders.items()}
    images, targets = first[PEER]
    size = tuple(images.shape[2:])
    for name in ("paqdetr", "paqdetr, cached"):
        batch = first[name]
        same = [
            boxes.shape == t.boxes.shape and torch.allclose(boxes, t.boxes, atol=1e-5)
            for boxes, t in zip(targets, batch.targets, strict=True)
        ]
        if not torch.allclose(images, batch.images, atol=1e-4) or not all(same):
            raise SystemExit(f"{name} loads something else than torchvision: nothing is timed")

    def drained(loader: Iterable[Any]) -> Callable[[], None]:
        def call() -> None:
            for _ in itertools.islice(loader, arguments.batches):
                pass

        return call

    cases = {name: drained(loader) for name, loader in loaders.items()}
    times = compare(interleave(cases, rounds=arguments.rounds, warmup=1, clock=time.process_time), against=PEER)
    count = arguments.batches * config.batch_size
    rates = {name: round(1e3 * count / found["median_ms"], 1) for name, found in times.items()}
    height, width = split.sizes[0].tolist()
    return {
        "images": count,
        "batch_size": config.batch_size,
        "first_image": [height, width],
        "first_batch": list(size),
        "images_per_second": rates,
        "times": times,
    }


def peer(config: Config, split: DetectionDataset, preprocessing: Preprocessing, arguments: argparse.Namespace) -> Any:
    """torchvision's data set and transforms under torch's loader, in the order of ours."""
    _, batches = training_loader(config, split, preprocessing)
    order = [key.index for key in itertools.chain.from_iterable(itertools.islice(batches, arguments.batches))]
    height, width = split.sizes[order[0]].tolist()
    if len({tuple(split.sizes[index].tolist()) for index in order}) > 1:
        raise SystemExit("the images differ in size: torchvision's batches would need padding")
    size = preprocessing.target_size(height, width)
    normalization = preprocessing.normalization
    transforms = v2.Compose(
        [
            v2.ToImage(),
            # Boxes of whole numbers would be rounded by the resize.
            v2.ToDtype({tv_tensors.BoundingBoxes: torch.float32, "others": None}),
            v2.Resize(list(size), antialias=True),
            v2.ConvertBoundingBoxFormat("CXCYWH"),
            v2.ToDtype(torch.float32),
            v2.Normalize(list(normalization.mean), list(normalization.std)),
        ]
    )
    annotation_file = arguments.data / "train.json"
    data = CocoDetection(arguments.data / "train", annotation_file, transforms=transforms)
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels"))
    places = {image_id: place for place, image_id in enumerate(data.ids)}
    subset = Subset(data, [places[split.image_ids[index]] for index in order])
    side = torch.tensor([size[1], size[0], size[1], size[0]])

    def collate(samples: list[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.stack([image for image, _ in samples]), [
            target["boxes"].as_subclass(torch.Tensor) / side for _, target in samples
        ]

    return DataLoader(subset, batch_size=config.batch_size, collate_fn=collate)


if __name__ == "__main__":
    main()
