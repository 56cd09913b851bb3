"""The pieces that a report is made of. An analysis returns a `Section`; only `page` knows of HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL.Image import Image

from paqdetr.serialize import plain


@dataclass(frozen=True, slots=True)
class _Part:
    """What all parts have.

    Attributes:
        name: letters, digits and underscores, unique in a report; the numbers behind a part are written to data/<name>.json.
        caption: what is seen, in one or two plain sentences.
    """

    name: str
    caption: str


@dataclass(frozen=True, slots=True)
class Figure(_Part):
    """A plot.

    Attributes:
        svg: the plot, an SVG document.
        data: the numbers behind it, ready for json.
    """

    svg: str
    data: Any


@dataclass(frozen=True, slots=True)
class Picture(_Part):
    """A raster image, such as a photograph with boxes on it.

    Attributes:
        image: RGB.
    """

    image: Image
    data: Any = None


@dataclass(frozen=True, slots=True)
class Slides(_Part):
    """Pictures of one size behind a slider: decoder layers, queries.

    Attributes:
        labels: what the slider says at each, such as "layer 1".
        images: as many.
    """

    labels: tuple[str, ...]
    images: tuple[Image, ...]
    data: Any = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence for the reader, derived from figures.

    Attributes:
        kind: what it is: a strength, a weakness, or neither.
        text: what was found, with its figures.
        advice: what to do about it, as a sentence; "" if nothing is to be done.
        where: key of the section that shows more; "" if there is none.
        cost: AP that it costs, about; weaknesses are listed by it.
    """

    kind: Literal["good", "bad", "note"]
    text: str
    advice: str = ""
    where: str = ""
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Findings(_Part):
    """Findings in three groups: strengths, weaknesses, notes.

    Attributes:
        items: in the order in which each group is shown.
        owner: "A" or "B" of the model that they are about, which then stands beside the other's; "" if they are about all.
    """

    items: tuple[Finding, ...]
    owner: str = ""

    @property
    def data(self) -> dict[str, Any]:
        return {"rows": self.items}


@dataclass(frozen=True, slots=True)
class Tile:
    """A picture of a gallery.

    Attributes:
        image: RGB.
        title: a few words, such as the counts.
        path: of the file that is shown.
        tags: what it is found by: a value of each of the gallery's filters, "" for any.
    """

    image: Image
    title: str
    path: str
    tags: frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Gallery(_Part):
    """Pictures in a grid, which enlarge, and filters that choose among them.

    Attributes:
        filters: (what, its values) of each filter.
        tiles: in the order they are shown.
    """

    filters: tuple[tuple[str, tuple[str, ...]], ...]
    tiles: tuple[Tile, ...]
    data: Any = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: all that is known of it, in one place.

    Attributes:
        key: of its values in the table's rows and in json.
        heading: on the page.
        kind: how values are written and sorted. A figure has three decimals, a difference also its sign, an amount one.
        value: item of a row -> value, for `make_table`; None: what the item has under `key`, as an entry or an attribute.
    """

    key: str
    heading: str
    kind: Literal["text", "integer", "figure", "difference", "amount", "percent"] = "figure"
    value: Callable[[Any], Any] | None = None

    def of(self, item: Any) -> Any:
        """The value for an item; None where an entry is missing."""
        if self.value is not None:
            return self.value(item)
        return item.get(self.key) if isinstance(item, Mapping) else getattr(item, self.key)


@dataclass(frozen=True, slots=True)
class Table(_Part):
    """A table that can be sorted by any column; None is shown as a dash.

    Attributes:
        columns: first to last.
        rows: values by column key, ready for json.
    """

    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def data(self) -> dict[str, Any]:
        return {"rows": self.rows}


Part = Figure | Picture | Slides | Table | Findings | Gallery


def make_table(
    name: str,
    caption: str,
    columns: Sequence[Column],
    items: Iterable[Any],
    *,
    empty: bool = True,
    digits: int | None = None,
) -> Table:
    """A row for each item, with what each column makes of it. Items that are mappings keep their other entries in the json.

    Args:
        empty: keep columns in which no row has anything.
        digits: of numbers, as of `plain`.
    """
    rows = []
    for item in items:
        kept = dict(item) if isinstance(item, Mapping) else {}
        rows.append(plain(kept | {column.key: column.of(item) for column in columns}, digits))
    used = [column for column in columns if empty or any(row[column.key] not in (None, "") for row in rows)]
    return Table(name, caption, tuple(used), tuple(rows))


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter of a report.

    Attributes:
        key: its anchor, unique in a report.
        title: a few words.
        lead: what the reader learns here and how to read it, in plain sentences.
        parts: in the order they are shown.
        fold: title of what is folded away at first, together with the sections beside it that have the same; "" if open.
    """

    key: str
    title: str
    lead: str
    parts: tuple[Part, ...] = field(default=())
    fold: str = ""
