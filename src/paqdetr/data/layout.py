"""Recognises how a data folder is laid out: its format, and where the annotations and images of every split lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.formats.cityscapes import cityscapes_places
from paqdetr.data.formats.coco import read_coco
from paqdetr.data.formats.crowdhuman import crowdhuman_places
from paqdetr.data.formats.voc import voc_places
from paqdetr.data.formats.yolo import YoloPlace, yolo_places
from paqdetr.errors import DataError

Format = Literal["coco", "voc", "yolo", "cityscapes", "crowdhuman"]

ROBOFLOW_FILE = "_annotations.coco.json"

_USUAL_ORDER = ("train", "val", "test")
_SYNONYMS = {"valid": "val", "validation": "val"}
_FORMS = (
    "DIR/train.json + DIR/train/ (COCO), DIR/annotations/instances_train*.json + DIR/train*/, "
    f"DIR/train/{ROBOFLOW_FILE}, DIR/data.yaml (YOLO), DIR/Annotations/ + DIR/JPEGImages/ (Pascal VOC), "
    "DIR/gtFine/ + DIR/leftImg8bit/ (Cityscapes), DIR/annotation_train.odgt + DIR/Images/ (CrowdHuman)"
)


class Place(Protocol):
    """Where one split lies, and how it is read."""

    def read(self, issues: Issues) -> Annotations:
        """The split as its files have it.

        Raises:
            DataError: it is malformed, unless `issues` collects.
        """
        ...


@dataclass(frozen=True, slots=True)
class CocoPlace:
    """One split in COCO's json; `image_dir` is what file names are relative to."""

    annotation_file: Path
    image_dir: Path

    def read(self, issues: Issues) -> Annotations:
        """See `read_coco`."""
        return read_coco(self.annotation_file, self.image_dir, issues)


@dataclass(frozen=True, slots=True)
class Layout:
    """A recognised data folder: its format, and the places of its splits in the order train, val, test, others."""

    format: Format
    splits: dict[str, Place]


def available_splits(data: str | Path) -> list[str]:
    """Names of the splits in a data set, in the order train, val, test, others.

    Raises:
        DataError: the folder is missing, empty, or of no known layout.
    """
    return list(find_layout(data).splits)


def find_split(data: str | Path, split: str) -> Place:
    """Where a split lies ("valid" and "validation" mean "val").

    Raises:
        DataError: as `available_splits`, or there is no such split.
    """
    places = find_layout(data).splits
    wanted = _SYNONYMS.get(split, split)
    if wanted not in places:
        raise DataError(f"{data}: has no split {split!r}, found {', '.join(places)}", "Name one that exists.")
    return places[wanted]


def find_layout(data: str | Path) -> Layout:
    """The format of a data set and where its splits lie.

    Args:
        data: a folder, or the `data.yaml` of a YOLO data set. A folder that holds several formats is read as the first of COCO,
            YOLO, Pascal VOC, Cityscapes, CrowdHuman.

    Raises:
        DataError: the folder is missing, empty, or of no known layout.
    """
    root = Path(data)
    try:
        exists, is_file = root.exists(), root.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise DataError(f"{data}: no usable path: {error}", "Check the path.") from None
    if not exists:
        raise DataError(
            f"{root}: no such data folder", "Check the path; `paqdetr data make digits` makes one."
        )
    if is_file:
        if root.suffix not in (".yaml", ".yml"):
            raise DataError(
                f"{root}: is a file, expected a data folder or the data.yaml of one",
                "Name the folder that holds the splits.",
            )
        return _layout("yolo", yolo_places(root, named=True))
    if not any(root.iterdir()):
        raise DataError(f"{root}: the data folder is empty", f"Put a data set there: {_FORMS}.")
    if coco := _beside(root) or _as_coco(root) or _as_roboflow(root):
        return _layout("coco", coco)
    if yolo := _as_yolo(root):
        return _layout("yolo", yolo)
    if voc := voc_places(root):
        return _layout("voc", voc)
    if cityscapes := cityscapes_places(root):
        return _layout("cityscapes", cityscapes)
    if crowdhuman := crowdhuman_places(root):
        return _layout("crowdhuman", crowdhuman)
    raise DataError(f"{root}: no data set of a known layout", f"Lay the folder out as {_FORMS}.")


def _layout(form: Format, places: Mapping[str, Place]) -> Layout:
    named: dict[str, Place] = {_SYNONYMS.get(split, split): place for split, place in places.items()}
    order = sorted(
        named, key=lambda s: (_USUAL_ORDER.index(s) if s in _USUAL_ORDER else len(_USUAL_ORDER), s)
    )
    return Layout(form, {split: named[split] for split in order})


def _beside(root: Path) -> dict[str, CocoPlace]:
    """train.json beside train/."""
    return {
        file.stem: CocoPlace(file, root / file.stem)
        for file in sorted(root.glob("*.json"))
        if (root / file.stem).is_dir()
    }


def _as_coco(root: Path) -> dict[str, CocoPlace]:
    """annotations/instances_train2017.json beside train2017/, train/ or images/train2017/."""
    found: dict[str, CocoPlace] = {}
    for file in sorted((root / "annotations").glob("instances_*.json")):
        full = file.stem.removeprefix("instances_")
        plain = re.sub(r"[-_]?\d+$", "", full) or full
        folders = [root / full, root / plain, root / "images" / full, root / "images" / plain]
        folder = next((f for f in folders if f.is_dir()), folders[0])
        split = _SYNONYMS.get(plain, plain)
        if split in found:  # of two years of one split the later has the plain name, the earlier its full one
            earlier = found[split]
            found[earlier.annotation_file.stem.removeprefix("instances_")] = earlier
        found[split] = CocoPlace(file, folder)
    return found


def _as_yolo(root: Path) -> dict[str, YoloPlace]:
    """data.yaml, or another yaml file that names classes and images."""
    if (root / "data.yaml").is_file():
        return yolo_places(root / "data.yaml", named=False)
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        with suppress(DataError):  # a file of some other program need not even be YAML
            if found := yolo_places(file, named=False):
                return found
    return {}


def _as_roboflow(root: Path) -> dict[str, CocoPlace]:
    """train/_annotations.coco.json among the images."""
    return {
        file.parent.name: CocoPlace(file, file.parent) for file in sorted(root.glob(f"*/{ROBOFLOW_FILE}"))
    }
