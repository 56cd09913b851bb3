"""CrowdHuman: `annotation_SPLIT.odgt`, one json object per line, and one folder `Images/` for all splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.data.annotations import Annotations, Builder, Issues
from paqdetr.data.files import Folder, files_in, folder_in, header_sizes, listed_name, numbered_lines
from paqdetr.errors import DataError
from paqdetr.files import MAX_JSON_BYTES, parse_json
from paqdetr.structures import ClassTable
from paqdetr.text import shorten
from paqdetr.values import as_flag, as_id, is_box

CLASSES = ClassTable((1,), ("person",))
_PREFIX = "annotation_"


@dataclass(frozen=True, slots=True)
class CrowdHumanPlace:
    """One split: its odgt file and the folder of images."""

    odgt_file: Path
    image_dir: Path

    def _file_name(self, own: str, where: str, issues: Issues) -> str | None:
        what = f"{where}: ID {shorten(own)}"
        return listed_name(f"{own}.jpg", issues, source=self.odgt_file, what=what, folder=self.image_dir)

    def read(self, issues: Issues) -> Annotations:
        """Reads and verifies one split: full-body boxes (`fbox`), which may reach out of the image, as the benchmark has them.

        What is tagged `mask`, or marked `ignore`, is a crowd: a region, or a person nobody has to find.

        Raises:
            DataError: a line is malformed, or an image is missing or damaged.
        """
        builder = Builder()
        records: dict[str, tuple[str, str, list[Any]]] = {}  # id -> where, file name, gtboxes
        images = Folder(self.image_dir)
        for number, line in numbered_lines(self.odgt_file, limit=MAX_JSON_BYTES):
            where = f"line {number}"
            try:
                record = parse_json(line, f"{self.odgt_file}: {where}")
            except DataError as error:
                issues.unreadable(self.odgt_file, error)
                continue
            own = as_id(record.get("ID")) if isinstance(record, dict) else None
            own = str(own) if isinstance(own, int) else own
            boxes = record.get("gtboxes") if isinstance(record, dict) else None
            if not isinstance(own, str) or not isinstance(boxes, list):
                issues.error(self.odgt_file, f"{where}: {shorten(record)}, expected an ID and gtboxes")
            elif own in records:
                issues.error(self.odgt_file, f"{where}: ID {shorten(own)} is given twice, first in {records[own][0]}")
            elif (plain := self._file_name(own, where, issues)) is None:
                continue
            elif (name := images.find(plain)) is None:
                issues.error(
                    self.image_dir / f"{own}.jpg", f"missing, though {where} of {self.odgt_file} lists it",
                    "Unpack the images into Images/.", kind="missing image",
                )  # fmt: skip
            else:
                records[own] = (where, name, boxes)
        if not records:
            issues.error(self.odgt_file, "lists no image", "Download the file again.", kind="unreadable file")
        sizes = header_sizes([self.image_dir / name for _, name, _ in records.values()], issues)
        for (own, (where, name, boxes)), size in zip(records.items(), sizes, strict=True):
            if size is None:
                continue
            image = builder.add_image(own, name, height=size[0], width=size[1])
            for position, item in enumerate(boxes):
                _add(builder, image, item, f"{where}: gtboxes[{position}] of {own}", self.odgt_file, issues)
        return builder.build(source=self.odgt_file, image_dir=self.image_dir, classes=CLASSES)


def crowdhuman_places(root: Path) -> dict[str, CrowdHumanPlace]:
    """The splits of a CrowdHuman folder."""
    images = folder_in(root, "Images")
    return {
        file.stem.removeprefix(_PREFIX): CrowdHumanPlace(file, images)
        for file in files_in(root)
        if file.name.startswith(_PREFIX) and file.suffix == ".odgt"
    }


def _add(builder: Builder, image: int, item: Any, where: str, path: Path, issues: Issues) -> None:
    tag = item.get("tag") if isinstance(item, dict) else None
    if tag not in ("person", "mask"):
        issues.error(path, f"{where} has the tag {shorten(tag)}, expected person or mask", kind="unknown class")
        return
    box = item.get("fbox")
    if not is_box(box):
        message = f"{where} has fbox {shorten(box)}, expected four finite numbers [x, y, w, h]"
        issues.error(path, message, kind="malformed box")
        return
    extra = item.get("extra")
    ignore = extra.get("ignore") if isinstance(extra, dict) else None
    ignored = as_flag(ignore)
    if ignored is None:
        issues.error(path, f"{where} has ignore {shorten(ignore)}, expected 0 or 1", kind="flag")
        return
    builder.add_box(image, 0, box, crowd=tag == "mask" or ignored)
