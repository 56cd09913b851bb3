"""Reads every image and annotation of a data folder once and lists what is wrong with them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paqdetr.data.coco import CocoDataset, is_box, load_json, missing_files
from paqdetr.data.layout import SplitPlace, split_places
from paqdetr.errors import DataError
from paqdetr.images import read_image

# Boxes may reach this many pixels over the edge of their image: exporters round.
_EDGE_TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    Attributes:
        severity: "error" where reading or training would stop, "warning" where it would go on.
        split: name of the split, or "" where it concerns the whole folder.
        subject: the file, image, annotation or class.
        message: what was found and what was expected.
    """

    severity: Literal["error", "warning"]
    split: str
    subject: str
    message: str


@dataclass(slots=True)
class SplitSummary:
    """Counts of one split; `boxes_per_class` by category name, classes without boxes included."""

    images: int = 0
    boxes: int = 0
    images_without_boxes: int = 0
    boxes_per_class: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class CheckReport:
    """What `check_dataset` found: problems in the order found, and counts by split."""

    problems: list[Problem] = field(default_factory=list)
    splits: dict[str, SplitSummary] = field(default_factory=dict)

    @property
    def errors(self) -> list[Problem]:
        """What must be corrected before training."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """What should be looked at."""
        return [problem for problem in self.problems if problem.severity == "warning"]


def check_dataset(data: str | Path, *, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Checks all splits of a data folder; a broken one becomes a problem in the report.

    Args:
        data: a folder in one of the layouts of `open_split`.
        progress: called with (images done, images in all) after every image.

    Raises:
        DataError: the folder is missing, empty or of no known layout.
    """
    report = CheckReport()
    checks = [_SplitCheck(report, split, place) for split, place in split_places(data).items()]
    total, done = sum(len(check.images) for check in checks), 0
    first_with: dict[bytes, tuple[str, str]] = {}  # content -> the split and file it was first seen in
    for check in checks:
        check.annotations()
        for digest, file_name in check.files():
            if digest is not None:
                split, other = first_with.setdefault(digest, (check.split, file_name))
                if (split, other) != (check.split, file_name):
                    where = f"{split}/{other}" if split != check.split else other
                    check.warn(file_name, f"the same picture as {where}")
            done += 1
            if progress is not None:
                progress(done, total)
        check.strictly()
    _compare_classes(report, checks)
    return report


class _SplitCheck:
    """One split being checked; what is malformed is reported once and then left out."""

    def __init__(self, report: CheckReport, split: str, place: SplitPlace) -> None:
        self.report, self.split, self.place = report, split, place
        self.summary = report.splits[split] = SplitSummary()
        try:
            self.content = load_json(place.annotation_file)
        except DataError as error:
            self.content = {}
            self.fail(place.annotation_file.name, f"{error.message}. {error.remedy}")
        self.images: dict[int | str, dict[str, Any]] = {}
        for image in self._entries("images"):
            image_id = image.get("id")
            if not isinstance(image_id, (int, str)):
                continue  # `strictly` names it
            if image_id in self.images:
                self.fail(f"image {image_id}", "is listed twice")
            self.images.setdefault(image_id, image)
        self.names = {
            e["id"]: str(e.get("name")) for e in self._entries("categories") if isinstance(e.get("id"), int)
        }
        self.summary.images = len(self.images)

    def fail(self, subject: str, message: str) -> None:
        self.report.problems.append(Problem("error", self.split, subject, message))

    def warn(self, subject: str, message: str) -> None:
        self.report.problems.append(Problem("warning", self.split, subject, message))

    def _entries(self, key: str) -> list[dict[str, Any]]:
        entries = self.content.get(key)
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    def annotations(self) -> None:
        """Boxes, categories, and images without boxes."""
        per_class: Counter[int] = Counter()
        with_boxes: set[int | str] = set()
        known: set[tuple[Any, ...]] = set()
        for position, entry in enumerate(self._entries("annotations")):
            subject = f"annotation {entry.get('id', f'[{position}]')}"
            image_id, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
            image = self.images.get(image_id) if isinstance(image_id, (int, str)) else None
            if image is None:
                self.fail(subject, f"belongs to image {image_id!r}, which `images` does not list")
                continue
            subject += f" of {image.get('file_name')}"
            if not isinstance(category, int) or category not in self.names:
                self.fail(subject, f"has category_id {category!r}, which `categories` does not list")
                continue
            if not is_box(box):
                self.fail(subject, f"has bbox {box!r}, expected four finite numbers [x, y, w, h]")
                continue
            if entry.get("iscrowd"):
                continue
            x, y, width, height = box
            if width <= 0 or height <= 0:
                self.warn(subject, f"has a box without area, {box}; training leaves it out")
                continue
            if self._outside(subject, box, image):
                continue
            if (image_id, category, *box) in known:
                self.warn(subject, f"has the same class and box {box} as another one")
            known.add((image_id, category, *box))
            per_class[category] += 1
            with_boxes.add(image["id"])
        self.summary.boxes = per_class.total()
        self.summary.boxes_per_class = {name: per_class[category] for category, name in self.names.items()}
        self.summary.images_without_boxes = len(self.images) - len(with_boxes)
        if self.summary.images_without_boxes:
            count = f"{self.summary.images_without_boxes} of {len(self.images)}"
            self.warn(
                self.place.annotation_file.name, f"{count} images have no boxes; right if nothing is in them"
            )

    def _outside(self, subject: str, box: list[float], image: dict[str, Any]) -> bool:
        """Reports a box that leaves its image; True if nothing of it is inside."""
        across, down = image.get("width"), image.get("height")
        if not (isinstance(across, (int, float)) and isinstance(down, (int, float))):
            return False  # reported with the image
        x, y, width, height = box
        over = max(-x, -y, x + width - across, y + height - down)
        if x >= across or y >= down or x + width <= 0 or y + height <= 0:
            self.warn(subject, f"has box {box} outside the image of {across}x{down}; training leaves it out")
            return True
        if over > _EDGE_TOLERANCE:
            self.warn(
                subject, f"has box {box}, {over:g} pixels over the edge of the image of {across}x{down}"
            )
        return False

    def files(self) -> Iterator[tuple[bytes | None, str]]:
        """Decodes every image; yields a digest of its content (None if there is none) and its file name."""
        names = [str(image.get("file_name")) for image in self.images.values()]
        missing = set(missing_files(self.place.image_dir, names))
        for image, name in zip(self.images.values(), names, strict=True):
            path = self.place.image_dir / name
            if name in missing:
                self.fail(name, f"the image is missing in {self.place.image_dir}")
                yield None, name
                continue
            try:
                size = read_image(path).size
            except DataError as error:
                self.fail(name, f"{error.message}. {error.remedy}")
                yield None, name
                continue
            stated = (image.get("width"), image.get("height"))
            if size != stated:
                turned = " (turned by its EXIF orientation?)" if size == stated[::-1] else ""
                self.fail(
                    name,
                    f"is {size[0]}x{size[1]} pixels, the annotations say {stated[0]}x{stated[1]}{turned}",
                )
            yield hashlib.blake2b(path.read_bytes(), digest_size=16).digest(), name

    def strictly(self) -> None:
        """What training would stop at, should the checks above have missed it."""
        if any(
            problem.severity == "error" and problem.split == self.split for problem in self.report.problems
        ):
            return
        try:
            CocoDataset.from_json(self.place.annotation_file, self.place.image_dir)
        except DataError as error:
            self.fail(self.place.annotation_file.name, f"{error.message}. {error.remedy}")


def _compare_classes(report: CheckReport, checks: list[_SplitCheck]) -> None:
    """The other splits' classes against those of train."""
    train = next((check for check in checks if check.split == "train"), None)
    if train is None or not train.names:
        return
    for check in checks:
        if check is train:
            continue
        for category, name in check.names.items():
            if train.names.get(category, name) != name:
                check.fail(f"class {name}", f"has id {category}, which is {train.names[category]!r} in train")
            elif category not in train.names:
                check.fail(f"class {name}", f"has id {category}, which train does not list")
            elif check.summary.boxes_per_class[name] and not train.summary.boxes_per_class[name]:
                check.warn(f"class {name}", "has boxes here and none in train")
