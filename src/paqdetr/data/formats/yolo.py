"""YOLO: `data.yaml` with the classes and where the images are, and one text file of normalised boxes beside each image."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from paqdetr.data.annotations import DECIMALS, Annotations, Builder, Issues, MissingSplitError
from paqdetr.data.files import (
    USUAL,
    Folder,
    header_sizes,
    inner_path,
    is_split,
    list_files,
    list_pictures,
    listed_names,
    meaning,
    with_slashes,
)
from paqdetr.errors import DataError
from paqdetr.files import read_text
from paqdetr.label_files import yolo_line
from paqdetr.structures import ClassTable
from paqdetr.text import shorten
from paqdetr.values import as_id
from paqdetr.yaml_files import dump_yaml, load_yaml

SPLITS = USUAL
"""All that `data.yaml` has a place for."""

# No name of a class: half of a character, nothing at all.
_UNWRITABLE = re.compile("[\ud800-\udfff]|^$")

# What a split is that has none.
_NOTHING = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, slots=True)
class YoloPlace:
    """One split of a YOLO data set: its `data.yaml`, the folder nothing may lead out of, and the key and value of the split.

    Attributes:
        ignored: why `root` is not the folder that `path` names; empty if it is.
    """

    yaml_file: Path
    root: Path
    split: str
    entry: Any
    ignored: str = ""

    def read(self, issues: Issues) -> Annotations:
        """Reads and verifies one split. An image without a label file is one without objects; a polygon becomes the box around
        it; of a pose the box is read.

        Raises:
            DataError: `data.yaml`, a list or a label file is malformed, or an image is missing or damaged.
        """
        content = load_yaml(self.yaml_file, text_only=True)
        classes, keypoints = _classes(self.yaml_file, content), _keypoints(self.yaml_file, content)
        if self.ignored:
            message = f"{self.ignored}: the images are looked for in {self.root}"
            issues.warn(self.yaml_file, message, kind="path of data.yaml")
            if not issues.collect:
                logging.getLogger(__name__).warning("%s: %s", self.yaml_file, message)
        images, image_dir = _images(self, issues)
        names = [path.relative_to(image_dir).as_posix() for path in images]
        builder = Builder()
        roots = (self.root, self.yaml_file.parent, Path(image_dir.anchor))
        base = next(root for root in roots if image_dir.is_relative_to(root))
        files = Folder(base)
        image_of: dict[Path, Path] = {}
        for name, size in zip(names, header_sizes(images, issues), strict=True):
            real = files.find(_label_file(image_dir / name, self.root).relative_to(base).as_posix())
            first = image_dir / name if real is None else image_of.setdefault(base / real, image_dir / name)
            if first != image_dir / name:
                message = f"has the same label file as {first.name}, {real}"
                issues.doubt(image_dir / name, message, kind="two images of one label file")
            if size is None:
                continue
            height, width = size
            image = builder.add_image(name, name, height=height, width=width)
            rows = [] if real is None else _read_labels(base / real, len(classes), keypoints, issues)
            for label, (x, y, w, h), more in rows:
                builder.masks += more == "polygon"
                builder.poses += more == "keypoints"
                box = [x * width, y * height, w * width, h * height]
                builder.add_box(image, label, [round(value, DECIMALS) for value in box])
        if issues.collect and isinstance(self.entry, str) and _resolve(self, self.entry).is_dir():
            _warn_of_unused(_label_file(image_dir / "x", self.root).parent, {*image_of}, issues)
        return builder.build(source=self.yaml_file, image_dir=image_dir, classes=classes)


def yolo_places(yaml_file: Path, *, named: bool) -> dict[str, YoloPlace]:
    """The splits of a `data.yaml` by their keys, none if it is another yaml file.

    Args:
        named: whether the user named this very file. Its `path` may then lead anywhere; otherwise nothing leads out of the
            folder that it lies in.

    Raises:
        DataError: it is malformed, or, if it was named, has no classes or names no images.
    """
    content = load_yaml(yaml_file, text_only=True)  # a class may be called `no`, `010` or `1.10`
    splits = [key for key in content if is_split(key) and content[key] not in (None, *_NOTHING, [])]
    if "names" not in content or not splits:
        if named:
            found = shorten(", ".join(map(str, content)))
            if splits:
                raise DataError(
                    f"{yaml_file}: has no `names`, found {found}", "List the names of the classes there, in order."
                )
            raise DataError(
                f"{yaml_file}: has no `train` that names images, found {found}",
                "Name the data.yaml of a YOLO data set, and in it the folders of images.",
            )
        return {}
    root, ignored = _root(yaml_file, content.get("path"), named=named)
    return {split: YoloPlace(yaml_file, root, split, content[split], ignored) for split in splits}


def _root(yaml_file: Path, path: Any, *, named: bool) -> tuple[Path, str]:
    """The data folder, and why it is not the one that `path` names. A `path` that does not exist was written for another machine:
    the folder of the file counts then."""
    folder = yaml_file.parent
    if path in (None, *_NOTHING):
        return folder, ""
    if not isinstance(path, str):
        raise DataError(f"{yaml_file}: `path` is {shorten(path)}, expected a folder", "Remove or correct `path`.")
    plain = inner_path(with_slashes(path, folder))
    stated = folder / (path if plain is None else plain)
    try:
        exists, real, elsewhere = stated.is_dir(), Path(os.path.realpath(stated)), Path(path).is_dir()
    except (OSError, ValueError):  # a name that no file can have
        exists, real, elsewhere = False, stated, False
    if not exists:
        seen = ", though one in the folder that the command runs in" if elsewhere else ""
        return folder, f"`path` is {shorten(path)}, which is no folder{seen}"
    if plain is not None:
        return stated, ""
    if real == folder.resolve():
        return folder, ""
    if named:
        return real, ""
    return folder, f"`path` is {shorten(path)}, outside of its folder, and counts only if the file itself is named"


def _warn_of_unused(folder: Path, used: set[Path], issues: Issues) -> None:
    """Label files that no image has."""
    for name in list_files(folder, Issues(collect=True)) if folder.is_dir() else []:
        if name.endswith(".txt") and folder / name not in used and not name.endswith("classes.txt"):
            issues.warn(folder / name, "left out: no image is called like it", kind="skipped file")


def _classes(yaml_file: Path, content: dict[str, Any]) -> ClassTable:
    names = content.get("names")
    if isinstance(names, dict):
        keys = {_count(key): name for key, name in names.items()}
        if sorted(keys, key=str) != sorted(range(len(names)), key=str):
            raise DataError(
                f"{yaml_file}: `names` has the keys {shorten(list(names))}, expected 0 to {len(names) - 1}",
                "Number the classes from 0 without gaps.",
            )
        names = [keys[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{yaml_file}: `names` is {shorten(names)}, expected a list of names", "List the classes.")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(f"{yaml_file}: names[{position}] is {shorten(name)}, expected a text", "Name the class.")
    count = content.get("nc")
    if count not in (None, "") and _count(count) != len(names):
        raise DataError(
            f"{yaml_file}: `nc` is {shorten(count)}, but `names` has {len(names)} classes", "Correct one of them."
        )
    return ClassTable(tuple(range(len(names))), tuple(names))


def _keypoints(yaml_file: Path, content: dict[str, Any]) -> int | None:
    """How many numbers of a pose label are keypoints; None if the labels are no poses."""
    shape = content.get("kpt_shape")
    if shape in (None, *_NOTHING):
        return None
    counts = [_count(part) for part in shape] if isinstance(shape, list) else []
    if len(counts) == 2 and counts[0] is not None and counts[0] > 0 and counts[1] in (2, 3):
        return counts[0] * counts[1]
    raise DataError(
        f"{yaml_file}: `kpt_shape` is {shorten(shape)}, expected [keypoints, 2 or 3]",
        "Correct it, or remove it if the labels have no keypoints.",
    )


def _count(value: Any) -> int | None:
    """A whole number that is written as 3 or 3.0."""
    try:
        own = as_id(float(value))
    except (TypeError, ValueError):
        return None
    return own if isinstance(own, int) else None


def _images(place: YoloPlace, issues: Issues) -> tuple[list[Path], Path]:
    """The split's images, sorted, and the folder they are named from.

    `entry` is a folder, a text file that lists images, or a list of these; of several the common folder counts.
    """
    entries = place.entry if isinstance(place.entry, list) else [place.entry]
    images: list[Path] = []
    for entry in entries:
        path = _resolve(place, entry)
        if path.is_dir():
            images += [path / name for name in list_pictures(path, issues)]
        elif path.suffix == ".txt":
            images += _listed(place, path, issues)
        else:
            raise DataError(
                f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, neither a folder nor a list of images (.txt)",
                "Name the folder of the images, relative to data.yaml.",
            )
    if not images:
        raise MissingSplitError(
            f"{place.yaml_file}: `{place.split}: {shorten(place.entry)}` holds no images",
            f"Put the images there{_or_remove(place)}.",
        )
    single = _resolve(place, entries[0]) if len(entries) == 1 else None
    folder = single if single is not None and single.is_dir() else _common_folder(images)
    return list(dict.fromkeys(images)), folder


def _resolve(place: YoloPlace, entry: Any) -> Path:
    """An entry of data.yaml inside the data folder."""
    if not isinstance(entry, str):
        raise DataError(f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, expected a path", "Correct it.")
    name = with_slashes(entry, place.root)
    while name.startswith("../"):  # Roboflow's exports say ../train/images and mean train/images
        name = name[3:]
    plain = _inside(name, place.root) if Path(name).is_absolute() else _relative(name)
    if plain is None:
        raise DataError(
            f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, which is not inside {place.root}",
            "Give a path relative to data.yaml.",
        )
    if plain == ".":
        return place.root
    # Roboflow's downloads say FOLDER/train/images, seen from beside FOLDER.
    outer, _, rest = plain.partition("/")
    own_name = rest if outer == place.root.resolve().name else ""
    for inner in filter(None, (plain, own_name)):
        for base in (place.root, place.yaml_file.parent):
            if (real := Folder(base).find(inner)) is not None:
                return base / real
    ignored = f"; {place.ignored}" if place.ignored else ""
    raise MissingSplitError(
        f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, but {place.root / plain} does not exist{ignored}",
        f"Correct the path; it is relative to data.yaml{_or_remove(place)}.",
    )


def _relative(path: str) -> str | None:
    """See `inner_path`; "." for the folder itself, in which images lie beside data.yaml."""
    return "." if path and PurePosixPath(path) == PurePosixPath() else inner_path(path)


def _inside(path: str, root: Path) -> str | None:
    """An absolute path as one relative to the data folder, though links lead to one of them; None if it is outside."""
    try:
        real, real_root = (Path(os.path.realpath(own)) for own in (path, root))
    except ValueError:  # a name that no file can have
        return None
    for own, folder in ((Path(path), root), (Path(path), real_root), (real, real_root)):
        if own.is_relative_to(folder) and (plain := _relative(own.relative_to(folder).as_posix())) is not None:
            return plain
    return None


def _or_remove(place: YoloPlace) -> str:
    """What else to do about a split that is not there, if a training can do without it."""
    return f", or remove the line `{place.split}:`" if meaning(place.split) in ("val", "test") else ""


def _listed(place: YoloPlace, path: Path, issues: Issues) -> list[Path]:
    """Images of a list, whose lines are relative to the list's folder or to the data folder."""
    found: list[Path] = []
    folders = [place.root, path.parent]
    indices = [Folder(folder) for folder in folders]
    for number, plain in listed_names(path, issues, folder=place.root):
        candidates = [(folder, index.find(plain)) for folder, index in zip(folders, indices, strict=True)]
        image = next((folder / real for folder, real in candidates if real is not None), None)
        if image is None:
            issues.error(place.root / plain, f"missing, though line {number} of {path} lists it", kind="missing image")
        else:
            found.append(image)
    return found


def _common_folder(images: list[Path]) -> Path:
    folders = {path.parent for path in images}
    first = min(folders)
    return next(f for f in (first, *first.parents) if all(other == f or f in other.parents for other in folders))


def _label_file(image: Path, root: Path) -> Path:
    """.../images/a/b.jpg -> .../labels/a/b.txt; beside the image where no folder of the data set is called images."""
    parts = list(image.parts)
    outer = len(root.parts) if image.is_relative_to(root) else 1
    for place in range(len(parts) - 2, outer - 1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _read_labels(
    path: Path, num_classes: int, keypoints: int | None, issues: Issues
) -> list[tuple[int, tuple[float, ...], str]]:
    """(class index, [x, y, width, height] relative to the image, what else there is) of every line."""
    try:
        text = read_text(path)
    except DataError as error:
        issues.unreadable(path, error)
        return []
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            rows.append(_parse(words, num_classes, keypoints))
        except _BadLabelError as error:
            issues.error(path, f"line {number}: {error}", "Correct the label file.", kind=error.kind)
    return rows


class _BadLabelError(Exception):
    def __init__(self, message: str, kind: str = "malformed box") -> None:
        super().__init__(message)
        self.kind = kind


def _parse(words: list[str], num_classes: int, keypoints: int | None) -> tuple[int, tuple[float, ...], str]:
    """A line's class, its box, and whether that is what is read of a "polygon" or of "keypoints"."""
    shown = shorten(" ".join(words))
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise _BadLabelError(f"{shown} is not a line of numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise _BadLabelError(f"{shown} has numbers that are not finite")
    label, coordinates, more = numbers[0], numbers[1:], ""
    if keypoints is not None and len(coordinates) == 4 + keypoints:
        coordinates, more = coordinates[:4], "keypoints"
    elif len(coordinates) != 4 and (keypoints is not None or len(coordinates) < 6 or len(coordinates) % 2):
        pose = "5 and those of the keypoints (pose), if data.yaml has `kpt_shape`"
        if keypoints is not None:
            pose = f"{5 + keypoints} (pose, by the `kpt_shape` of data.yaml, beside which there are no polygons)"
        raise _BadLabelError(
            f"{len(words)} numbers, expected 5 (box: class, centre, size), an odd number from 7 on (polygon: class, points), "
            f"or {pose}"
        )
    if label != int(label) or not 0 <= label < num_classes:
        message = f"the class is {words[0]}, expected an integer from 0 to {num_classes - 1}"
        raise _BadLabelError(message, "unknown class")
    if any(abs(value) > 2 for value in coordinates):
        raise _BadLabelError(f"{shown} is in pixels, expected shares of the image's sides")
    if len(coordinates) == 4:
        x, y, w, h = coordinates
        if w < 0 or h < 0:
            raise _BadLabelError(f"the box has the size {w:g} x {h:g}")
        return int(label), (x - w / 2, y - h / 2, w, h), more
    xs, ys = coordinates[::2], coordinates[1::2]
    return int(label), (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), "polygon"


def write_yolo(root: Path, splits: dict[str, Annotations], place_image: Callable[[Path, Path], None]) -> None:
    """Writes `data.yaml`, `images/SPLIT/` and `labels/SPLIT/`. Every box has to lie in its image, and none may be a crowd."""
    for split, part in splits.items():
        for name in part.classes.names:
            if _UNWRITABLE.search(name):
                raise DataError(f"{part.source}: YOLO has no place for the class name {shorten(name)}", "Rename it.")
        starts = part.starts.tolist()
        for index, name in enumerate(part.file_names):
            image = root / "images" / split / name
            place_image(part.image_dir / name, image)
            labels = _label_file(image, root)
            labels.parent.mkdir(parents=True, exist_ok=True)
            if labels.exists():
                raise DataError(
                    f"{part.image_dir / name}: another image of {split} differs in its ending alone, and they would share a "
                    "label file",
                    "Rename one of them.",
                )
            (height, width), rows = part.sizes[index].tolist(), slice(starts[index], starts[index + 1])
            found = zip(part.labels[rows].tolist(), part.boxes[rows].tolist(), strict=True)
            lines = [yolo_line(label, box, (height, width)) for label, box in found]
            labels.write_text("".join(lines), encoding="utf-8")
    # No `path`: other programs would look for it in a folder of theirs, and without it beside this file.
    content: dict[str, Any] = {split: f"images/{split}" for split in splits}
    content["names"] = dict(enumerate(next(iter(splits.values())).classes.names))
    (root / "data.yaml").write_text(dump_yaml(content), encoding="utf-8")
