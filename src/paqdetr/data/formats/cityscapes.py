"""Cityscapes: `gtFine/SPLIT/CITY/*_gtFine_polygons.json` beside `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.data.annotations import Annotations, Builder, Issues
from paqdetr.data.files import Folder, folder_in, folders_in, list_files
from paqdetr.errors import DataError
from paqdetr.files import load_json
from paqdetr.structures import ClassTable
from paqdetr.text import shorten
from paqdetr.values import as_flag, is_coordinate, is_side

# The classes that Cityscapes annotates one by one, under its own ids.
CLASSES = ClassTable(
    (24, 25, 26, 27, 28, 31, 32, 33), ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
)
_LABELS = {name: label for label, name in enumerate(CLASSES.names)}
_POLYGONS, _IMAGE = "_gtFine_polygons.json", "_leftImg8bit.png"


@dataclass(frozen=True, slots=True)
class CityscapesPlace:
    """One split: the folder of polygons and the folder of images, with a folder for each city in both."""

    polygon_dir: Path
    image_dir: Path

    def read(self, issues: Issues) -> Annotations:
        """Reads and verifies one split; the id of an image is its name without endings, such as aachen_000000_000019.

        A box is the extent of the whole polygon, also where something that was drawn later hides a part of it, and its area that
        of the polygon. Groups ("cargroup": not told apart) are crowds.

        Raises:
            DataError: a file is malformed, or an image is missing.
        """
        builder = Builder()
        files = [name for name in list_files(self.polygon_dir, issues) if name.endswith(_POLYGONS)]
        images = Folder(self.image_dir)
        if not files:
            issues.error(self.polygon_dir, f"holds no CITY/*{_POLYGONS}", "Unpack gtFine_trainvaltest.zip there.")
        for file in files:
            path, stem = self.polygon_dir / file, file.removesuffix(_POLYGONS)
            name = images.find(f"{stem}{_IMAGE}")
            if name is None:
                issues.error(
                    self.image_dir / f"{stem}{_IMAGE}", f"missing, though {path} is about it",
                    "Unpack leftImg8bit_trainvaltest.zip beside gtFine.", kind="missing image",
                )  # fmt: skip
                continue
            try:
                content = load_json(path, expected="imgHeight, imgWidth and objects")
            except DataError as error:
                issues.unreadable(path, error)
                continue
            height, width, objects = (content.get(key) for key in ("imgHeight", "imgWidth", "objects"))
            if not (is_side(height) and is_side(width)):
                message = f"has imgHeight {shorten(height)} and imgWidth {shorten(width)}, expected pixels"
                issues.error(path, message, kind="image size")
                continue
            if not isinstance(objects, list):
                issues.error(path, f"`objects` is {shorten(objects)}, expected a list")
                continue
            own = stem.rpartition("/")[2]
            image = builder.add_image(own, name, height=int(height), width=int(width))
            for number, item in enumerate(objects):
                _add(builder, image, item, f"objects[{number}]", path, issues)
        return builder.build(source=self.polygon_dir, image_dir=self.image_dir, classes=CLASSES)


def cityscapes_places(root: Path) -> dict[str, CityscapesPlace]:
    """The splits of a Cityscapes folder."""
    return {
        folder.name: CityscapesPlace(folder, folder_in(root, "leftImg8bit") / folder.name)
        for folder in folders_in(folder_in(root, "gtFine"))
    }


def _add(builder: Builder, image: int, item: Any, where: str, path: Path, issues: Issues) -> None:
    """One object: other classes than the eight have no box, deleted ones are not there."""
    label = item.get("label") if isinstance(item, dict) else None
    if not isinstance(label, str):
        issues.error(path, f"{where} is {shorten(item)}, expected a label and a polygon")
        return
    plain, deleted = label.removesuffix("group"), as_flag(item.get("deleted"))
    if deleted is None:
        issues.error(path, f"{where} ({label}) has deleted {shorten(item['deleted'])}, expected 0 or 1", kind="flag")
    if plain not in _LABELS or deleted is not False:
        return
    points = item.get("polygon")
    if (
        not isinstance(points, list)
        or len(points) < 3
        or not all(isinstance(p, list) and len(p) == 2 and all(map(is_coordinate, p)) for p in points)
    ):
        message = f"{where} ({label}) has the polygon {shorten(points)}, expected at least three points [x, y]"
        issues.error(path, message, kind="malformed box")
        return
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    # the shoelace formula
    twice = sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    builder.masks += 1
    builder.add_box(image, _LABELS[plain], box, crowd=plain != label, area=abs(twice) / 2)
