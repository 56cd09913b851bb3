"""Plots as parts of a page: nothing to fetch, text as text, colours that stand out, the same bytes each time."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from paqdetr.report import plots


def a_plot(power: float = 2.0) -> str:
    axes = plots.new_axes(title="Precision & recall", x="recall", y="precision")
    x = np.linspace(0, 1, 20)
    for i, colour in enumerate(plots.ramp(3)):
        plots.line(axes, x, 1 - x ** (power + i), label=f"layer {i + 1}", colour=colour)
    plots.line(axes, x, x, low=x - 0.1, high=x + 0.1, colour=plots.RED, label="chance", marker="o")
    plots.legend(axes)
    return plots.to_svg(axes)


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert a_plot() == a_plot()


def test_it_needs_nothing_else_and_its_text_is_text() -> None:
    svg = a_plot()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    links = [value for element in root.iter() for key, value in element.items() if key.endswith("href")]
    assert links and all(link.startswith("#") for link in links)
    written = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"Precision & recall", "recall", "precision", "layer 1", "chance"} <= set(written)


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_and_lines_stand_out_from_white() -> None:
    least = {plots.INK: 7.0, plots.MUTED: 4.5, plots.GRID: 1.1} | dict.fromkeys(plots.RAMP, 1.5)
    for colour in (plots.INK, plots.MUTED, plots.GRID, *plots.PALETTE, *plots.RAMP):
        contrast = 1.05 / (luminance(colour) + 0.05)
        assert contrast >= least.get(colour, 2.0), f"{colour}: {contrast:.2f}"


def test_cells_of_a_heat_map_carry_their_values_in_a_colour_that_reads_on_the_cell() -> None:
    axes = plots.new_axes()
    plots.heat_map(axes, [[0.0, 1.0], [np.nan, 0.5]], rows=["cat", "dog"], columns=["a", "b"], bar="share")
    written = {text.get_text(): text.get_color() for text in axes.texts}
    assert written == {"0.00": "#FFFFFF", "1.00": "#111111", "0.50": "#FFFFFF"}
    svg = plots.to_svg(axes)
    assert ">cat<" in svg and ">share<" in svg and svg.count("data:image/png;base64,") >= 1


def test_bars_have_their_names_values_and_intervals() -> None:
    axes = plots.new_axes()
    plots.bars(axes, ["cat", "dog"], [0.5, np.nan], low=[0.4, np.nan], high=[0.7, np.nan])
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0.5", ""] and [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    (interval,) = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    ends = interval.lines[2][0].get_segments()[0]
    assert ends[:, 0].tolist() == pytest.approx([0.4, 0.7])


@pytest.mark.parametrize("count", [1, 2, 6, 8, 12])
def test_a_ramp_goes_from_faint_to_strong(count: int) -> None:
    shades = [luminance(colour) for colour in plots.ramp(count)]
    assert len(shades) == count and shades == sorted(shades, reverse=True)


def test_letters_that_the_font_lacks_are_left_to_the_browser(recwarn: pytest.WarningsRecorder) -> None:
    axes = plots.new_axes(title="猫")
    assert "猫" in plots.to_svg(axes)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
