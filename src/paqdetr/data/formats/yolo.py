"""YOLO: `data.yaml` with the classes and where the images are, and one text file of normalised boxes beside each image."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.data.annotations import Annotations, Builder, Issues, shorten
from paqdetr.data.files import inner_path
from paqdetr.data.formats.sidecar import SIDECAR, Sidecar
from paqdetr.data.formats.sizes import header_sizes
from paqdetr.errors import DataError
from paqdetr.files import read_text
from paqdetr.images import IMAGE_EXTENSIONS
from paqdetr.structures import ClassTable
from paqdetr.yaml_files import dump_yaml, load_yaml

_SPLITS = ("train", "val", "test")
# Pixels are rounded to this many decimals: what was divided by the image's side and written comes back exactly.
_DECIMALS = 8


@dataclass(frozen=True, slots=True)
class YoloPlace:
    """One split of a YOLO data set: its `data.yaml`, the folder nothing may lead out of, and what `data.yaml` says of it."""

    yaml_file: Path
    root: Path
    split: str
    entry: Any

    def read(self, issues: Issues) -> Annotations:
        """See `read_yolo`."""
        return read_yolo(self, issues)


def yolo_places(yaml_file: Path, *, named: bool) -> dict[str, YoloPlace]:
    """The splits of a `data.yaml`, none if it is another yaml file.

    Args:
        named: whether the user named this very file. Its `path` may then lead anywhere; otherwise nothing leads out of the
            folder that it lies in.

    Raises:
        DataError: it is malformed, or `path` leads out of the folder.
    """
    content = load_yaml(yaml_file, text_only=True)
    if "names" not in content or not any(split in content for split in _SPLITS):
        if named:
            raise DataError(
                f"{yaml_file}: has no `names` or no `train`, found {shorten(', '.join(map(str, content)))}",
                "Name the data.yaml of a YOLO data set.",
            )
        return {}
    root = _root(yaml_file, content.get("path"), named=named)
    return {
        split: YoloPlace(yaml_file, root, split, content[split])
        for split in _SPLITS
        if content.get(split) not in (None, "", [], "null", "~")
    }


def _root(yaml_file: Path, path: Any, *, named: bool) -> Path:
    """The data folder. A `path` that does not exist was written for another machine: the folder of the file counts then."""
    folder = yaml_file.parent
    if path in (None, "", "."):
        return folder
    if not isinstance(path, str):
        raise DataError(
            f"{yaml_file}: `path` is {shorten(path)}, expected a folder", "Remove or correct `path`."
        )
    plain = inner_path(path)
    if plain is not None:
        return folder / plain if (folder / plain).is_dir() else folder
    if not named:
        return folder
    try:
        outside = (folder / path).resolve()
        return outside if outside.is_dir() else folder
    except (OSError, ValueError):
        return folder


def read_yolo(place: YoloPlace, issues: Issues) -> Annotations:
    """Reads and verifies one split. An image without a label file is one without objects; a segment becomes its box.

    Raises:
        DataError: `data.yaml`, a list or a label file is malformed, or an image is missing or damaged.
    """
    classes = _classes(place.yaml_file)
    images, image_dir = _images(place, issues)
    sidecar = Sidecar.read(place.root, place.split, issues)
    classes = sidecar.with_ids(classes, place.yaml_file)
    names = sidecar.ordered([path.relative_to(image_dir).as_posix() for path in images])
    builder = Builder()
    for name, size in zip(names, header_sizes([image_dir / name for name in names], issues), strict=True):
        if size is None:
            continue
        height, width = size
        image = builder.add_image(sidecar.image_id(name), name, height=height, width=width)
        label_file = _label_file(image_dir / name, place.root)
        rows = _read_labels(label_file, len(classes), issues)
        areas = sidecar.areas(name, len(rows), label_file, issues)
        for (label, (x, y, w, h)), area in zip(rows, areas, strict=True):
            box = [x * width, y * height, w * width, h * height]
            builder.add_box(image, label, [round(value, _DECIMALS) for value in box], area=area)
        for label, box, area in sidecar.crowds(name, len(classes)):
            builder.add_box(image, label, box, crowd=True, area=area)
    return builder.build(source=place.yaml_file, image_dir=image_dir, classes=classes)


def _classes(yaml_file: Path) -> ClassTable:
    content = load_yaml(yaml_file, text_only=True)  # a class may be called no, 010 or 1.10
    names = content.get("names")
    if isinstance(names, dict):
        expected = [str(number) for number in range(len(names))]
        if sorted(names) != sorted(expected):
            raise DataError(
                f"{yaml_file}: `names` has the keys {shorten(list(names))}, expected 0 to {len(names) - 1}",
                "Number the classes from 0 without gaps.",
            )
        names = [names[key] for key in expected]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{yaml_file}: `names` is {shorten(names)}, expected a list of names", "List the classes."
        )
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise DataError(
                f"{yaml_file}: names[{position}] is {shorten(name)}, expected a text",
                "Put the name in quotes.",
            )
    count = content.get("nc")
    if count is not None and count != str(len(names)):
        raise DataError(
            f"{yaml_file}: `nc` is {shorten(count)}, but `names` has {len(names)} classes",
            "Correct one of them.",
        )
    return ClassTable(tuple(range(len(names))), tuple(names))


def _images(place: YoloPlace, issues: Issues) -> tuple[list[Path], Path]:
    """The split's images, sorted, and the folder they are named from.

    `entry` is a folder, a text file that lists images, or a list of these; of several the common folder counts.
    """
    entries = place.entry if isinstance(place.entry, list) else [place.entry]
    images: list[Path] = []
    for entry in entries:
        path = _resolve(place, entry)
        if path.is_dir():
            images += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS)
        elif path.suffix == ".txt":
            images += _listed(place, path, issues)
        else:
            raise DataError(
                f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, neither a folder nor a list of images (.txt)",
                "Name the folder of the images, relative to data.yaml.",
            )
    if not images:
        raise DataError(
            f"{place.yaml_file}: `{place.split}: {shorten(place.entry)}` holds no images",
            "Put the images there.",
        )
    single = _resolve(place, entries[0]) if len(entries) == 1 else None
    folder = single if single is not None and single.is_dir() else _common_folder(images)
    return list(dict.fromkeys(images)), folder


def _resolve(place: YoloPlace, entry: Any) -> Path:
    """An entry of data.yaml inside the data folder."""
    if not isinstance(entry, str):
        raise DataError(
            f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, expected a path", "Correct it."
        )
    name = entry
    while name.startswith("../"):  # Roboflow's exports say ../train/images and mean train/images
        name = name[3:]
    plain = inner_path(name)
    if plain is None and Path(name).is_absolute():
        try:
            plain = Path(name).relative_to(place.root.resolve()).as_posix()
            plain = inner_path(plain)
        except ValueError:
            plain = None
    if plain is None:
        raise DataError(
            f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, which is not inside {place.root}",
            "Give a path relative to data.yaml.",
        )
    for candidate in (place.root / plain, place.yaml_file.parent / plain):
        if candidate.exists():
            return candidate
    raise DataError(
        f"{place.yaml_file}: `{place.split}` is {shorten(entry)}, but {place.root / plain} does not exist",
        "Correct the path; it is relative to data.yaml.",
    )


def _listed(place: YoloPlace, path: Path, issues: Issues) -> list[Path]:
    """Images of a list, whose lines are relative to the list's folder or to the data folder."""
    found: list[Path] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        plain = inner_path(name)
        if plain is None:
            issues.error(
                path,
                f"line {number}: {shorten(name)} is no name inside {place.root}",
                "Give names relative to the data folder, without '..'.",
                kind="path leaves the folder",
            )
            continue
        candidates = [place.root / plain, path.parent / plain]
        image = next((c for c in candidates if c.is_file()), None)
        if image is None:
            issues.error(
                candidates[0], f"missing, though line {number} of {path} lists it", kind="missing image"
            )
        else:
            found.append(image)
    return found


def _common_folder(images: list[Path]) -> Path:
    folders = {path.parent for path in images}
    first = min(folders)
    return next(
        f for f in (first, *first.parents) if all(other == f or f in other.parents for other in folders)
    )


def _label_file(image: Path, root: Path) -> Path:
    """.../images/a/b.jpg -> .../labels/a/b.txt; beside the image where no folder of the data set is called images."""
    parts = list(image.parts)
    outer = len(root.parts) if image.is_relative_to(root) else 1
    for place in range(len(parts) - 2, outer - 1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _read_labels(path: Path, num_classes: int, issues: Issues) -> list[tuple[int, tuple[float, ...]]]:
    """(class index, [x, y, width, height] relative to the image) of every line."""
    if not path.is_file():
        return []
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
            rows.append(_parse(words, num_classes))
        except ValueError as error:
            kind = "unknown class" if "class" in str(error) else "malformed box"
            issues.error(path, f"line {number}: {error}", "Correct the label file.", kind=kind)
    return rows


def _parse(words: list[str], num_classes: int) -> tuple[int, tuple[float, ...]]:
    """A line's class and box.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{shorten(' '.join(words))} is not a line of numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{shorten(' '.join(words))} has numbers that are not finite")
    label, coordinates = numbers[0], numbers[1:]
    if label != int(label) or not 0 <= label < num_classes:
        raise ValueError(f"the class is {words[0]}, expected an integer from 0 to {num_classes - 1}")
    if len(coordinates) != 4 and (len(coordinates) < 6 or len(coordinates) % 2):
        raise ValueError(
            f"{len(words)} numbers, expected 5 (class and box) or the class and at least 3 points of a segment"
        )
    if any(abs(value) > 2 for value in coordinates):
        raise ValueError(f"{shorten(' '.join(words))} is in pixels, expected shares of the image's sides")
    if len(coordinates) == 4:
        x, y, w, h = coordinates
        if w < 0 or h < 0:
            raise ValueError(f"the box has the size {w:g} x {h:g}")
        return int(label), (x - w / 2, y - h / 2, w, h)
    xs, ys = coordinates[::2], coordinates[1::2]
    return int(label), (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))


def write_yolo(root: Path, splits: dict[str, Annotations], place_image: Callable[[Path, Path], None]) -> None:
    """Writes `data.yaml`, `images/SPLIT/` and `labels/SPLIT/`; what these cannot say goes into the side file."""
    sides = {}
    for split, part in splits.items():
        sides[split] = Sidecar.of(part, crowds=True)
        starts = part.starts.tolist()
        for index, name in enumerate(part.file_names):
            image = root / "images" / split / name
            place_image(part.image_dir / name, image)
            rows = range(starts[index], starts[index + 1])
            lines = [_line(part, row, index) for row in rows if not part.crowd[row]]
            labels = _label_file(image, root)
            labels.parent.mkdir(parents=True, exist_ok=True)
            if labels.exists():
                raise DataError(
                    f"{name}: another image of {split} differs in its ending alone, and they would share a label file",
                    "Rename one of them.",
                )
            labels.write_text("".join(lines), encoding="utf-8")
    classes = next(iter(splits.values())).classes
    # No `path`: other programs would look for it in a folder of theirs, and without it beside this file.
    content: dict[str, Any] = {split: f"images/{split}" for split in splits}
    content["names"] = dict(enumerate(classes.names))
    (root / "data.yaml").write_text(dump_yaml(content), encoding="utf-8")
    (root / SIDECAR).write_text(json.dumps(Sidecar.document(classes, sides)), encoding="utf-8")


def _line(annotations: Annotations, row: int, index: int) -> str:
    height, width = annotations.sizes[index].tolist()
    x, y, w, h = annotations.boxes[row].tolist()
    shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return f"{int(annotations.labels[row])} {' '.join(map(repr, shares))}\n"
