"""Sections in; out comes Markdown, or one HTML page that needs nothing else (no network, no other file) and its folder."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from paqdetr._version import __version__
from paqdetr.drawing import data_uri
from paqdetr.files import write_text
from paqdetr.outputs import made_by, require_free, whole_folder
from paqdetr.report.section import Column, Figure, Findings, Gallery, Part, Section, Slides, Table
from paqdetr.serialize import plain
from paqdetr.text import printable

GENERATOR = "paqdetr analyze"
# Points: a wider plot is not shrunk to a phone's width, which would make its text too small, but scrolls.
_FITS_A_PHONE = 450
_PICTURE_SIDE = 640  # pixels
# A table of more columns takes the whole width of the page.
_FITS_A_HALF = 6
_GROUPS = (("bad", "What costs most"), ("good", "What it does well"), ("note", "Good to know"))


@dataclass(frozen=True, slots=True)
class Chapter:
    """A section of the page: about everything, or one for each of two models, whose parts of one name stand side by side."""

    sections: tuple[Section, ...]

    def rows(self) -> list[tuple[Part | None, ...]]:
        """The parts that stand side by side; None where a model has none of that name."""
        names = dict.fromkeys(part.name for section in self.sections for part in section.parts)
        by_name = [{part.name: part for part in section.parts} for section in self.sections]
        return [tuple(parts.get(name) for parts in by_name) for name in names]


@dataclass(frozen=True, slots=True)
class Heading:
    """What stands over the page.

    Attributes:
        title: of the page.
        models: the names of the one or two models, in the order of each chapter's sections.
        facts: (what, value) in small print: data, checkpoints, versions.
    """

    title: str
    models: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def render(heading: Heading, chapters: Sequence[Chapter]) -> str:
    """The page.

    Args:
        heading: what stands over it.
        chapters: in order; sections' keys and the names within a section are letters, digits and underscores.

    Raises:
        ValueError: two parts of one model share a name, or a name is not fit to be one.
    """
    _require_names(chapters)
    shown = []
    for chapter in chapters:
        first, (shared, own) = chapter.sections[0], _leads(chapter.sections)
        rows = [[_shown(part, place) for place, part in enumerate(row)] for row in chapter.rows()]
        shown.append({"key": first.key, "title": first.title, "fold": first.fold, "lead": shared, "own_leads": own})
        shown[-1] |= {"paired": len(chapter.sections) > 1, "rows": rows}
    script = _resource("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not what is marked safe
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(_resource("report.html.j2")).render(
        heading=heading,
        folds=[(fold, list(own)) for fold, own in groupby(shown, key=lambda chapter: chapter["fold"])],
        style=_resource("report.css"),
        script=script,
        script_hash=digest,
        generator=f"{GENERATOR} {__version__}",
    )


def _require_names(chapters: Sequence[Chapter]) -> None:
    seen: set[tuple[int, str]] = set()
    for place, part in _parts(chapters):
        if not part.name.isidentifier() or not part.name.isascii():
            raise ValueError(f"{part.name!r}: expected letters, digits and underscores")
        if (place, part.name) in seen:
            raise ValueError(f"{part.name!r}: two parts of one model have this name")
        seen.add((place, part.name))


def _parts(chapters: Sequence[Chapter]) -> Iterator[tuple[int, Part]]:
    """(0, or 1 for those of the second model, part)."""
    for chapter in chapters:
        for place, section in enumerate(chapter.sections):
            for part in section.parts:
                yield place, part


def _leads(sections: Sequence[Section]) -> tuple[str, list[str]]:
    """What the leads have in common, by whole sentences from the start; and what is each model's own."""
    sentences = [re.split(r"(?<=\.) ", section.lead) for section in sections]
    shared = 0
    while all(len(own) > shared and own[shared] == sentences[0][shared] for own in sentences):
        shared += 1
    return " ".join(sentences[0][:shared]), [" ".join(own[shared:]) for own in sentences]


def _resource(name: str) -> str:
    return resources.files("paqdetr.report").joinpath(name).read_text(encoding="utf-8")


def _shown(part: Part | None, place: int) -> dict[str, Any] | None:
    """What the template shows of a part."""
    if part is None:
        return None
    shown: dict[str, Any] = {
        "kind": type(part).__name__.lower(),
        "name": part.name,
        "id": f"{'ab'[place]}-{part.name}",
        "caption": part.caption,
        "file": data_file(part, place),
    }
    if isinstance(part, Figure):
        shown["uri"] = f"data:image/svg+xml;base64,{base64.b64encode(part.svg.encode()).decode()}"
        width = re.search(r'<svg [^>]*?\bwidth="([\d.]+)', part.svg)
        shown["large"] = width is not None and float(width[1]) > _FITS_A_PHONE
    elif isinstance(part, Findings):
        kinds = [(kind, title, [item for item in part.items if item.kind == kind]) for kind, title in _GROUPS]
        shown |= {"owner": part.owner, "wide": not part.owner}
        shown["groups"] = [group for group in kinds if group[2]]
    elif isinstance(part, Gallery):
        shown["filters"] = part.filters
        shown["tiles"] = [
            {
                "title": tile.title,
                "path": tile.path,
                "short": "/".join(Path(tile.path).parts[-2:]),
                "uri": data_uri(tile.image, max(tile.image.size)),  # drawn in the size that is shown
                "width": tile.image.width,
                "height": tile.image.height,
                "tags": json.dumps(sorted(tile.tags)),
            }
            for tile in part.tiles
        ]
    elif isinstance(part, Table):
        shown["wide"] = len(part.columns) > _FITS_A_HALF
        shown["columns"] = part.columns
        shown["rows"] = [
            [
                {"text": written(v, c), "value": "" if _missing(v) else str(v)}
                for c in part.columns
                for v in (row.get(c.key),)
            ]
            for row in part.rows
        ]
    elif isinstance(part, Slides):
        shown["slides"] = [
            {"label": label, "uri": data_uri(image, _PICTURE_SIDE), "width": image.width, "height": image.height}
            for label, image in zip(part.labels, part.images, strict=True)
        ]
    else:
        shown |= {"uri": data_uri(part.image, _PICTURE_SIDE), "width": part.image.width, "height": part.image.height}
    return shown


def data_file(part: Part, place: int) -> str | None:
    """Where the numbers behind a part are written, in the report's folder; None if it has none."""
    if part.data is None:
        return None
    return f"data/{part.name}.json" if place == 0 else f"data/against/{part.name}.json"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def written(value: Any, column: Column) -> str:
    """A value as a table shows it."""
    if _missing(value):
        return "\N{EN DASH}"
    if column.kind == "text":
        return str(value)
    if column.kind == "integer":
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if column.kind == "percent":
        return f"{100 * float(value):.1f} %"
    number = float(value)
    if column.kind == "amount":
        return f"{number:.1f}"
    if abs(number) < 0.0005:
        return "0.000"  # and no sign before it
    if column.kind == "difference":
        return f"{number:+.3f}"
    return f"{number:.3f}" if abs(number) < 10 else f"{number:.4g}"


def require_report_place(output: Path) -> None:
    """Raise ConfigError unless the folder is new, empty, or an earlier report, which is replaced."""
    require_free(output, lambda file: _is_part(file, output))


def _is_part(file: Path, report: Path) -> bool:
    """Whether a report has such a file: the page, or numbers behind one of its parts."""
    name = file.relative_to(report).as_posix()
    if name == "index.html":
        return made_by(file) == GENERATOR
    if name in ("data", "data/against"):  # empty
        return True
    if not re.fullmatch(r"data/(against/)?\w+\.json", name):
        return False
    with file.open("rb") as opened:
        return opened.read(20).startswith(b'{\n "caption": ')


def write_folder(output: Path, page: str, chapters: Sequence[Chapter]) -> None:
    """Write page and numbers in place of `output`.

    Raises:
        ConfigError: as `require_report_place`.
        StorageError: it cannot be written; what was there before still is.
    """
    require_report_place(output)
    with whole_folder(output, replace=True) as new:
        (new / "data").mkdir()
        (new / "index.html").write_text(page, encoding="utf-8")
        for place, part in _parts(chapters):
            if (name := data_file(part, place)) is None:
                continue
            (new / name).parent.mkdir(exist_ok=True)
            text = json.dumps({"caption": part.caption, "data": plain(part.data)}, indent=1)
            (new / name).write_text(text, encoding="utf-8")


def to_markdown(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], *, plots: str) -> str:
    """A page with the tables in full, and plots as images.

    Args:
        facts: (what, value), under the title.
        plots: the folder of the SVG files, relative to the page.
    """
    blocks = [f"# {title}", "\n".join(f"- {what}: {value}" for what, value in facts)]
    for section in sections:
        blocks += [f"## {section.title}", section.lead]
        for part in section.parts:
            if isinstance(part, Table):
                blocks += [to_table(part), part.caption]
            elif isinstance(part, Figure):
                blocks += [f"![{part.caption}]({plots}/{part.name}.svg)", part.caption]
    return "\n\n".join(blocks) + "\n"


def to_table(table: Table) -> str:
    """A Markdown table."""
    columns = table.columns
    lines = [[column.heading for column in columns]]
    lines.append(["---" if column.kind == "text" else "---:" for column in columns])
    for row in table.rows:
        cells = (written(row.get(column.key), column) for column in columns)
        lines.append([cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_plots(sections: Sequence[Section], folder: Path) -> None:
    """Every plot as an SVG file of its own."""
    for section in sections:
        for part in section.parts:
            if isinstance(part, Figure):
                write_text(folder / f"{part.name}.svg", part.svg)
