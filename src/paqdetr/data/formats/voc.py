"""Pascal VOC: one XML file per image, and lists of the images of every split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from paqdetr.data.annotations import DECIMALS, Annotations, Builder, Issues
from paqdetr.data.files import (
    composed,
    files_in,
    folder_in,
    folders_in,
    header_sizes,
    is_split,
    list_files,
    list_pictures,
    listed_names,
    meaning,
    numbered_lines,
)
from paqdetr.errors import DataError
from paqdetr.files import read_bytes
from paqdetr.images import IMAGE_EXTENSIONS
from paqdetr.label_files import voc_document
from paqdetr.structures import ClassTable
from paqdetr.text import shorten
from paqdetr.values import as_flag, is_coordinate

# What neither an XML text nor a line of a list holds as it is, and no name at all.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]|^\\s|\\s$|^$")


# In small letters: the folders of XML files and of pictures.
_XML_FOLDERS = ("annotations", "annotation", "xmls", "xml", "labels")
_PICTURE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")


@dataclass(frozen=True, slots=True)
class VocPlace:
    """One split: the folders of images and XML files, and the list of its images (None: all there are).

    Attributes:
        all_xml_dirs: the XML folders of all splits: VOC has no list of classes, so the classes are the names that occur.
        but: a list of images that are not of this split, though `list_file` has them.
        bare: where there is no list: images without an XML file are of the split too.
    """

    split: str
    image_dir: Path
    xml_dir: Path
    list_file: Path | None
    all_xml_dirs: tuple[Path, ...]
    but: Path | None = None
    bare: bool = True

    def read(self, issues: Issues) -> Annotations:
        """Reads and verifies one split. Objects marked difficult are crowds: not trained on, and no mistake where found.

        VOC counts pixels from 1 and includes the last: xmin 1, xmax 10 is a box of 10 pixels from the left edge.

        Raises:
            DataError: a list or an XML file is malformed, or an image is missing.
        """
        classes = _classes(self.all_xml_dirs)
        label_of = {name: label for label, name in enumerate(classes.names)}
        if not classes.names:
            issues.error(self.xml_dir, "no XML file in it names an object", kind="class")
        found = _images(self, issues)
        headers = _header_sizes(found, self.image_dir, issues)
        builder = Builder()
        for name, xml in found.items():
            size = _stated_size(xml, issues) or headers.get(name)
            if size is None:
                continue
            image = builder.add_image(name, name, height=size[0], width=size[1])
            for label, box, difficult in [] if xml.root is None else _objects(xml.path, xml.root, label_of, issues):
                builder.add_box(image, label, box, crowd=difficult)
        return builder.build(source=self.list_file or self.xml_dir, image_dir=self.image_dir, classes=classes)


def voc_places(root: Path) -> dict[str, VocPlace]:
    """The splits of a VOC folder, by the names of their lists or folders.

    A folder of XML files and one of pictures, whose splits are `ImageSets/Main/*.txt` or folders in both; the same in folders for
    years (`VOC2012`); or a folder for each split that holds such two, or XML files among pictures.

    Raises:
        DataError: XML files lie beside the folders of splits.
    """
    if pair := _pair(root):
        return _of_pair(root, *pair)
    years = {f: pair for f in folders_in(root) if f.name[:3] == "VOC" and (pair := _pair(f))}
    if years:  # the splits of the last one have plain names
        last, xml_dirs = max(f.name for f in years), tuple(xml for xml, _ in years.values())
        return {
            f"{split}{f.name[3:] if f.name != last else ''}": replace(place, all_xml_dirs=xml_dirs)
            for f, pair in years.items()
            for split, place in _of_pair(f, *pair).items()
        }
    sources = {f.name: (f, f) for f in folders_in(root) if _is_mixed(f)}
    sources |= {f.name: pair for f in folders_in(root) if meaning(f.name) and (pair := _pair(f))}
    if _is_mixed(root):
        if sources:
            raise _loose_files(root, sources)
        sources = {"all": (root, root)}
    all_xml_dirs = tuple(xml for xml, _ in sources.values())
    return {name: VocPlace(name, images, xml, None, all_xml_dirs) for name, (xml, images) in sources.items()}


def _is_mixed(folder: Path) -> bool:
    """Whether XML files lie among pictures."""
    endings = {path.suffix.lower() for path in files_in(folder)}
    return ".xml" in endings and bool(endings & IMAGE_EXTENSIONS)


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """The folders of XML files and of pictures."""
    inside = {below.name.lower(): below for below in folders_in(folder)}
    xml = next((inside[name] for name in _XML_FOLDERS if name in inside), None)
    images = next((inside[name] for name in _PICTURE_FOLDERS if name in inside), None)
    if xml is None or images is None:
        return None
    xml = next((below for below in folders_in(xml) if below.name.lower() in _XML_FOLDERS), xml)
    usual = (xml.name, images.name) == ("Annotations", "JPEGImages")
    return (xml, images) if usual or _xml_files(xml, Issues(collect=True)) else None


def _of_pair(folder: Path, xml: Path, images: Path) -> dict[str, VocPlace]:
    lists = _lists(folder)
    val = next((file for name, file in lists.items() if meaning(name) == "val"), None)
    if lists:
        return {
            split: VocPlace(split, *_own_folder(images, xml, split), file, (xml,), val if split == "trainval" else None)
            for split, file in lists.items()
        }
    splits = [below.name for below in folders_in(xml) if meaning(below.name)]
    if not splits:
        return {"all": VocPlace("all", images, xml, None, (xml,))}
    if any(file.suffix.lower() == ".xml" for file in files_in(xml)):
        raise _loose_files(xml, splits)
    inside = {below.name.lower(): below for below in folders_in(images)}
    return {
        f.name: VocPlace(f.name, inside.get(f.name.lower(), images), f, None, (xml,), bare=f.name.lower() in inside)
        for f in folders_in(xml)
    }


def _loose_files(folder: Path, splits: Iterable[str]) -> DataError:
    return DataError(
        f"{folder}: holds XML files beside the folders of the splits {', '.join(splits)}",
        "Move them into one of these.",
    )


def _lists(folder: Path) -> dict[str, Path]:
    """Lists of images by the split's name, without those of single classes (aeroplane_train.txt) and doubles of others. Under the
    plain name of a split there is none of a single class."""
    sets = folder_in(folder, "ImageSets")
    files = files_in(folder_in(sets, "Main")) or files_in(sets)
    lists = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    lists = {name: file for name, file in lists.items() if is_split(name) or not _is_of_one_class(file)}
    if any(meaning(name) == "train" for name in lists):
        lists.pop("trainval", None)
    return lists


def _is_of_one_class(list_file: Path) -> bool:
    """Whether every line says of an image if the class is there: "000012 -1"."""
    lines = [line.split() for _, line in numbered_lines(list_file)]
    return bool(lines) and all(len(words) == 2 and words[1] in ("-1", "0", "1") for words in lines)


def _own_folder(images: Path, xml: Path, split: str) -> tuple[Path, Path]:
    """Each split's own subfolder, as `write_voc` makes them, if there is one in both."""
    if (images / split).is_dir() and (xml / split).is_dir():
        return images / split, xml / split
    return images, xml


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
            f"{path}: no valid XML at line {line}, column {column + 1}: {str(error).split(':')[0]}", "Export it again."
        ) from None
    except DefusedXmlException:
        raise DataError(f"{path}: has a document type or entities, which is not allowed", "Remove them.") from None
    except (
        ValueError,
        LookupError,
        RecursionError,
    ) as error:  # such as an encoding named in the file that is not its own
        raise DataError(f"{path}: no valid XML: {error}", "Export it again.") from None


def _classes(folders: tuple[Path, ...]) -> ClassTable:
    """All names that occur in any split, in alphabetical order; malformed files are reported by their own split."""
    names: set[str] = set()
    silent = Issues(collect=True)
    for path in sorted(folder / name for folder in folders for name in _xml_files(folder, silent)):
        try:
            root = _parse(path)
        except DataError:
            continue
        names |= {name for found in root.findall("object") if (name := _text(found, "name"))}
    return ClassTable(tuple(range(1, len(names) + 1)), tuple(sorted(names)))


def _xml_files(folder: Path, issues: Issues) -> list[str]:
    return [name for name in list_files(folder, issues) if name.lower().endswith(".xml")]


def _stem(name: str) -> str:
    """What a picture and its XML file have in common."""
    return composed(name.rpartition(".")[0])


def _images(place: VocPlace, issues: Issues) -> dict[str, _Xml]:
    """File name -> XML of every image of the split."""
    pictures: dict[str, list[str]] = defaultdict(list)
    for name in list_pictures(place.image_dir, issues):
        pictures[_stem(name)].append(name)
    files = {_stem(name): place.xml_dir / name for name in _xml_files(place.xml_dir, Issues(collect=True))}
    stems = _stems(place, {*pictures, *files} if place.bare else {*files}, issues)
    found: dict[str, tuple[str, _Xml]] = {}  # by stem
    taken: set[str] = set()
    for stem in sorted(stems, key=lambda stem: stem not in files):  # those with a file first: it may name any picture
        xml = _Xml(files.get(stem, place.xml_dir / f"{stem}.xml"), None)
        try:
            xml.root = _parse(xml.path) if stem in files else None
        except DataError as error:
            issues.unreadable(xml.path, error)
            continue
        name = _picture(stem, xml.root, pictures, files)
        if name is None:
            where = f"line {stems[stem]} of {place.list_file}" if stems[stem] else str(xml.path)
            issues.error(
                place.image_dir / stem, f"no image of this name, though {where} is about it",
                "Put the image there, or remove the entry.", kind="missing image",
            )  # fmt: skip
        elif name not in taken:
            found[stem] = (name, xml)
            taken.add(name)
        for other in pictures.get(stem, []):
            if name is not None and other not in taken:
                message = f"left out: it and {name} would have the same XML file, {xml.path.name}"
                issues.doubt(place.image_dir / other, message, kind="two images of one label file")
    if not found and not issues.collect:
        raise DataError(f"{place.list_file or place.image_dir}: names no image", "Put images and XML files there.")
    return dict(found[stem] for stem in stems if stem in found)


def _picture(stem: str, root: Element | None, pictures: dict[str, list[str]], files: dict[str, Path]) -> str | None:
    """The picture of an XML file. Of those that are called like it the one that `<filename>` names, or the first; where there are
    none the one that `<filename>` names, unless that has an XML file of its own."""
    own = pictures.get(stem, [])
    base = "" if root is None else composed(_text(root, "filename").replace("\\", "/").rpartition("/")[2])
    stated = f"{stem.rpartition('/')[0]}/{base}".removeprefix("/")
    candidates = own or (pictures.get(_stem(stated), []) if _stem(stated) not in files else [])
    return next((name for name in candidates if composed(name) == stated), own[0] if own else None)


def _stems(place: VocPlace, all_stems: set[str], issues: Issues) -> dict[str, int]:
    """Name without ending -> line of the list, or 0, of the split's images."""
    if place.list_file is None:
        return dict.fromkeys(sorted(all_stems), 0)
    stems: dict[str, int] = {}
    own = f"{place.split}/" if place.image_dir.name == place.split else ""
    for number, stem in listed_names(place.list_file, issues, folder=place.image_dir):
        stems.setdefault(composed(stem.removeprefix(own)), number)
    for _, line in [] if place.but is None else numbered_lines(place.but):
        stems.pop(composed(line), None)
    return stems


def _header_sizes(found: dict[str, _Xml], image_dir: Path, issues: Issues) -> dict[str, tuple[int, int] | None]:
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
    if height is None or width is None or min(height, width) < 1 or height != int(height) or width != int(width):
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
        flags = {flag: as_flag(_text(item, flag)) for flag in ("difficult", "truncated")}
        unknown = next((flag for flag, value in flags.items() if value is None), None)
        if unknown is not None:
            message = f"object {number} ({name}) has <{unknown}> {shorten(_text(item, unknown))}, expected 0 or 1"
            issues.error(path, message, kind="flag")
            continue
        left, top, right, bottom = (edge for edge in edges if edge is not None)
        box = [round(value, DECIMALS) for value in (left - 1, top - 1, right - left + 1, bottom - top + 1)]
        if min(box[2:]) < 0:
            message = f"object {number} ({name}) has <bndbox> from {left:g}, {top:g} to {right:g}, {bottom:g}, expected the left"
            issues.error(path, f"{message} upper corner first", kind="malformed box")
            continue
        rows.append((label_of[name], box, bool(flags["difficult"])))
    return rows


def _text(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(element: Element, tag: str) -> float | None:
    try:
        value = float(_text(element, tag))
    except ValueError:
        return None
    return value if is_coordinate(value) else None


def write_voc(root: Path, splits: dict[str, Annotations], place_image: Callable[[Path, Path], None]) -> None:
    """Writes `JPEGImages/SPLIT/`, `Annotations/SPLIT/` and `ImageSets/Main/SPLIT.txt`."""
    for split, part in splits.items():
        for name in (*part.classes.names, *part.file_names):
            if _UNWRITABLE.search(name):
                raise DataError(f"{part.source}: VOC has no place for the name {shorten(name)}", "Rename it.")
        stems: dict[str, None] = {}
        for index, name in enumerate(part.file_names):
            stem = str(Path(name).with_suffix(""))
            if stem in stems:
                raise DataError(
                    f"{part.image_dir / name}: another image of {split} differs in its ending alone, and they would share an "
                    "XML file",
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


def _document(annotations: Annotations, index: int, name: str) -> Element:
    height, width = annotations.sizes[index].tolist()
    objects = [
        (
            annotations.classes.names[annotations.labels[row]],
            {"difficult": int(annotations.crowd[row])},
            annotations.boxes[row].tolist(),
        )
        for row in range(annotations.starts[index], annotations.starts[index + 1])
    ]
    return voc_document(name, (width, height), objects)
