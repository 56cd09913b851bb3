"""How text from files is shown: on the console, in plots, pictures and pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.table import Table

from paqdetr.cli import console
from paqdetr.drawing import draw_boxes
from paqdetr.report import plots
from paqdetr.report.page import Chapter, Heading, render
from paqdetr.report.section import Column, Section
from paqdetr.report.section import Table as TablePart
from paqdetr.text import printable, shorten
from paqdetr.training.curves import training_curves

NASTY = {
    "mathematics": ("a$_$b", "a$_$b"),
    "only dollars": ("$$", "$$"),
    "broken mathematics": (r"$\frac{$", r"$\frac{$"),
    "one dollar": (r"\$5", r"\$5"),
    "NUL": ("a\0b", r"a\x00b"),
    "vertical tab": ("a\x0bb", r"a\x0bb"),
    "line break": ("a\nb", r"a\nb"),
    "terminal escape": ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
    "C1 control": ("\x9b31m", r"\x9b31m"),
    "lone surrogate": ("a\ud800", r"a\ud800"),
    "byte that is no UTF-8": ("a\udcff", r"a\udcff"),
    "turned direction": ("\u202eabc", r"\u202eabc"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "underscore in front": ("_a", "_a"),
    "markup": ("[red]<b>&amp;", "[red]<b>&amp;"),
    "plain": ("Ampel rot, 信号 é 👩‍🚒\u00a0x", "Ampel rot, 信号 é 👩‍🚒\u00a0x"),
}


@pytest.fixture(params=NASTY.values(), ids=NASTY)
def nasty(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_shown(nasty: tuple[str, str]) -> None:
    text, shown = nasty
    assert printable(text) == shown
    assert printable(shown) == shown


@given(st.text(st.characters(), max_size=30))
def test_any_text_is_shown_as_one_line_without_controls(text: str) -> None:
    shown = printable(text)
    shown.encode()  # no surrogates
    assert len(shown.splitlines()) <= 1 and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


def test_long_values_are_cut() -> None:
    assert shorten("a" * 99, limit=3) == "'aa..."
    assert shorten(10**5000) == "a int" and "\x1b" not in shorten("\x1b")


def test_on_the_console(nasty: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    text, shown = nasty
    console.results.print(text, soft_wrap=True)
    console.print_styled(console.errors, ("error:", "bold red"), f" {text}")
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.results.print(table, width=200)
    console.print_columns([[text, "x"]])
    out, err = capsys.readouterr()
    assert shown.replace(r"\n", "\n") in out and err.replace(r"a b", r"a\nb") == f"error: {shown}\n"
    assert not set(out + err) & set("\x1b\x07\0\x0b\x9b\ud800\udcff\u202e\u2028")


def drawn_texts(svg: str) -> list[str]:
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")
    ]


def test_in_plots(nasty: tuple[str, str]) -> None:
    text, shown = nasty
    axes = plots.new_axes(title=text, x=text, y=text)
    plots.line(axes, [0, 1], [0, 1], label=text)
    plots.legend(axes)
    bars = plots.new_axes()
    plots.bars(bars, [text, "b"], [1, 2], label=text)
    plots.legend(bars)
    cells = plots.new_axes()
    plots.heat_map(cells, np.eye(2), rows=[text, "b"], columns=[text, "b"], bar=text)
    for made, count in ((axes, 4), (bars, 2), (cells, 3)):
        texts = drawn_texts(plots.to_svg(made))
        assert sum(found.strip() == shown for found in texts) == count


@pytest.mark.parametrize("name", ["a$_$b", "$$", r"$\frac{$\x1b\n", "a\udcff"], ids=ascii)
def test_a_run_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "epoch": 0.5, "loss": 2}\n')
    training_curves(folder / "metrics.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 300


def test_in_pictures(nasty: tuple[str, str]) -> None:
    blank = Image.new("RGB", (200, 100))
    drawn = draw_boxes(blank, [[20, 20, 80, 80]], [1], {1: nasty[0]})
    assert np.array_equal(np.asarray(drawn), np.asarray(draw_boxes(blank, [[20, 20, 80, 80]], [1], {1: nasty[1]})))


class _Strict(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_in_the_report(nasty: tuple[str, str]) -> None:
    text, shown = nasty
    part = TablePart(name="t", caption=text, columns=(Column("name", text, "text"),), rows=({"name": text},))
    section = Section(key="k", title=text, lead=text, parts=(part,))
    page = render(Heading(text, (text,), ((text, text),)), [Chapter((section,))])
    page.encode()
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in page)
    parser = _Strict()
    parser.feed(page)
    assert sum(found.strip() == shown for found in parser.texts) >= 8
