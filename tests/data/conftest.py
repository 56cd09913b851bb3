"""The same few images in every format, written here by hand: not by the writers that are under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# split -> file name without ending -> (width, height, [(class, x, y, width, height)])
Scene = tuple[int, int, list[tuple[str, float, float, float, float]]]
SCENES: dict[str, dict[str, Scene]] = {
    "train": {
        "a": (32, 24, [("person", 4, 6, 10, 8), ("rider", 20, 2, 8, 8)]),
        "b": (24, 32, [("person", 2, 2, 10, 20)]),
        "c": (32, 24, []),
    },
    "val": {"d": (32, 24, [("rider", 1, 1, 6, 6)])},
}
NAMES = ("person", "rider")


def picture(path: Path, width: int, height: int) -> None:
    """Noise that depends on the name."""
    rng = np.random.default_rng(sum(map(ord, path.stem)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def coco(root: Path) -> None:
    for split, scenes in SCENES.items():
        images, annotations = [], []
        for number, (stem, (width, height, boxes)) in enumerate(scenes.items(), start=1):
            picture(root / split / f"{stem}.png", width, height)
            images.append({"id": number, "file_name": f"{stem}.png", "width": width, "height": height})
            for name, *box in boxes:
                category = NAMES.index(name) + 1
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box}
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(root / f"{split}.json", content)


def voc(root: Path) -> None:
    for split, scenes in SCENES.items():
        for stem, (width, height, boxes) in scenes.items():
            picture(root / "JPEGImages" / f"{stem}.png", width, height)
            objects = "".join(
                f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for name, x, y, w, h in boxes
            )
            size = f"<size><width>{width}</width><height>{height}</height></size>"
            xml = root / "Annotations" / f"{stem}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(f"<annotation>\n{size}\n{objects}</annotation>")
        list_file = root / "ImageSets" / "Main" / f"{split}.txt"
        list_file.parent.mkdir(parents=True, exist_ok=True)
        list_file.write_text("".join(f"{stem}\n" for stem in scenes))


def yolo(root: Path) -> None:
    for split, scenes in SCENES.items():
        for stem, (width, height, boxes) in scenes.items():
            picture(root / "images" / split / f"{stem}.png", width, height)
            if boxes:
                labels = root / "labels" / split / f"{stem}.txt"
                labels.parent.mkdir(parents=True, exist_ok=True)
                labels.write_text(
                    "".join(
                        f"{NAMES.index(name)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
                        for name, x, y, w, h in boxes
                    )
                )
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [person, rider]\n")


def cityscapes(root: Path) -> None:
    for split, scenes in SCENES.items():
        for stem, (width, height, boxes) in scenes.items():
            picture(root / "leftImg8bit" / split / "ulm" / f"{stem}_leftImg8bit.png", width, height)
            objects: list[dict[str, Any]] = [{"label": "road", "polygon": [[0, 0], [9, 9]]}]
            for name, x, y, w, h in boxes:
                polygon = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
                objects.append({"label": name, "polygon": polygon})
            write_json(
                root / "gtFine" / split / "ulm" / f"{stem}_gtFine_polygons.json",
                {"imgHeight": height, "imgWidth": width, "objects": objects},
            )


def crowdhuman(root: Path) -> None:
    for split, scenes in SCENES.items():
        lines = []
        for stem, (width, height, boxes) in scenes.items():
            picture(root / "Images" / f"{stem}.jpg", width, height)
            people = [{"tag": "person", "fbox": list(box), "extra": {"box_id": 0}} for _, *box in boxes]
            lines.append(json.dumps({"ID": stem, "gtboxes": people}))
        (root / f"annotation_{split}.odgt").write_text("\n".join(lines))


FORMATS: dict[str, Callable[[Path], None]] = {
    "coco": coco,
    "voc": voc,
    "yolo": yolo,
    "cityscapes": cityscapes,
    "crowdhuman": crowdhuman,
}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each format with the same images and boxes (CrowdHuman: people only). Not to be changed by a test."""
    roots = {}
    for name, write in FORMATS.items():
        roots[name] = tmp_path_factory.mktemp("tiny") / name
        write(roots[name])
    return roots
