"""Text that comes from files, shown: in messages and tables, in pictures, in plots."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from html import escape

# Joiners of letters and emoji belong to words; the other format characters turn the direction of a line, or hide.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """The text with control characters (line breaks and terminal escapes among them), lone surrogates, and characters that turn
    the direction of writing, as escapes such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return character.encode("unicode_escape").decode("ascii") if hidden else character


def shorten(value: object, limit: int = 80) -> str:
    """How a value from a file is shown in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer too long to print, a list too deep
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first `most` of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def literal(text: str, most: int | None = None) -> str:
    """For titles, labels and ticks of matplotlib, which takes what stands between dollars for mathematics and leaves labels that
    begin with an underscore out of legends. Cut to `most` characters."""
    text = text if most is None or len(text) <= most else f"{text[: most - 1]}…"
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def did_you_mean(word: str, known: Sequence[str], otherwise: str, *, cutoff: float = 0.5) -> str:
    """The known word that is nearest, whatever its case, as a question, or what to say if none is near."""
    folded = {name.casefold(): name for name in reversed(known)}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return f"did you mean {folded[close[0]]!r}?" if close else otherwise


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "2 h 05 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def figure(value: float | None) -> str:
    """An AP or another share with three decimals, a dash where nothing defines it."""
    return "-" if value is None or value != value else f"{value:.3f}"


class Summary:
    """`repr` in a few lines, and the same as a table in a notebook, below a picture if there is one."""

    __slots__ = ()

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        """A title, and the cells of rows of one length."""
        raise NotImplementedError

    def _picture(self) -> str | None:
        """The address of a picture, or its content as a `data:` one."""
        return None

    def __repr__(self) -> str:
        title, rows = self._summary()
        cells = [[printable(cell) for cell in row] for row in rows]
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, wide)).rstrip() for row in cells]
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        title, rows = self._summary()
        picture = self._picture()
        shown = "" if picture is None else f'<img src="{picture}" style="max-width: 100%" alt="">'
        cells = "".join(f"<tr>{''.join(f'<td>{escape(printable(c))}</td>' for c in row)}</tr>" for row in rows)
        return f"<div>{shown}<div><b>{escape(title)}</b></div><table>{cells}</table></div>"
