"""Pascal VOC: one XML file an image, and lists of the images of every split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, ParseError, SubElement, indent

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from paqdetr.data.annotations import Annotations, Builder, Issues, shorten
from paqdetr.data.files import inner_path
from paqdetr.data.formats.sidecar import SIDECAR, Sidecar
from paqdetr.data.formats.sizes import header_sizes
from paqdetr.errors import DataError
from paqdetr.files import read_bytes, read_text
from paqdetr.images import IMAGE_EXTENSIONS
from paqdetr.structures import ClassTable


@dataclass(frozen=True, slots=True)
class VocPlace:
    """One split: the folders of images and XML files, and the list of its images (None: all there are).

    `everything` are the XML folders of all splits: VOC has no list of classes, so the classes are the names that occur.
    """

    root: Path
    split: str
    image_dir: Path
    xml_dir: Path
    list_file: Path | None
    everything: tuple[Path, ...]

    def read(self, issues: Issues) -> Annotations:
        """See `read_voc`."""
        return read_voc(self, issues)


def voc_places(root: Path) -> dict[str, VocPlace]:
    """The splits of a VOC folder.

    It has `Annotations/`, `JPEGImages/` and `ImageSets/Main/*.txt`, or XML files beside the images of `train/`, `valid/`...
    """
    for folder in (root, *sorted(root.glob("VOC*"), reverse=True)):  # of several years the last
        xml, images = folder / "Annotations", folder / "JPEGImages"
        if not (xml.is_dir() and images.is_dir()):
            continue
        lists = sorted((folder / "ImageSets" / "Main").glob("*.txt"))
        # aeroplane_train.txt and its like list one class
        chosen = [file for file in lists if "_" not in file.stem and file.stem != "trainval"]
        splits: dict[str, Path | None] = {file.stem: file for file in chosen}
        both = folder / "ImageSets" / "Main" / "trainval.txt"
        if "train" not in splits and both.is_file():
            splits["train"] = both
        splits = splits or {"train": None}
        return {
            split: VocPlace(root, split, *_own_folder(images, xml, split), file, (xml,))
            for split, file in splits.items()
        }
    beside = sorted({file.parent for file in root.glob("*/*.xml")})
    return {f.name: VocPlace(root, f.name, f, f, None, tuple(beside)) for f in beside}


def _own_folder(images: Path, xml: Path, split: str) -> tuple[Path, Path]:
    """Each split's own subfolder, as `write_voc` makes them, if there is one in both."""
    if (images / split).is_dir() and (xml / split).is_dir():
        return images / split, xml / split
    return images, xml


def read_voc(place: VocPlace, issues: Issues) -> Annotations:
    """Reads and verifies one split. Objects marked difficult are crowds: not trained on, and no mistake where found.

    VOC counts pixels from 1 and includes the last: xmin 1, xmax 10 is a box of 10 pixels from the left edge.

    Raises:
        DataError: a list or an XML file is malformed, or an image is missing.
    """
    sidecar = Sidecar.read(place.root, place.split, issues)
    classes = sidecar.categories or _classes(place.everything)
    label_of = {name: label for label, name in enumerate(classes.names)}
    if not classes.names:
        issues.error(place.xml_dir, "no XML file in it names an object", kind="class")
    found = _images(place, issues)
    names = sidecar.ordered(list(found))
    headers = _header_sizes({name: found[name] for name in names}, place.image_dir, issues)
    builder = Builder()
    for name in names:
        xml = found[name]
        size = _stated_size(xml, issues) or headers.get(name)
        if size is None:
            continue
        image = builder.add_image(sidecar.image_id(name), name, height=size[0], width=size[1])
        rows = [] if xml.root is None else _objects(xml.path, xml.root, label_of, issues)
        areas = sidecar.areas(name, len(rows), xml.path, issues)
        for (label, box, difficult), area in zip(rows, areas, strict=True):
            builder.add_box(image, label, box, crowd=difficult, area=area)
    return builder.build(source=place.list_file or place.xml_dir, image_dir=place.image_dir, classes=classes)


@dataclass(slots=True)
class _Xml:
    path: Path
    root: Element | None  # None: the image has no file


def _parse(path: Path) -> Element:
    """The root of an XML file, which may have no document type: entities are of no use here, and bombs are made of them.

    Raises:
        DataError: it is malformed, naming line and column.
    """
    content = read_bytes(path)
    try:
        return fromstring(content, forbid_dtd=True)
    except ParseError as error:
        line, column = error.position
        raise DataError(
            f"{path}: no valid XML at line {line}, column {column + 1}: {str(error).split(':')[0]}",
            "Export it again.",
        ) from None
    except DefusedXmlException:
        raise DataError(
            f"{path}: has a document type or entities, which is not allowed", "Remove them."
        ) from None
    except (
        ValueError,
        LookupError,
        RecursionError,
    ) as error:  # such as an encoding named in the file that is not its own
        raise DataError(f"{path}: no valid XML: {error}", "Export it again.") from None


def _classes(folders: tuple[Path, ...]) -> ClassTable:
    """All names that occur in any split, in alphabetical order; malformed files are reported by their own split."""
    names: set[str] = set()
    for path in sorted(path for folder in folders for path in folder.rglob("*.xml")):
        try:
            root = _parse(path)
        except DataError:
            continue
        names |= {name for found in root.findall("object") if (name := _text(found, "name"))}
    return ClassTable(tuple(range(1, len(names) + 1)), tuple(sorted(names)))


def _images(place: VocPlace, issues: Issues) -> dict[str, _Xml]:
    """File name -> XML of every image of the split."""
    images: dict[str, str] = {}  # name without ending -> name
    for path in sorted(place.image_dir.rglob("*")):
        if path.suffix.lower() in IMAGE_EXTENSIONS:
            name = path.relative_to(place.image_dir)
            images.setdefault(name.with_suffix("").as_posix(), name.as_posix())
    found: dict[str, _Xml] = {}
    for stem, listed_at in _stems(place, images, issues):
        xml = place.xml_dir / f"{stem}.xml"
        if stem not in images:
            where = f"line {listed_at} of {place.list_file}" if listed_at else str(xml)
            issues.error(
                place.image_dir / stem, f"no image of this name, though {where} is about it",
                "Put the image there, or remove the entry.", kind="missing image",
            )  # fmt: skip
            continue
        if not xml.is_file():
            found[images[stem]] = _Xml(xml, None)
            continue
        try:
            found[images[stem]] = _Xml(xml, _parse(xml))
        except DataError as error:
            issues.unreadable(xml, error)
    if not found and not issues.collect:
        raise DataError(
            f"{place.list_file or place.image_dir}: names no image", "Put images and XML files there."
        )
    return found


def _stems(place: VocPlace, images: dict[str, str], issues: Issues) -> list[tuple[str, int]]:
    """(name without ending, line of the list or 0) of the split's images."""
    if place.list_file is None:
        xml = {p.relative_to(place.xml_dir).with_suffix("").as_posix() for p in place.xml_dir.rglob("*.xml")}
        return [(stem, 0) for stem in sorted(images.keys() | xml)]
    stems: dict[str, int] = {}
    for number, line in enumerate(read_text(place.list_file).splitlines(), start=1):
        if not line.strip():
            continue
        stem = inner_path(line.strip())
        if stem is not None and place.image_dir.name == place.split:
            stem = stem.removeprefix(f"{place.split}/")
        if stem is None:
            issues.error(
                place.list_file, f"line {number}: {shorten(line)} is no name inside {place.image_dir}",
                "Give names without '..'.", kind="path leaves the folder",
            )  # fmt: skip
        else:
            stems.setdefault(stem, number)
    return list(stems.items())


def _header_sizes(
    found: dict[str, _Xml], image_dir: Path, issues: Issues
) -> dict[str, tuple[int, int] | None]:
    """Sizes of those images whose XML states none."""
    unstated = [name for name, xml in found.items() if xml.root is None or xml.root.find("size") is None]
    sizes = header_sizes([image_dir / name for name in unstated], issues)
    return dict(zip(unstated, sizes, strict=True))


def _stated_size(xml: _Xml, issues: Issues) -> tuple[int, int] | None:
    """(height, width) that the file states."""
    size = None if xml.root is None else xml.root.find("size")
    if size is None:
        return None
    height, width = (_number(size, key) for key in ("height", "width"))
    if (
        height is None
        or width is None
        or min(height, width) < 1
        or height != int(height)
        or width != int(width)
    ):
        issues.error(
            xml.path,
            f"<size> has height {shorten(_text(size, 'height'))} and width {shorten(_text(size, 'width'))},"
            " expected pixels",
            "Correct <size>, or remove it: it is then read from the image.",
            kind="image size",
        )
        return None
    return int(height), int(width)


def _objects(
    path: Path, root: Element, label_of: dict[str, int], issues: Issues
) -> list[tuple[int, list[float], bool]]:
    """(class index, [x, y, width, height], difficult) of every object."""
    rows = []
    for number, item in enumerate(root.findall("object"), start=1):
        name, frame = _text(item, "name"), item.find("bndbox")
        if not name or name not in label_of:
            message = f"object {number} has <name> {shorten(name)}, expected one of {shorten(list(label_of))}"
            issues.error(path, message, kind="unknown class")
            continue
        edges = [None if frame is None else _number(frame, key) for key in ("xmin", "ymin", "xmax", "ymax")]
        if None in edges:
            given = "no <bndbox>" if frame is None else f"<bndbox> {[_text(frame, c.tag) for c in frame]}"
            issues.error(
                path, f"object {number} ({name}) has {given[:100]}, expected xmin, ymin, xmax and ymax",
                kind="malformed box",
            )  # fmt: skip
            continue
        left, top, right, bottom = (edge for edge in edges if edge is not None)
        box = [float(value) for value in (left - 1, top - 1, right - left + 1, bottom - top + 1)]
        rows.append((label_of[name], box, _text(item, "difficult") not in ("", "0")))
    return rows


def _text(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(element: Element, tag: str) -> Decimal | None:
    """Decimal, so that adding and taking away the first pixel leaves a number as it was."""
    text = _text(element, tag)
    try:
        value = Decimal(text) if len(text) < 40 else None
    except InvalidOperation:
        return None
    return value if value is not None and value.is_finite() and abs(value) < 10**9 else None


def write_voc(root: Path, splits: dict[str, Annotations], place_image: Callable[[Path, Path], None]) -> None:
    """Writes `JPEGImages/SPLIT/`, `Annotations/SPLIT/`, `ImageSets/Main/SPLIT.txt` and the side file."""
    sides = {}
    for split, part in splits.items():
        sides[split] = Sidecar.of(part, crowds=False)
        stems: dict[str, None] = {}
        for index, name in enumerate(part.file_names):
            stem = str(Path(name).with_suffix(""))
            if stem in stems:
                raise DataError(
                    f"{name}: another image of {split} differs in its ending alone, and they would share an XML file",
                    "Rename one of them.",
                )
            stems[stem] = None
            place_image(part.image_dir / name, root / "JPEGImages" / split / name)
            xml = root / "Annotations" / split / f"{stem}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            tree = ElementTree(_document(part, index, name))
            tree.write(xml, encoding="utf-8", xml_declaration=True)
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{split}/{stem}\n" for stem in stems), encoding="utf-8")
    classes = next(iter(splits.values())).classes
    (root / SIDECAR).write_text(json.dumps(Sidecar.document(classes, sides)), encoding="utf-8")


def _document(annotations: Annotations, index: int, name: str) -> Element:
    document = Element("annotation")
    SubElement(document, "filename").text = Path(name).name
    size = SubElement(document, "size")
    height, width = annotations.sizes[index].tolist()
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        SubElement(size, tag).text = str(value)
    for row in range(annotations.starts[index], annotations.starts[index + 1]):
        item = SubElement(document, "object")
        SubElement(item, "name").text = annotations.classes.names[annotations.labels[row]]
        SubElement(item, "difficult").text = str(int(annotations.crowd[row]))
        # The shortest decimal of each number, added without rounding.
        x, y, w, h = (Decimal(repr(value)) for value in annotations.boxes[row].tolist())
        frame = SubElement(item, "bndbox")
        for tag, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
            SubElement(frame, tag).text = f"{value.normalize():f}"
    indent(document)
    return document
