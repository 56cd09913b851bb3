"""Boxes, points and words on a photograph, for the pictures of a report.

Everything is drawn at twice the size and reduced, so that thin lines are smooth, with a dark rim, so that they show on any
ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont

from paqdetr.drawing import font_path
from paqdetr.report.plots import GREEN, ORANGE, PINK, RED, SKY
from paqdetr.text import printable

# For things on a photograph, told apart with any colour vision.
MARKS = (ORANGE, SKY, "#F0E442", PINK, GREEN, RED, "#FFFFFF", "#B9A6FF")
_FINE = 2
_RIM = (0, 0, 0, 150)
_STEPS = (0, 1, -1, 2, -2, 3, -3)  # lines that a label may move down


def mark(number: int) -> str:
    """The number-th colour for things on a photograph; after eight they repeat."""
    return MARKS[number % len(MARKS)]


class Overlay:
    """A picture to draw on, its long side `size` pixels.

    Args:
        picture: RGB of any size.
        size: pixels of the long side.
        dim: share of the picture's light that is taken away, in [0, 1], so that what is drawn stands out.
    """

    def __init__(self, picture: Image.Image, *, size: int = 640, dim: float = 0.0) -> None:
        scale = size / max(picture.size)
        self.width, self.height = (max(1, round(side * scale)) for side in picture.size)
        self._base = picture.convert("RGB").resize((self.width, self.height), Image.Resampling.LANCZOS)
        if dim:
            self._base = Image.blend(self._base, Image.new("RGB", self._base.size), dim)
        self._layer = Image.new("RGBA", (self.width * _FINE, self.height * _FINE))
        self._labels: list[tuple[float, float, str, str]] = []

    def box(
        self, xyxy: ArrayLike, colour: str, *, width: float = 2.0, dashed: bool = False, strength: float = 1.0
    ) -> None:
        """A box; `xyxy` in [0, 1] of the picture, `width` in pixels, `strength` its opacity."""
        x0, y0, x1, y1 = (np.clip(np.asarray(xyxy, float), 0, 1) * self._scale(2)).tolist()
        if dashed:
            corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
            lines = [dash for a, b in pairwise(corners) for dash in _dashes(a, b)]
        else:
            lines = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)]]
        self._lines(lines, colour, width, strength)

    def line(self, points: ArrayLike, colour: str, *, width: float = 1.5, strength: float = 1.0) -> None:
        """Through points (P, 2) in [0, 1]."""
        places = np.asarray(points, float) * self._scale(1)
        self._lines([[(float(x), float(y)) for x, y in places]], colour, width, strength)

    def dots(self, points: ArrayLike, colour: str, *, radii: ArrayLike, strength: float = 0.85) -> None:
        """Discs at points (P, 2) in [0, 1] with radii (P,) in pixels; what lies outside of the picture is not seen."""
        places = np.asarray(points, float).reshape(-1, 2) * self._scale(1)
        ink = self._sheet()
        pen = ImageDraw.Draw(ink)
        fill = (*_rgb(colour), round(255 * strength))
        for (x, y), radius in zip(
            places.tolist(), (np.asarray(radii, float) * _FINE).reshape(-1).tolist(), strict=True
        ):
            pen.ellipse((x - radius - 1.5, y - radius - 1.5, x + radius + 1.5, y + radius + 1.5), fill=_RIM)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        self._layer.alpha_composite(ink)

    def label(self, point: Sequence[float] | np.ndarray, text: str, colour: str) -> None:
        """A word whose lower left corner is at `point`, in [0, 1], moved to where it is inside and hides no other."""
        self._labels.append((float(point[0]), float(point[1]), printable(text), colour))

    def picture(self) -> Image.Image:
        """RGB."""
        small = self._layer.resize((self.width, self.height), Image.Resampling.BOX)
        result = self._base.convert("RGBA")
        result.alpha_composite(small)
        result = result.convert("RGB")
        self._write(result)
        return result

    def _write(self, picture: Image.Image) -> None:
        pen = ImageDraw.Draw(picture)
        font = ImageFont.truetype(font_path(), 13)
        taken: list[tuple[float, float, float, float]] = []
        for x, y, text, colour in self._labels:
            width, height = font.getlength(text) + 6, 17.0
            left = min(max(x * self.width, 0), max(self.width - width, 0))
            top = min(max(y * self.height - height, 0), self.height - height)
            spots = [(left, top + step * height, left + width, top + (step + 1) * height) for step in _STEPS]
            inside = [spot for spot in spots if 0 <= spot[1] and spot[3] <= self.height]
            free = [spot for spot in inside if not any(_overlap(spot, other) for other in taken)]
            place = free[0] if free else spots[0]
            taken.append(place)
            pen.rectangle(place, fill=colour)
            dark = ImageColor.getcolor(colour, "L") > 110  # type: ignore[operator]
            pen.text((place[0] + 3, place[1] + 1), text, font=font, fill="#000000" if dark else "#FFFFFF")

    def _lines(self, lines: Sequence[list[tuple[float, float]]], colour: str, width: float, strength: float) -> None:
        ink = self._sheet()
        pen = ImageDraw.Draw(ink)
        for stroke, fill in (
            (width + 1.6, (*_RIM[:3], round(_RIM[3] * strength))),
            (width, (*_rgb(colour), round(255 * strength))),
        ):
            for points in lines:
                pen.line(points, fill=fill, width=round(stroke * _FINE), joint="curve")
        self._layer.alpha_composite(ink)

    def _sheet(self) -> Image.Image:
        return Image.new("RGBA", self._layer.size)

    def _scale(self, corners: int) -> np.ndarray:
        return np.array([self.width, self.height] * corners, dtype=float) * _FINE


def _dashes(
    start: tuple[float, float], end: tuple[float, float], length: float = 7.0 * _FINE
) -> list[list[tuple[float, float]]]:
    a, b = np.array(start), np.array(end)
    whole = float(np.linalg.norm(b - a))
    count = max(1, round(whole / (2 * length)))
    cuts = (np.arange(count)[:, None] + [0.0, 0.5]) / count
    return [[tuple(a + (b - a) * low), tuple(a + (b - a) * high)] for low, high in cuts]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return red, green, blue
