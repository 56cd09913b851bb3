"""A matplotlib figure as an <svg> element of a page that is read light and dark.

Every colour of this module becomes a CSS property with that colour as its fallback; `theme_css` gives the properties' values
for both grounds. Black means "ink".
"""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend import Legend

from paqdetr.text import printable

# Okabe and Ito's colours, told apart with any colour vision; the yellow, which is lost on white, is left out.
BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#757575",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY)
INK, MUTED, GRID = "#000000", "#5B6470", "#D9DDE3"
# One hue from faint to strong, for what has an order, such as layers: see `ramp`.
RAMP = ("#A9CBE8", "#86B4DC", "#639DCE", "#4486BD", "#2B6FA8", "#17588F", "#0A4274", "#052D57")

# Colour -> (property, its value in the dark). On dark ground the strong end of the ramp is the light one.
_THEMED: dict[str, tuple[str, str]] = {
    INK: ("--plot-ink", "#E6E8EB"),
    MUTED: ("--plot-muted", "#A2ABB8"),
    GRID: ("--plot-grid", "#333A45"),
    BLUE: ("--plot-blue", "#4AA8E8"),
    ORANGE: ("--plot-orange", "#F0B030"),
    GREEN: ("--plot-green", "#2CC295"),
    RED: ("--plot-red", "#F07C35"),
    PINK: ("--plot-pink", "#DB94BD"),
    SKY: ("--plot-sky", "#8CCEF5"),
    GREY: ("--plot-grey", "#9AA0A8"),
    **{
        light: (f"--plot-ramp-{i}", dark)
        for i, (light, dark) in enumerate(
            zip(
                RAMP,
                ("#2F4C66", "#37607F", "#427599", "#528BB3", "#6AA2CA", "#88B9DD", "#AACFEC", "#D0E6F8"),
                strict=True,
            )
        )
    },
}

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# Text stays text: it can be searched, copied and read aloud.
_RC: Any = {"svg.fonttype": "none", "svg.image_inline": True, "svg.hashsalt": "paqdetr"}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def theme_css() -> tuple[str, str]:
    """Declarations of the plots' CSS properties for a light and for a dark ground."""
    light = "; ".join(f"{name}: {value}" for value, (name, _) in _THEMED.items())
    dark = "; ".join(f"{name}: {value}" for name, value in _THEMED.values())
    return light, dark


def to_svg(figure: Figure | SubFigure, *, title: str, description: str = "") -> str:
    """The figure as an <svg> element for an HTML page.

    Transparent, text as text, colours as CSS properties, no scripts, no style sheet, no date: the same figure gives the same
    bytes. Its ids start with a hash of its content, so several can stand in one page.

    Args:
        figure: drawn with the helpers of `plots`, or under its `style()`; `axes.figure` is one.
        title: what the plot is, for screen readers and as a tooltip.
        description: what is to be seen in it, for screen readers.
    """
    title, description = printable(title), printable(description)
    assert isinstance(figure, Figure), "a part of a figure cannot be saved by itself"
    for box in figure.findobj(Legend):
        assert isinstance(box, Legend)
        box.get_frame().set(facecolor="none", edgecolor="none")
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None}
        )
    root = ElementTree.fromstring(buffer.getvalue())
    _remove_furniture(root)
    for element in root.iter():
        _restyle(element)
    digest = hashlib.sha256(ElementTree.tostring(root) + title.encode() + description.encode()).hexdigest()
    _rename(root, f"p{digest[:10]}-")
    _describe(root, f"p{digest[:10]}-", title, description)
    text = ElementTree.tostring(root, encoding="unicode")
    # HTML knows the namespace of <svg> by its name alone.
    return re.sub(r"(</?)(?:svg|ns\d+):", r"\1", text)


def _remove_furniture(root: ElementTree.Element) -> None:
    """Without metadata, and without the style sheet, which would hold for the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    root.set("fill", INK)  # of what has none: matplotlib leaves out black
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    _, _, width, height = root.get("viewBox", "0 0 1 1").split()
    root.set("width", width)
    root.set("height", height)


def _restyle(element: ElementTree.Element) -> None:
    """Colours to properties, fonts to the page's."""
    css = element.get("style")
    if element.tag == f"{{{_SVG}}}text" or element.tag == f"{{{_SVG}}}tspan":
        css = re.sub(r"(font: [^;]*?[\d.]+px )[^;]*", lambda m: m[1] + _FONT, css or "")
        css = re.sub(r"font-family: [^;]*", f"font-family: {_FONT}", css)
    if css:
        element.set("style", re.sub(r"#[0-9a-fA-F]{6}\b", lambda m: _themed(m[0]), css))
    for name in ("fill", "stroke"):
        if (value := element.get(name, "")).startswith("#"):
            # An attribute cannot hold a property's value; a style can.
            del element.attrib[name]
            element.set("style", f"{element.get('style', '')}; {name}: {_themed(value)}".lstrip("; "))


def _themed(value: str) -> str:
    found = _BY_RGB.get(to_rgb(value))
    return value if found is None else f"var({found}, {value})"


_BY_RGB = {to_rgb(value): name for value, (name, _) in _THEMED.items()}


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """Keep only the ids that something refers to, under a prefix of this plot."""
    link = f"{{{_XLINK}}}href"
    used: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name in (link, "href") and value.startswith("#"):
                used.add(value[1:])
            used.update(re.findall(r"url\(#([^)]+)\)", value))
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                if value in used:
                    element.set(name, prefix + value)
                else:
                    del element.attrib[name]
                continue
            if name in (link, "href") and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", value)
            if name == link:
                del element.attrib[name]
                name = "href"
            element.set(name, value)


def _describe(root: ElementTree.Element, prefix: str, title: str, description: str) -> None:
    root.set("role", "img")
    labels = []
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        if text:
            child = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": prefix + tag})
            child.text = text
            root.insert(place, child)
            labels.append(prefix + tag)
    root.set("aria-labelledby", " ".join(labels))
