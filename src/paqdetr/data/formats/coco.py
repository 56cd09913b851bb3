"""COCO: one json of annotations and one folder of images for every split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.data.annotations import (
    Annotations,
    Builder,
    Issues,
    is_box,
    is_integer,
    is_side,
    shorten,
)
from paqdetr.data.files import inner_path, missing_files
from paqdetr.errors import DataError
from paqdetr.files import load_json
from paqdetr.structures import ClassTable


def read_coco(annotation_file: Path, image_dir: Path, issues: Issues) -> Annotations:
    """Reads and verifies an annotation file; images are not opened, only looked for.

    Category ids may have gaps and start anywhere. Texts as category ids become integers: "7" is 7, and where one of them is
    no number, all are numbered from 1 in the order of the file.

    Raises:
        DataError: the file or an entry is malformed or contradicts another, or an image is missing.
    """
    try:
        content = load_json(annotation_file)
    except DataError as error:
        issues.unreadable(annotation_file, error)
        return Builder().build(source=annotation_file, image_dir=image_dir, classes=ClassTable((), ()))
    reader = _Reader(annotation_file, content, issues)
    classes, label_of = reader.classes()
    positions = reader.images(image_dir)
    reader.boxes(label_of, positions)
    return reader.builder.build(source=annotation_file, image_dir=image_dir, classes=classes)


class _Reader:
    def __init__(self, path: Path, content: dict[str, Any], issues: Issues) -> None:
        self.path, self.content, self.issues = path, content, issues
        self.builder = Builder()

    def fail(self, message: str, kind: str = "annotation") -> None:
        self.issues.error(self.path, message, kind=kind)

    def entries(self, key: str, *, may_be_empty: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position, object) of a list in the file."""
        if key not in self.content:
            found = ", ".join(sorted(self.content)[:20]) or "nothing"
            self.fail(f"has no `{key}`, found {found[:200]}", "unreadable file")
            return
        entries = self.content[key]
        if not isinstance(entries, list):
            self.fail(f"`{key}` is a {type(entries).__name__}, expected a list", "unreadable file")
            return
        if not entries and not may_be_empty:
            self.fail(f"`{key}` is empty", "unreadable file")
        for position, entry in enumerate(entries):
            if isinstance(entry, dict):
                yield position, entry
            else:
                self.fail(f"{key}[{position}] is {shorten(entry)}, expected an object")

    def classes(self) -> tuple[ClassTable, dict[int | str, int]]:
        """The class table, and the file's own category ids -> contiguous index."""
        names: dict[int | str, str] = {}
        for position, category in self.entries("categories"):
            own, name = category.get("id"), category.get("name")
            if not (is_integer(own) or isinstance(own, str)) or not (
                isinstance(name, str) or is_integer(name)
            ):
                self.fail(
                    f"categories[{position}] is {shorten(category)}, expected an `id` and a `name`", "class"
                )
            elif own in names:
                self.fail(f"category id {shorten(own)} is given twice", "class")
            else:
                names[own] = str(name)
        if len({type(own) for own in names}) > 1:
            self.fail("some category ids are integers and some are texts, expected one of the two", "class")
            names = {}
        numbers = _numbered(list(names))
        classes = ClassTable.from_categories([{"id": numbers[own], "name": names[own]} for own in names])
        position_of = classes.id_to_index
        return classes, {own: position_of[number] for own, number in numbers.items()}

    def images(self, image_dir: Path) -> dict[int | str, int]:
        """The images' own ids -> positions."""
        positions: dict[int | str, int] = {}
        accepted: list[tuple[int | str, str, int, int]] = []
        seen: set[int | str] = set()
        for position, image in self.entries("images"):
            own, name = image.get("id"), image.get("file_name")
            height, width = image.get("height"), image.get("width")
            if not (is_integer(own) or isinstance(own, str)):
                self.fail(f"images[{position}] has id {shorten(own)}, expected a number or a text")
            elif own in seen:
                self.fail(f"image id {shorten(own)} is given twice")
            elif not isinstance(name, str) or not name:
                self.fail(f"image {shorten(own)} has file_name {shorten(name)}, expected a name")
            elif (plain := inner_path(name)) is None:
                self.issues.error(
                    self.path,
                    f"image {shorten(own)} has file_name {shorten(name)}, which is no name inside {image_dir}",
                    "Give names relative to the folder of the images, without '..'.",
                    kind="path leaves the folder",
                )
            elif not (is_side(height) and is_side(width)):
                self.fail(
                    f"image {shorten(own)} has height {shorten(height)} and width {shorten(width)},"
                    " expected pixels",
                    "image size",
                )
            else:
                accepted.append((own, plain, int(height), int(width)))
            if is_integer(own) or isinstance(own, str):
                seen.add(own)
        missing = self._missing(image_dir, [name for _, name, _, _ in accepted])
        for own, name, height, width in accepted:
            if name not in missing:
                positions[own] = self.builder.add_image(own, name, height=height, width=width)
        self._known = seen  # what is listed, well-formed or not: its boxes are no further mistakes
        return positions

    def _missing(self, image_dir: Path, names: list[str]) -> set[str]:
        """Names of missing images, if issues are collected."""
        missing = missing_files(image_dir, names)
        if missing and not self.issues.collect:
            slashes = " (their names have backslashes)" if "\\" in missing[0] else ""
            raise DataError(
                f"{image_dir / missing[0]}: missing, though {self.path} lists it"
                f" ({len(missing)} of {len(names)} images are missing){slashes}",
                "Put the images there, or correct `file_name`.",
            )
        for name in missing:
            self.issues.error(image_dir / name, f"missing, though {self.path} lists it", kind="missing image")
        return set(missing)

    def boxes(self, label_of: dict[int | str, int], positions: dict[int | str, int]) -> None:
        """Takes the well-formed annotations; the names of what is wrong are made up for the others alone: there are millions."""
        add = self.builder.add_box
        for position, entry in self.entries("annotations", may_be_empty=True):
            owner, category, box, area = (
                entry.get("image_id"),
                entry.get("category_id"),
                entry.get("bbox"),
                entry.get("area"),
            )
            if (
                isinstance(owner, (int, str))
                and owner in self._known
                and isinstance(category, (int, str))
                and category in label_of
                and category is not True
                and category is not False
                and is_box(box)
                and (area is None or _is_area(area))
            ):
                self.builder.masks += bool(entry.get("segmentation"))
                if owner in positions:
                    add(
                        positions[owner], label_of[category], box, crowd=bool(entry.get("iscrowd")), area=area
                    )
            else:
                self.fail(*self._complaint(position, entry, label_of))

    def _complaint(
        self, position: int, entry: dict[str, Any], label_of: dict[int | str, int]
    ) -> tuple[str, str]:
        """What is wrong with an annotation, and the kind of problem."""
        subject = f"annotation {shorten(entry.get('id', [position]))}"
        owner, category, box, area = (entry.get(k) for k in ("image_id", "category_id", "bbox", "area"))
        if not isinstance(owner, (int, str)) or owner not in self._known:
            return f"{subject} belongs to image {shorten(owner)}, which `images` does not list", "annotation"
        subject = f"{subject} of image {shorten(owner)} has"
        if not isinstance(category, (int, str)) or isinstance(category, bool) or category not in label_of:
            message = f"{subject} category_id {shorten(category)}, which `categories` does not list"
            return message, "unknown class"
        if not is_box(box):
            message = f"{subject} bbox {shorten(box)}, expected four finite numbers [x, y, w, h]"
            return message, "malformed box"
        return f"{subject} area {shorten(area)}, expected a number", "malformed box"


def _is_area(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e18 < value < 1e18


def _numbered(own: list[int | str]) -> dict[int | str, int]:
    """Category ids of a file -> integers; integers stay as they are."""
    texts = [value for value in own if isinstance(value, str)]
    if not texts:
        return {value: value for value in own if isinstance(value, int)}
    numbers = [int(text) for text in texts if text.isascii() and text.isdigit() and len(text) < 16]
    if len(set(numbers)) < len(texts):
        numbers = list(range(1, len(texts) + 1))
    return dict(zip(texts, numbers, strict=True))


def to_coco(annotations: Annotations) -> dict[str, Any]:
    """The split as a COCO json: every box as it was read, crowds too; annotations are numbered from 1.

    Where the format gives no area, it is that of the box.
    """
    a = annotations
    areas = np.where(np.isnan(a.areas), a.boxes[:, 2] * a.boxes[:, 3], a.areas)
    ids, category_ids = list(a.image_ids), a.classes.ids
    rows = zip(
        a.owners.tolist(), a.labels.tolist(), a.boxes.tolist(), a.crowd.tolist(), areas.tolist(), strict=True
    )
    return {
        "images": [
            {"id": own, "file_name": name, "width": width, "height": height}
            for own, name, (height, width) in zip(ids, a.file_names, a.sizes.tolist(), strict=True)
        ],
        "categories": [
            {"id": own, "name": name} for own, name in zip(category_ids, a.classes.names, strict=True)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": ids[owner],
                "category_id": category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (owner, label, box, crowd, area) in enumerate(rows, start=1)
        ],
    }


def write_coco(root: Path, splits: dict[str, Annotations], place_image: Callable[[Path, Path], None]) -> None:
    """Writes `SPLIT.json` and `SPLIT/` for every split; `place_image(source, target)` brings each image there."""
    for split, content in splits.items():
        (root / split).mkdir(parents=True)
        for name in content.file_names:
            place_image(content.image_dir / name, root / split / name)
        (root / f"{split}.json").write_text(json.dumps(to_coco(content)), encoding="utf-8")
