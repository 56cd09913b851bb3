"""What annotations and predictions of one image look like in label files: the XML of Pascal VOC, a line of YOLO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from xml.etree.ElementTree import Element, SubElement, indent


def yolo_line(number: int, box: Sequence[float], size: tuple[int, int], score: float | None = None) -> str:
    """A line of YOLO's text file: class, centre and sides as shares of the image, and the score if there is one.

    Args:
        number: of the class, from 0.
        box: [x, y, width, height] in pixels, inside the image.
        size: (height, width) of the image in pixels.
        score: in [0, 1]; lines that have one have six decimals each, those to train on as many as it takes.
    """
    (x, y, w, h), (height, width) = box, size
    shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    values = [f"{x:.10g}" for x in shares] if score is None else [f"{x:.6f}" for x in (*shares, score)]
    return f"{number} {' '.join(values)}\n"


def voc_document(
    name: str,
    size: tuple[int, int],
    objects: Iterable[tuple[str, Mapping[str, object], Sequence[float]]],
    *,
    database: str | None = None,
) -> Element:
    """The XML of Pascal VOC for one image; texts are written as they are, and XML holds no control characters.

    Args:
        name: of the image file; a path's last part is written.
        size: (width, height) in pixels.
        objects: class name, further tags with their values, and [x, y, width, height] in pixels from 0; VOC's begin at 1.
        database: what the annotations come from.
    """
    document = Element("annotation")
    if database is not None:
        SubElement(SubElement(document, "source"), "database").text = database
    SubElement(document, "filename").text = PurePosixPath(name).name
    dimensions = SubElement(document, "size")
    for tag, value in zip(("width", "height", "depth"), (*size, 3), strict=True):
        SubElement(dimensions, tag).text = str(value)
    for label, tags, (x, y, width, height) in objects:
        item = SubElement(document, "object")
        SubElement(item, "name").text = label
        for tag, value in tags.items():
            SubElement(item, tag).text = str(value)
        frame = SubElement(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height), strict=True):
            SubElement(frame, tag).text = f"{value:.4f}".rstrip("0").rstrip(".")
    indent(document)
    return document
