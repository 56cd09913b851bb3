"""Where the program prints: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from paqdetr.text import printable


class _PlainConsole(Console):
    """Prints text of files as it is: no markup, for which rich would take lists in brackets, and no terminal escapes."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **how)


results = _PlainConsole()
errors = _PlainConsole(stderr=True)


class Ended(Exception):
    """A verb has said what there is to say, and ends the program with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def print_styled(console: Console, *parts: str | tuple[str, str]) -> None:
    """One line from plain pieces and (piece, style) pairs; a line break inside a piece becomes a space."""
    plain = [part if isinstance(part, tuple) else (part, "") for part in parts]
    console.print(
        Text.assemble(*((printable(text.replace("\n", " ")), style) for text, style in plain)), soft_wrap=True
    )


def print_columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> None:
    """Rows in aligned columns, two spaces apart and never cut: names stay whole in a narrow window and in a pipe.

    Args:
        rows: cells without line breaks; as many in each row.
        right: the columns that end in line rather than begin.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        results.print("  ".join(cells).rstrip(), soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; the function takes (done, total). Silent where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def show(value: float | None) -> str:
    """A figure in [0, 1], or a dash where nothing defines it."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
