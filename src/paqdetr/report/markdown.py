"""Sections of a report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paqdetr.files import write_text
from paqdetr.report.page import written
from paqdetr.report.section import Figure, Section, Table


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
    lines += [[_cell(written(row.get(column.key), column)) for column in columns] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_plots(sections: Sequence[Section], folder: Path) -> None:
    """Every plot as an SVG file of its own."""
    for section in sections:
        for part in section.parts:
            if isinstance(part, Figure):
                write_text(folder / f"{part.name}.svg", part.svg)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
