"""Recognises how a data folder is laid out: its format, and where the annotations and images of every split lie."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.files import USUAL, files_in, folder_in, folders_in, hint, is_split, meaning, name_splits
from paqdetr.data.formats.cityscapes import cityscapes_places
from paqdetr.data.formats.coco import read_coco
from paqdetr.data.formats.crowdhuman import crowdhuman_places
from paqdetr.data.formats.voc import voc_places
from paqdetr.data.formats.yolo import YoloPlace, yolo_places
from paqdetr.errors import DataError
from paqdetr.files import open_regular

Format = Literal["coco", "voc", "yolo", "cityscapes", "crowdhuman"]

ROBOFLOW_FILE = "_annotations.coco.json"

_START = 2**16  # bytes of a json by which it is recognised

_FORMS = (
    "DIR/train.json + DIR/train/ (COCO), DIR/annotations/instances_train*.json + DIR/train*/, "
    f"DIR/train/{ROBOFLOW_FILE}, one COCO json + DIR/images/, DIR/data.yaml (YOLO), DIR/Annotations/ + DIR/JPEGImages/ (Pascal "
    "VOC), DIR/gtFine/ + DIR/leftImg8bit/ (Cityscapes), DIR/annotation_train.odgt + DIR/Images/ (CrowdHuman)"
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
    """One split in COCO's json; `image_dirs` are the folders that file names may be relative to."""

    annotation_file: Path
    image_dirs: tuple[Path, ...]

    def read(self, issues: Issues) -> Annotations:
        """See `read_coco`."""
        return read_coco(self.annotation_file, self.image_dirs, issues)


@dataclass(frozen=True, slots=True)
class Layout:
    """A recognised data folder: where it is, its format, and the places of its splits in the order train, val, test, others."""

    root: Path
    format: Format
    splits: dict[str, Place]

    def unread_annotations(self) -> list[Path]:
        """Files beside the read ones that hold boxes in COCO's form too, and whose names say no split that is missing."""
        read = [place.annotation_file for place in self.splits.values() if isinstance(place, CocoPlace)]
        return [file for file in _coco_files(self.root, _has_all_boxes) if file not in read] if read else []


def available_splits(data: str | Path) -> list[str]:
    """Names of the splits in a data set, in the order train, val, test, others.

    Raises:
        DataError: the folder is missing, empty, or of no known layout.
    """
    return list(find_layout(data).splits)


def find_split(data: str | Path, split: str) -> Place:
    """Where a split lies ("valid", "Validation" and the like mean "val").

    Raises:
        DataError: as `available_splits`, or there is no such split.
    """
    places = find_layout(data).splits
    wanted = split if split in places else meaning(split) or split
    if wanted not in places:
        remedy = "Rename one of them to 'train'." if wanted == "train" else "Name one that exists."
        raise DataError(f"{data}: has no split {split!r}, found {', '.join(places)}", remedy)
    return places[wanted]


def split_to_evaluate(data: str | Path, split: str | None) -> str:
    """The given split, or val; where the data have no val, test or else the first there is, with a line in the log.

    Raises:
        DataError: as `available_splits`.
    """
    if split is not None:
        return split
    found = available_splits(data)
    chosen = next((name for name in ("val", "test") if name in found), found[0])
    if chosen != "val":
        warning = "; figures on images that were trained on say little" if chosen == "train" else ""
        logging.getLogger(__name__).warning("%s has no split 'val': %r is used%s", data, chosen, warning)
    return chosen


def find_layout(data: str | Path) -> Layout:
    """The format of a data set and where its splits lie.

    Args:
        data: a folder, or the `data.yaml` of a YOLO data set. A folder that holds several formats is read as the first of COCO,
            YOLO, Pascal VOC, Cityscapes, CrowdHuman. One that holds none, and one folder that is a data set, is read as that.

    Raises:
        DataError: the folder is missing, empty, of no known layout, or two of its parts mean the same split.
    """
    root = Path(data)
    try:
        exists, is_file = root.exists(), root.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise DataError(f"{data}: no usable path: {error}", "Check the path.") from None
    if not exists:
        raise DataError(f"{root}: no such data folder", "Check the path; `paqdetr data make digits` makes one.")
    if is_file:
        if root.suffix not in (".yaml", ".yml"):
            raise DataError(
                f"{root}: is a file, expected a data folder or the data.yaml of one",
                "Name the folder that holds the splits.",
            )
        return Layout(root, "yolo", name_splits(yolo_places(root, named=True), root))
    if not any(root.iterdir()):
        raise DataError(f"{root}: the data folder is empty", f"Put a data set there: {_FORMS}.")
    found = [layout] if (layout := _recognise(root)) else list(filter(None, map(_recognise, folders_in(root))))
    if len(found) > 1:
        names = ", ".join(layout.root.name for layout in found)
        raise DataError(f"{root}: holds several data sets, {names}", f"Name one of them, such as {found[0].root}.")
    if not found:
        raise DataError(f"{root}: no data set of a known layout{_near_miss(root)}", f"Lay the folder out as {_FORMS}.")
    return found[0]


def _recognise(root: Path) -> Layout | None:
    finders: dict[Format, Callable[[Path], Mapping[str, Place]]] = {
        "coco": _usual_coco,
        "yolo": _as_yolo,
        "voc": voc_places,
        "cityscapes": cityscapes_places,
        "crowdhuman": crowdhuman_places,
    }
    for form, find in [*finders.items(), ("coco", _any_coco)]:
        if places := find(root):
            return Layout(root, form, name_splits(places, root))
    return None


def _near_miss(root: Path) -> str:
    """What is missing from a folder that is nearly one of YOLO's."""
    for folder in (root, *folders_in(root)):
        if {"labels", "images"} <= {below.name.lower() for below in folders_in(folder)}:
            return f": {folder} has YOLO's `labels` and `images`, but there is no data.yaml with `names` of the classes"
    return ""


def _usual_coco(root: Path) -> dict[str, CocoPlace]:
    """train.json beside train/; annotations/instances_train2017.json beside train2017/; train/_annotations.coco.json; and where
    there is one of these, what else is named like a split that none of them is."""
    files = [
        (file.stem, file)
        for file in _jsons(root)
        if _named_dirs(root, file.stem) and (hint(file.stem) or _is_coco(file))
    ]
    files += [
        (file.stem[len("instances_") :], file)
        for file in _jsons(folder_in(root, "annotations"))
        if file.stem.lower().startswith("instances_")
    ]
    places = [(name, CocoPlace(file, (*_image_dirs(root, name), *_shared_dirs(root)))) for name, file in files]
    own = [(folder, folder / ROBOFLOW_FILE) for folder in folders_in(root)]
    usual = _unique([*places, *((f.name, CocoPlace(file, (f,))) for f, file in own if file.is_file())])
    if not usual:
        return {}
    known = {hint(name) or ("train" if is_split(name) else None) for name in usual}
    missing = {split for split in USUAL if split not in known}
    return usual | _any_coco(root, lambda name: hint(name) in missing and _has_all_boxes(name))


def _any_coco(root: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, CocoPlace]:
    """COCO json of any name that is wanted: in the folder, in annotations/, or one in each folder of a split."""
    places = [
        (file.stem, CocoPlace(file, (*_image_dirs(root, file.stem), *_shared_dirs(root), *_open_dirs(root, file.stem))))
        for file in _coco_files(root, wanted)
    ]
    for folder in folders_in(root):
        split = meaning(folder.name) if wanted(folder.name) else None
        inside = (*_shared_dirs(folder), *folders_in(folder))
        places += [(folder.name, CocoPlace(file, inside)) for file in _jsons(folder) if split and _is_coco(file)]
    return _unique(places)


def _coco_files(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    folders = (root, folder_in(root, "annotations"))
    return [file for folder in folders for file in _jsons(folder) if wanted(file.stem) and _is_coco(file)]


def _has_all_boxes(name: str) -> bool:
    """False of the file of COCO that has its people alone, with keypoints."""
    return not name.lower().startswith("person_keypoints")


def _unique(places: list[tuple[str, CocoPlace]]) -> dict[str, CocoPlace]:
    found: dict[str, CocoPlace] = {}
    for name, place in places:
        if name in found:
            raise DataError(
                f"{found[name].annotation_file} and {place.annotation_file} mean the same split, {name!r}",
                "Rename or remove one of them.",
            )
        found[name] = place
    return found


def _named_dirs(root: Path, name: str) -> list[Path]:
    """Folders for the images of a split: called like it, with or without the year, whatever the case."""
    plain = re.sub(r"[-_]?\d+$", "", name) or name
    return [f for wanted in (name, plain) for f in _picture_dirs(root) if f.name.lower() == wanted.lower()]


def _image_dirs(root: Path, name: str) -> list[Path]:
    """As `_named_dirs`, and after them those that mean the same split: `valid/` for val.json."""
    return _named_dirs(root, name) + [f for f in _picture_dirs(root) if hint(name) and meaning(f.name) == hint(name)]


def _open_dirs(root: Path, name: str) -> list[Path]:
    """Folders that may have the images of a split, whatever they are called: not those of another, where images of the same name
    would be taken for its own."""
    return [f for f in folders_in(root) if not hint(name) or hint(f.name) in (None, hint(name))]


def _picture_dirs(root: Path) -> list[Path]:
    return [*folders_in(root), *folders_in(folder_in(root, "images"))]


def _shared_dirs(root: Path) -> list[Path]:
    """Folders for the images of all splits together."""
    return [f for f in folders_in(root) if f.name.lower() in ("images", "image", "imgs", "img", "data")] + [root]


def _jsons(folder: Path) -> list[Path]:
    return [file for file in files_in(folder) if file.suffix.lower() == ".json"]


def _is_coco(file: Path) -> bool:
    """Whether it looks like COCO's ground truth, of boxes."""
    if file.stem.lower().startswith(("captions_", "panoptic_", "stuff_", "image_info_")):
        return False
    try:
        with open_regular(file) as opened:
            start = opened.read(_START)
    except (DataError, OSError):
        return False
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":  # a list is results, or an export of another kind
        return False
    keys = set(re.findall(rb'"(images|annotations|categories)"\s*:\s*\[', start))
    whole = len(start) < _START
    return bool(keys - {b"categories"} if whole else keys)  # Label Studio lists the classes of YOLO's labels in a json


def _as_yolo(root: Path) -> dict[str, YoloPlace]:
    """data.yaml, or another yaml file that names classes and images."""
    if (root / "data.yaml").is_file():
        return yolo_places(root / "data.yaml", named=False)
    found: dict[Path, dict[str, YoloPlace]] = {}
    for file in files_in(root):
        if file.suffix.lower() in (".yaml", ".yml"):
            with suppress(DataError):  # a file of some other program need not even be YAML
                found[file] = yolo_places(file, named=False)
    described = [file for file, places in found.items() if places]
    if len(described) > 1:
        names = " and ".join(file.name for file in described)
        raise DataError(f"{root}: {names} describe data sets", f"Name one of them, such as {described[0]}.")
    return found[described[0]] if described else {}
