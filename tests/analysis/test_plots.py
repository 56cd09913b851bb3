"""Plots as parts of a page: no clash of ids, nothing that leaks out, colours that follow the theme, the same bytes each time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from paqdetr.analysis import plots


def a_plot(power: float = 2.0) -> str:
    axes = plots.new_axes(title="Precision & recall", x="recall", y="precision")
    x = np.linspace(0, 1, 20)
    for i, colour in enumerate(plots.ramp(3)):
        plots.line(axes, x, 1 - x ** (power + i), label=f"layer {i + 1}", colour=colour)
    plots.line(axes, x, x, low=x - 0.1, high=x + 0.1, colour=plots.RED, label="chance", marker="o")
    plots.legend(axes)
    return plots.to_svg(axes.figure, title="Precision <and> recall", description="It falls.")


def ids(svg: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', svg))


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert a_plot() == a_plot()


def test_ids_of_two_plots_differ_and_all_references_are_met() -> None:
    first, second = a_plot(), a_plot(3.0)
    assert ids(first) and not ids(first) & ids(second)
    for svg in (first, second):
        referred = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert referred and referred <= ids(svg)


def test_it_is_well_formed_and_brings_nothing_that_concerns_the_rest_of_the_page() -> None:
    svg = a_plot()
    root = ElementTree.fromstring(svg)
    names = {element.tag.split("}")[-1] for element in root.iter()}
    assert root.tag == "svg" or root.tag.endswith("}svg")
    assert not names & {"style", "metadata", "script", "foreignObject"}
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", svg)  # nothing to fetch
    assert ":svg" not in svg and not re.search(r"</?ns\d", svg)  # a prefix would mean nothing in HTML


def test_it_says_what_it_is_and_its_text_is_text() -> None:
    root = ElementTree.fromstring(a_plot())
    named = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    spoken = [named[name] for name in root.get("aria-labelledby", "").split()]
    assert spoken == ["Precision <and> recall", "It falls."] and root.get("role") == "img"
    written = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"Precision & recall", "recall", "precision", "layer 1", "chance"} <= set(written)


def test_every_colour_follows_the_theme_and_each_theme_names_each_property() -> None:
    svg = a_plot()
    used = set(re.findall(r"var\((--plot-[\w-]+), #[0-9a-f]{6}\)", svg))
    assert {"--plot-ink", "--plot-muted", "--plot-grid", "--plot-red"} <= used
    bare = re.sub(r"var\([^)]*\)", "", svg)
    assert not re.search(r"(?:fill|stroke): #", bare), "a colour that would not change with the theme"
    for declarations in plots.theme_css():
        assert used <= set(re.findall(r"(--[\w-]+): #[0-9A-F]{6}", declarations))


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("theme", "ground"), [(0, "#FFFFFF"), (1, "#16191D")])
def test_text_and_lines_stand_out_from_the_ground(theme: int, ground: str) -> None:
    properties = dict(re.findall(r"--plot-([\w-]+): (#[0-9A-F]{6})", plots.theme_css()[theme]))
    for name, colour in properties.items():
        light, dark = sorted([luminance(colour), luminance(ground)], reverse=True)
        contrast = (light + 0.05) / (dark + 0.05)
        least = {"ink": 7.0, "muted": 4.5, "grid": 1.1}.get(name, 1.5 if name.startswith("ramp") else 2.0)
        assert contrast >= least, f"{name} {colour} on {ground}: {contrast:.2f}"


def test_black_is_ink_in_drawings_of_others_too() -> None:
    axes = plots.new_axes()
    axes.plot([0, 1], [0, 1], "o-", color="black")
    axes.text(0.5, 0.5, "plain")
    svg = plots.to_svg(axes.figure, title="plain")
    assert "stroke: var(--plot-ink, #000000)" in svg
    # What matplotlib writes without a fill (text, marks) takes it from the root.
    assert re.match(r'<svg [^>]*style="fill: var\(--plot-ink, #000000\)"', svg)
    assert not re.search(r'<text style="[^"]*fill:[^"]*"[^>]*>plain<', svg)


def test_cells_of_a_heat_map_carry_their_values_in_a_colour_that_reads_on_the_cell() -> None:
    axes = plots.new_axes()
    plots.heat_map(axes, [[0.0, 1.0], [np.nan, 0.5]], rows=["cat", "dog"], columns=["a", "b"], bar="share")
    written = {text.get_text(): text.get_color() for text in axes.texts}
    assert written == {"0.00": "#FFFFFF", "1.00": "#111111", "0.50": "#FFFFFF"}
    svg = plots.to_svg(axes.figure, title="heat")
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
