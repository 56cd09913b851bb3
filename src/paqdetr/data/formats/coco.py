"""COCO: one json of annotations and one folder of images for every split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.data.annotations import Annotations, Builder, Issues
from paqdetr.data.files import Folder, listed_name
from paqdetr.errors import DataError
from paqdetr.files import load_json
from paqdetr.structures import ClassTable
from paqdetr.text import shorten
from paqdetr.values import as_flag, as_id, is_box, is_side

# The types of json's ids: its `true` is none of them, though Python takes it for 1.
_ID_TYPES = (int, str, float)
_AN_ID = "expected an integer of at most 64 bits, or a text"


def read_coco(annotation_file: Path, image_dirs: Sequence[Path], issues: Issues) -> Annotations:
    """Reads and verifies an annotation file; images are not opened, only looked for.

    An image without `file_name` is called like the last two parts of its `coco_url`, or the last one (LVIS).

    Category ids may have gaps and start anywhere. Texts as category ids become integers: "7" is 7, and where one of them is
    no number, all are numbered from 1 in the order of the file.

    Args:
        annotation_file: COCO json with `images`, `annotations` and `categories`.
        image_dirs: folders that `file_name` may be relative to; the one that has most of the images counts.

    Raises:
        DataError: the file or an entry is malformed or contradicts another, or an image is missing.
    """
    try:
        content = load_json(
            annotation_file,
            expected="images, annotations and categories",
            remedy="A list is the form of results; name the ground truth.",
        )
    except DataError as error:
        issues.unreadable(annotation_file, error)
        return Builder().build(source=annotation_file, image_dir=image_dirs[0], classes=ClassTable((), ()))
    reader = _Reader(annotation_file, content, issues)
    classes, label_of = reader.classes()
    image_dir, positions = reader.images(image_dirs)
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

    def inner(self, name: str, image: int | str, folder: Path) -> str | None:
        """See `listed_name`."""
        what = f"image {shorten(image)} has file_name {shorten(name)}, which"
        return listed_name(name, self.issues, source=self.path, what=what, folder=folder)

    def classes(self) -> tuple[ClassTable, dict[int | str, int]]:
        """The class table, and the file's own category ids -> contiguous index."""
        names: dict[int | str, str] = {}
        for position, category in self.entries("categories"):
            own, name = as_id(category.get("id")), category.get("name")
            if own is None:
                self.fail(f"categories[{position}] has id {shorten(category.get('id'))}, {_AN_ID}", "class")
            elif isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
                self.fail(f"categories[{position}] is {shorten(category)}, expected an `id` and a `name`", "class")
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

    def images(self, image_dirs: Sequence[Path]) -> tuple[Path, dict[int | str, int]]:
        """The folder they lie in, and the images' own ids -> positions."""
        accepted: list[tuple[int | str, str, int, int]] = []
        seen: set[int | str] = set()
        of_urls = False
        for position, image in self.entries("images"):
            own, name = as_id(image.get("id")), image.get("file_name")
            if name is None and isinstance(url := image.get("coco_url"), str):  # LVIS
                name, of_urls = "/".join(url.split("/")[-2:]), True
            height, width = image.get("height"), image.get("width")
            if own is None:
                self.fail(f"images[{position}] has id {shorten(image.get('id'))}, {_AN_ID}")
                continue
            if own in seen:
                self.fail(f"image id {shorten(own)} is given twice")
            elif not isinstance(name, str) or not name:
                self.fail(f"image {shorten(own)} has file_name {shorten(name)}, expected a name")
            elif (plain := self.inner(name, own, image_dirs[0])) is None:
                pass
            elif not (is_side(height) and is_side(width)):
                self.fail(
                    f"image {shorten(own)} has height {shorten(height)} and width {shorten(width)}, expected pixels",
                    "image size",
                )
            else:
                accepted.append((own, plain, int(height), int(width)))
            seen.add(own)
        image_dir, found = _find(image_dirs, [name for _, name, _, _ in accepted])
        if of_urls and not found:  # in one folder, without those of COCO
            accepted = [(own, name.rpartition("/")[2], height, width) for own, name, height, width in accepted]
            image_dir, found = _find(image_dirs, [name for _, name, _, _ in accepted])
        self._complain_of_missing(image_dir, [name for _, name, _, _ in accepted if name not in found], len(accepted))
        positions: dict[int | str, int] = {}
        first_of: dict[str, int | str] = {}
        for own, name, height, width in accepted:
            if name in found:
                positions[own] = self.builder.add_image(own, found[name], height=height, width=width)
                if (first := first_of.setdefault(found[name], own)) != own:
                    message = f"image {shorten(own)} has the same file_name as image {shorten(first)}, {shorten(name)}"
                    self.issues.doubt(self.path, message, kind="file_name given twice")
        self._known = seen  # what is listed, well-formed or not: its boxes are no further mistakes
        return image_dir, positions

    def _complain_of_missing(self, image_dir: Path, missing: list[str], listed: int) -> None:
        if missing and not self.issues.collect:
            slashes = " (their names have backslashes)" if "\\" in missing[0] else ""
            raise DataError(
                f"{image_dir / missing[0]}: missing, though {self.path} lists it"
                f" ({len(missing)} of {listed} images are missing){slashes}",
                "Put the images there, or correct `file_name`.",
            )
        for name in missing:
            self.issues.error(image_dir / name, f"missing, though {self.path} lists it", kind="missing image")

    def boxes(self, label_of: dict[int | str, int], positions: dict[int | str, int]) -> None:
        """Takes the well-formed annotations; the names of what is wrong are made up for the others alone: there are millions."""
        add = self.builder.add_box
        if self.issues.collect:
            self._warn_of_what_is_not_used()
        for position, entry in self.entries("annotations", may_be_empty=True):
            owner, category = entry.get("image_id"), entry.get("category_id")
            box, area = entry.get("bbox"), entry.get("area")
            crowd = as_flag(entry.get("iscrowd"))
            if (
                type(owner) in _ID_TYPES
                and owner in self._known
                and type(category) in _ID_TYPES
                and category in label_of
                and is_box(box)
                and (area is None or _is_area(area))
                and crowd is not None
            ):
                self.builder.masks += bool(entry.get("segmentation"))
                self.builder.poses += bool(entry.get("keypoints"))
                if owner in positions:
                    add(positions[owner], label_of[category], box, crowd=crowd, area=area)
            else:
                self.fail(*self._complaint(position, entry, label_of))

    def _warn_of_what_is_not_used(self) -> None:
        """Ids of annotations that are given twice, and segmentations that are none: other programs fail over them."""
        seen: set[int | str] = set()
        entries = self.content.get("annotations")
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict):
                continue
            own, mask = as_id(entry.get("id")), entry.get("segmentation")
            if own is not None:
                if own in seen:
                    message = f"annotation id {shorten(own)} is given twice; other programs may read one of the two"
                    self.issues.warn(self.path, message, kind="annotation id given twice")
                seen.add(own)
            if not _is_segmentation(mask):
                message = f"annotation {shorten(own)} of image {shorten(entry.get('image_id'))} has segmentation {shorten(mask)}"
                expected = "expected polygons of finite numbers, or counts; the box alone is used"
                self.issues.warn(self.path, f"{message}, {expected}", kind="odd segmentation")

    def _complaint(self, position: int, entry: dict[str, Any], label_of: dict[int | str, int]) -> tuple[str, str]:
        """What is wrong with an annotation, and the kind of problem."""
        subject = f"annotation {shorten(entry.get('id', [position]))}"
        owner, category, box, area = (entry.get(k) for k in ("image_id", "category_id", "bbox", "area"))
        if type(owner) not in _ID_TYPES or owner not in self._known:
            return f"{subject} belongs to image {shorten(owner)}, which `images` does not list", "annotation"
        subject = f"{subject} of image {shorten(owner)} has"
        if type(category) not in _ID_TYPES or category not in label_of:
            message = f"{subject} category_id {shorten(category)}, which `categories` does not list"
            return message, "unknown class"
        if not is_box(box):
            message = f"{subject} bbox {shorten(box)}, expected four finite numbers [x, y, w, h], w and h not below 0"
            if box is None and entry.get("segmentation"):
                message += ": the extent of its segmentation"
            return message, "malformed box"
        if area is not None and not _is_area(area):
            return f"{subject} area {shorten(area)}, expected a number that is not below 0", "malformed box"
        return f"{subject} iscrowd {shorten(entry.get('iscrowd'))}, expected 0 or 1", "flag"


def _find(folders: Sequence[Path], names: list[str]) -> tuple[Path, dict[str, str]]:
    """The folder that has most of the images, and their names in the file -> their names on the disk."""
    best, most = folders[0], {}
    for folder in folders:
        index = Folder(folder)
        found = {name: real for name in names if (real := index.find(name)) is not None}
        if len(found) > len(most):
            best, most = folder, found
        if len(found) == len(names):
            break
    return best, most


def _is_area(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e18


def _is_segmentation(value: Any) -> bool:
    """Whether it is none, polygons of finite numbers, or a run-length code; nothing is made of it, and there are millions."""
    if not value:
        return True
    if isinstance(value, dict):
        return "counts" in value
    try:  # a sum shows what is no number, and NaN and infinity among millions; some exporters write one polygon without its list
        total = sum(value) if isinstance(value[0], (int, float)) else sum(map(sum, value))
        return -1e15 < total < 1e15
    except (TypeError, OverflowError):
        return False


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
    rows = zip(a.owners.tolist(), a.labels.tolist(), a.boxes.tolist(), a.crowd.tolist(), areas.tolist(), strict=True)
    return {
        "images": [
            {"id": own, "file_name": name, "width": width, "height": height}
            for own, name, (height, width) in zip(ids, a.file_names, a.sizes.tolist(), strict=True)
        ],
        "categories": [{"id": own, "name": name} for own, name in zip(category_ids, a.classes.names, strict=True)],
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
    """Writes `SPLIT.json` and `SPLIT/` for every split; `place_image(source, target)` brings each image there.

    Image ids are integers, which most other readers rely on: where one of a split is none, its images are numbered from 1 and
    keep their own id under `original_id`.
    """
    for split, part in splits.items():
        (root / split).mkdir(parents=True)
        for name in part.file_names:
            place_image(part.image_dir / name, root / split / name)
        content = to_coco(part)
        if any(isinstance(own, str) for own in part.image_ids):
            numbers = {own: number for number, own in enumerate(part.image_ids, start=1)}
            for image in content["images"]:
                image["original_id"], image["id"] = image["id"], numbers[image["id"]]
            for row in content["annotations"]:
                row["image_id"] = numbers[row["image_id"]]
        (root / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
