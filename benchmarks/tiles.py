"""What tiles gain: AP of a trained model on scenes pasted together two by two, without tiles and with tiles of a scene's side.

    OMP_NUM_THREADS=1 python benchmarks/tiles.py runs/mine --data data/digits --json docs/results/tiles.json

A large picture is shrunk to the model's input, so that its objects are half as large as those in training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import provenance
from PIL import Image

import paqdetr
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.runtime import Tiles


def paste(split: DetectionDataset, output: Path) -> Path:
    """A data set whose val split has every four images of a split as one, two by two; all are of one size."""
    truth = split.ground_truth()
    order = [image["id"] for image in truth["images"]]
    width, height = truth["images"][0]["width"], truth["images"][0]["height"]
    pasted: dict[str, Any] = {"images": [], "annotations": [], "categories": truth["categories"]}
    (output / "val").mkdir(parents=True)
    for first in range(0, len(order) - 3, 4):
        canvas, name = Image.new("RGB", (2 * width, 2 * height)), f"{first:06d}.png"
        for part in range(4):
            left, top = part % 2 * width, part // 2 * height
            canvas.paste(split.image(first + part), (left, top))
            for box in truth["annotations"]:
                if box["image_id"] == order[first + part]:
                    x, y, *sides = box["bbox"]
                    number = len(pasted["annotations"]) + 1
                    pasted["annotations"].append(
                        {**box, "id": number, "image_id": first + 1, "bbox": [x + left, y + top, *sides]}
                    )
        canvas.save(output / "val" / name)
        pasted["images"].append({"id": first + 1, "file_name": name, "width": 2 * width, "height": 2 * height})
    (output / "val.json").write_text(json.dumps(pasted), encoding="utf-8")
    return output


def measure(model: Any, split: DetectionDataset, folder: Path) -> dict[str, Any]:
    """AP of the scenes alone, and of those pasted together without and with tiles."""
    data, side = paste(split, folder), split.ground_truth()["images"][0]["width"]
    cases = {"without tiles": None, "tiles": Tiles(side), "tiles and whole": Tiles(side, with_whole=True)}
    found = {name: paqdetr.evaluate(model, data=data, tiles=tiles) for name, tiles in cases.items()}
    return {
        "tile": side,
        "images": len(split) // 4,
        **{
            name: {key: round(getattr(done.figures, key), 4) for key in ("AP", "AP50", "APs", "APm", "APl")}
            for name, done in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run's folder, a .safetensors file or an exported model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, split = paqdetr.load(arguments.model), open_split(arguments.data, "val")
    content = provenance(threads=1, seed=0, packages=("paqdetr", "torch"))
    alone = paqdetr.evaluate(model, data=arguments.data).figures
    with tempfile.TemporaryDirectory() as folder:
        content |= {"model": model.name, "scenes alone": round(alone.AP, 4), **measure(model, split, Path(folder))}
    print(json.dumps(content, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
