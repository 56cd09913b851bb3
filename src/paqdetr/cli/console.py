"""Where the program prints: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
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


class LossyStream:
    """A standard stream that drops what it cannot write: a training does not end because nobody reads its output any more
    (`| head`), its terminal was closed, or the disk with its log is full.

    Attributes:
        failure: the first error of a write, if there was one.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError:  # a signal has come in the middle of a write, and its handler writes
            return
        except OSError as error:
            self.failure = self.failure or error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # gone for good
                self.discard()

    def discard(self) -> None:
        """Write to nowhere from now on, what is still in a buffer included."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def make_streams_lossy() -> None:
    """Let standard output and standard error of this process drop what they cannot write."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LossyStream):  # None: closed by the shell
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # of what its encoding lacks
            setattr(sys, name, LossyStream(stream))


def finish_streams() -> str | None:
    """Write what is left; why something of standard output was lost, but for a reader that has seen enough."""
    lost = None
    for stream in (sys.stderr, sys.stdout):
        if isinstance(stream, LossyStream):
            stream.flush()
            if stream.failure is not None:
                stream.discard()  # else the interpreter would try once more, and end with code 120
                if stream is sys.stdout and stream.failure.errno not in (errno.EPIPE, errno.EIO):
                    lost = stream.failure.strerror
    return lost


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
