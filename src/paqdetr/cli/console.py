"""What all verbs share: output files, and the consoles (results to standard output, the rest to standard error)."""

from __future__ import annotations

import errno
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paqdetr._threads import quick_imports
from paqdetr.errors import ConfigError
from paqdetr.text import printable

if TYPE_CHECKING:
    from paqdetr.runtime.predict import Predicts


class OutputFiles:
    """What a verb writes, by the name of the option that says where.

    Args:
        command: the verb, as in "paqdetr eval"; only its own files of earlier calls are replaced.
        overwrite: any file is replaced.
        paths: where; None for an option that was not given. `results_out` is for COCO results.

    Raises:
        ConfigError: one cannot be written or would replace something else, or two are one.
    """

    def __init__(self, command: str, *, overwrite: bool = False, **paths: Path | None) -> None:
        from paqdetr.outputs import RESULTS, require_replaceable

        self._paths = {name: path for name, path in paths.items() if path is not None}
        self._makers = {name: RESULTS if name == "results_out" else command for name in paths}
        self._overwrite = overwrite
        taken: dict[Path, str] = {}
        for name, path in self._paths.items():
            option = f"--{name.replace('_', '-')}"
            other = taken.setdefault(path.resolve(), f"{option} {path}")
            if other != f"{option} {path}":
                raise ConfigError(f"{option} {path}: the same file as {other}", "name two files")
            try:
                require_replaceable(path, self._makers[name], overwrite=overwrite)
            except ConfigError as error:
                raise ConfigError(f"{option} {error.message}", error.remedy) from None

    def write(self, name: str, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Write a json file; nothing if its option was not given.

        Raises:
            StorageError: it cannot be written.
        """
        from paqdetr.outputs import write_json

        if name in self._paths:
            write_json(self._paths[name], content, maker=self._makers[name], overwrite=self._overwrite)


def open_model(path: Path, device: str | None = None) -> Predicts:
    """A checkpoint, the best of a run, or an exported model, for which torch is not imported.

    Raises:
        UserError: it cannot be read, or not run here.
    """
    from paqdetr.loading import is_exported, load, require_model

    file = require_model(path)
    if is_exported(file):
        return load(file, device=device)
    note_unfinished(path)
    with quick_imports():
        return load(file, device=device)


def note_unfinished(path: Path) -> None:
    """A note if a path is the folder of a run that has not come to its end, or a checkpoint in one."""
    from paqdetr.runs import Run

    run = Run(path if path.is_dir() else path.parent)
    if run.config_file.is_file() and run.metrics_file.is_file() and not run.finished:
        note(f"{run.output} is {run.status}; `paqdetr info {run.output}` says how it goes on")


class _PlainConsole(Console):
    """Prints text of files as it is: no markup, for which rich would take lists in brackets, and no terminal escapes. Text is
    not wrapped, titles of tables neither, which rich would fold to the width of the table; tables fit the terminal."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **how: Any) -> None:
        for one in objects:
            if isinstance(one, Table) and one.title is not None:
                self.print(one.title)
                one.title = None  # tables are made to be printed once
        how.setdefault("soft_wrap", not any(isinstance(one, Table) for one in objects))
        super().print(*objects, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **how)


results = _PlainConsole()
errors = _PlainConsole(stderr=True)


class _PlainFormatter(logging.Formatter):
    """Log lines without terminal escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class Ended(Exception):
    """A verb has reported its outcome, and ends the program with this exit code."""

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
    """Let standard output and standard error of this process drop what they cannot write, and escape what is no plain text."""
    if logging.lastResort is not None:  # prints warnings where nobody has set up logging
        logging.lastResort.setFormatter(_PlainFormatter())
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
    console.print(Text.assemble(*((printable(text.replace("\n", " ")), style) for text, style in plain)))


def note(text: str, kind: str = "note", style: str = "bold yellow") -> None:
    """A line on standard error, such as `note: ...`."""
    print_styled(errors, (f"{kind}:", style), f" {text}")


def interrupted(what: str, exit_code: int, *, resume: bool) -> Ended:
    """Print how an interrupted verb is continued; to be raised.

    Args:
        what: is saved.
        resume: whether --resume was given already.
    """
    from paqdetr.environment import command_line

    note(f"{what}; continue with", "interrupted", "bold")
    errors.print(f"  {command_line()}{'' if resume else ' --resume'}")
    return Ended(exit_code)


def table(title: str | None, left: Sequence[str], right: Sequence[str] = (), *, no_wrap: bool = False) -> Table:
    """An empty table with a heading for each column: text, then numbers.

    Args:
        no_wrap: headings and numbers stay on one line, unless the terminal is so narrow that they would be cut.
    """
    made, stiff = Table(title=title, title_justify="left"), no_wrap and results.width >= 72
    for heading in left:  # what the numbers leave of the width must not be nothing
        made.add_column(heading, overflow="fold", min_width=8 if stiff else None)
    for heading in right:
        made.add_column(heading, justify="right", no_wrap=stiff, overflow="fold")
    return made


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Two columns without headings."""
    made = Table(title=title, title_justify="left", show_header=False)
    for fact in facts.items():
        made.add_row(*fact)
    return made


def print_columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> None:
    """Rows in aligned columns, two spaces apart and never cut: names stay whole in a narrow window and in a pipe. In a terminal
    the last column goes on below itself, between words, where it would reach beyond the window.

    Args:
        rows: cells without line breaks; as many in each row.
        right: the columns that end in line rather than begin.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    start = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = max(results.width - start, 10) if results.is_terminal else sys.maxsize
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row[:-1], widths, strict=False))
        ]
        last = textwrap.wrap(row[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
        results.print("  ".join([*cells, last[0]]).rstrip())
        for line in last[1:]:
            results.print(" " * start + line)


def live_bars(*more: bars.ProgressColumn) -> bars.Progress:
    """Bars on standard error, each with a field `figures`, and with more columns at their end. Silent where nobody watches."""
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=24), bars.MofNCompleteColumn())
    figures = bars.TextColumn("{task.fields[figures]}")
    return bars.Progress(
        *columns, figures, bars.TimeElapsedColumn(), *more, console=errors, disable=not errors.is_terminal
    )


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error; the function takes (done, total). Silent where nobody watches."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield update
