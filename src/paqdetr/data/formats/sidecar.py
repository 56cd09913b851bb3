"""What Pascal VOC and YOLO cannot say, in one file beside them, so that a conversion loses nothing.

`paqdetr.json` holds category ids and their order, image ids and their order, areas, and (for YOLO) crowds. Other programs
do not look at it; a folder without it is read as any other: classes numbered in order, file names as image ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.data.annotations import Annotations, Issues, is_box, is_coordinate, is_integer, shorten
from paqdetr.errors import DataError
from paqdetr.files import load_json
from paqdetr.structures import ClassTable

SIDECAR = "paqdetr.json"

_REMEDY = f"Convert the data again, or remove {SIDECAR}: the folder is then read by its own files alone."


@dataclass(slots=True)
class Sidecar:
    """The side file's part on one split.

    Attributes:
        file: where it lies, None if there is none.
        categories: of the whole data set, in order; None if there is no file.
        images: what is said of every image, by file name, in order.
    """

    file: Path | None = None
    categories: ClassTable | None = None
    images: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path, split: str, issues: Issues) -> Sidecar:
        """The part on a split; an empty one if there is no file or, while issues are collected, a broken one.

        Raises:
            DataError: it is malformed.
        """
        path = root / SIDECAR
        if not path.is_file():
            return cls()
        try:
            return cls._parse(path, load_json(path), split)
        except DataError as error:
            issues.unreadable(path, error)
            return cls()

    @classmethod
    def _parse(cls, path: Path, content: dict[str, Any], split: str) -> Sidecar:
        categories = content.get("categories")
        known = isinstance(categories, list) and all(
            isinstance(c, dict) and is_integer(c.get("id")) and isinstance(c.get("name"), str)
            for c in categories
        )
        splits = content.get("splits")
        part = splits.get(split, []) if isinstance(splits, dict) else None
        if not known or not categories or not isinstance(part, list):
            raise DataError(f"{path}: has no list of `categories` or no `splits`", _REMEDY)
        images = {}
        for position, image in enumerate(part):
            named = isinstance(image, dict) and isinstance(image.get("file_name"), str)
            if not named or not (is_integer(image.get("id")) or isinstance(image.get("id"), str)):
                raise DataError(
                    f"{path}: {split}[{position}] is {shorten(image)}, expected file_name and id", _REMEDY
                )
            images[image["file_name"]] = image
        ids = [image["id"] for image in images.values()]
        if len(set(ids)) < len(ids):
            raise DataError(f"{path}: two images of {split} have the same id", _REMEDY)
        return cls(path, ClassTable.from_categories(categories), images)

    def with_ids(self, classes: ClassTable, source: Path) -> ClassTable:
        """The classes with their original ids.

        Raises:
            DataError: they are other classes than those of `source`.
        """
        if self.categories is None:
            return classes
        if self.categories.names != classes.names:
            raise DataError(
                f"{self.file}: has the classes {shorten(self.categories.names)}, {source} has {shorten(classes.names)}",
                _REMEDY,
            )
        return self.categories

    def ordered(self, names: list[str]) -> list[str]:
        """File names in their original order; those the side file does not know come last."""
        order = {name: number for number, name in enumerate(self.images)}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    def image_id(self, name: str) -> int | str:
        """The image's original id, or its file name."""
        return self.images[name]["id"] if name in self.images else name

    def areas(self, name: str, count: int, label_file: Path, issues: Issues) -> list[float | None]:
        """Areas of the image's `count` boxes, None where the box's own is meant.

        Raises:
            DataError: it has other areas than the label file has boxes.
        """
        areas = self.images.get(name, {}).get("areas")
        if areas is None:
            return [None] * count
        if not isinstance(areas, list) or not all(a is None or is_coordinate(a) for a in areas):
            issues.error(self.file or name, f"areas of {name}: {shorten(areas)}, expected numbers", _REMEDY)
        elif len(areas) != count:
            issues.error(
                label_file,
                f"has {count} boxes, {self.file} was written when there were {len(areas)}",
                _REMEDY,
            )
        else:
            return areas
        return [None] * count

    def crowds(self, name: str, num_classes: int) -> list[tuple[int, list[float], float | None]]:
        """(class index, box, area) of the image's crowds.

        Raises:
            DataError: one is malformed.
        """
        found = []
        crowds = self.images.get(name, {}).get("crowds", [])
        for crowd in crowds if isinstance(crowds, list) else [crowds]:
            label, box, area = (
                (crowd.get("label"), crowd.get("bbox"), crowd.get("area"))
                if isinstance(crowd, dict)
                else (None,) * 3
            )
            if not is_integer(label) or not 0 <= label < num_classes or not is_box(box):
                raise DataError(
                    f"{self.file}: crowd of {name}: {shorten(crowd)}, expected label and bbox", _REMEDY
                )
            found.append((label, box, area if is_coordinate(area) else None))
        return found

    @staticmethod
    def of(annotations: Annotations, *, crowds: bool) -> list[dict[str, Any]]:
        """What the side file says of a split; `crowds`: whether the format has no place for them."""
        images = []
        for index, (own, name) in enumerate(zip(annotations.image_ids, annotations.file_names, strict=True)):
            rows = np.arange(annotations.starts[index], annotations.starts[index + 1])
            image: dict[str, Any] = {"file_name": name, "id": own}
            apart = rows[annotations.crowd[rows]] if crowds else rows[:0]
            areas = [_area(annotations, row) for row in rows if row not in apart]
            if any(area is not None for area in areas):
                image["areas"] = areas
            if len(apart):
                image["crowds"] = [
                    {
                        "label": int(annotations.labels[row]),
                        "bbox": annotations.boxes[row].tolist(),
                        "area": _area(annotations, row),
                    }
                    for row in apart
                ]
            images.append(image)
        return images

    @staticmethod
    def document(classes: ClassTable, splits: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The whole side file."""
        categories = [{"id": own, "name": name} for own, name in zip(classes.ids, classes.names, strict=True)]
        return {
            "about": "written by paqdetr: what this format cannot say",
            "categories": categories,
            "splits": dict(splits),
        }


def _area(annotations: Annotations, row: int) -> float | None:
    area = float(annotations.areas[row])
    return None if np.isnan(area) else area
