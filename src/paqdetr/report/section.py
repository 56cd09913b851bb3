"""The pieces that a report is made of. An analysis returns a `Section`; only `page` knows of HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot.

    Attributes:
        name: letters, digits and underscores, unique in a report; its numbers are written to data/<name>.json.
        caption: what is seen, in one or two plain sentences.
        svg: the plot, an SVG document.
        data: the numbers behind it, ready for json.
    """

    name: str
    caption: str
    svg: str
    data: Any


@dataclass(frozen=True, slots=True)
class Picture:
    """A raster image, such as a photograph with boxes on it.

    Attributes:
        name, caption, data: as of `Figure`.
        image: RGB.
    """

    name: str
    caption: str
    image: Image
    data: Any = None


@dataclass(frozen=True, slots=True)
class Slides:
    """Pictures of one size behind a slider: decoder layers, queries.

    Attributes:
        name, caption, data: as of `Figure`.
        labels: what the slider says at each, such as "layer 1".
        images: as many.
    """

    name: str
    caption: str
    labels: tuple[str, ...]
    images: tuple[Image, ...]
    data: Any = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: a key of its rows, its heading, and how its values are written and sorted.

    A figure has three decimals, a difference of figures also its sign, an amount one decimal.
    """

    key: str
    heading: str
    kind: Literal["text", "integer", "figure", "difference", "amount", "percent"] = "figure"


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be sorted by any column; None is shown as a dash.

    Attributes:
        name, caption: as of `Figure`.
        columns: first to last.
        rows: values by column key, ready for json.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]


Part = Figure | Picture | Slides | Table


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter of a report.

    Attributes:
        key: its anchor, unique in a report.
        title: a few words.
        lead: what the reader learns here and how to read it, in plain sentences.
        parts: in the order they are shown.
    """

    key: str
    title: str
    lead: str
    parts: tuple[Part, ...] = field(default=())
