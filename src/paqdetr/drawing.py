"""Boxes, names and scores drawn on a copy of an image."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont, features

from paqdetr.images import ImageSource, read_image
from paqdetr.text import printable

# Okabe and Ito's colours, which differ for any colour vision.
BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
# And some of Paul Tol's, for classes.
PALETTE = (
    ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK,
    "#EE3377", "#44AA99", "#999933", "#AA4499", "#BBBBBB", "#332288", "#882255",
)  # fmt: skip
MOST_LABELS = 10
"""More labels than that hide a picture: a key to the colours takes their place."""
_MOST_PLACED = 40  # labels whose places are looked for
_RIM, _GREY = "#00000096", "#757575"


def draw_boxes(
    image: ImageSource, boxes: ArrayLike, labels: ArrayLike, names: Mapping[int, str], scores: ArrayLike | None = None
) -> Image.Image:
    """Boxes drawn on a copy of an image, in the colour of their class: `name`, or `name 0.87` where there are scores.

    Lines and text grow with the image. The best detection is drawn last. Of more than ten boxes, or where labels would lie on
    each other, a key to the colours in a corner names the classes and counts them.

    Args:
        image: a path, a PIL image (its EXIF turn is applied), an array or another form that `read_image` takes.
        boxes: (N, 4) xyxy in pixels of the image.
        labels: (N,) integers: the data set's original category ids.
        names: category id -> name; an id without a name is shown as it is.
        scores: (N,) in [0, 1] of detections; None for ground truth.

    Returns:
        An RGB image of the same size.
    """
    ids = np.asarray(labels, dtype=np.int64).reshape(-1)
    picture = read_image(image)
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) / ([picture.width, picture.height] * 2)
    colours = _class_colours(ids)
    canvas = Canvas(picture)
    scores = None if scores is None else np.asarray(scores)
    order = np.arange(len(ids)) if scores is None else np.argsort(scores, kind="stable")
    for i in order.tolist():
        name = str(names.get(int(ids[i]), ids[i]))
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        canvas.box(corners[i], colours[int(ids[i])], label=text, key=name)
    return canvas.picture()


def tiled(rows: Sequence[Sequence[Image.Image]], *, gap: int, border: int = 0) -> Image.Image:
    """Pictures of any size on white ground: one row below the other, in columns as wide as the widest picture."""
    width = max(picture.width for row in rows for picture in row)
    heights = [max(picture.height for picture in row) for row in rows]
    columns = max(map(len, rows))
    size = (columns * (width + gap) - gap + 2 * border, sum(heights) + gap * (len(rows) - 1) + 2 * border)
    sheet = Image.new("RGB", size, "white")
    top = border
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (border + column * (width + gap), top))
        top += height + gap
    return sheet


def mark(number: int) -> str:
    """The number-th colour for things on a photograph; after fourteen they repeat."""
    return PALETTE[number % len(PALETTE)]


def _class_colours(ids: np.ndarray) -> dict[int, str]:
    """A colour for each class: its own in every picture, another where two of one picture would share it."""
    found: dict[int, str] = {}
    for category in np.unique(ids).tolist():
        free = [colour for colour in PALETTE if colour not in found.values()]
        own = mark(category)
        found[category] = own if own in free or not free else free[0]
    return found


def data_uri(image: Image.Image, side: int) -> str:
    """A picture as a `data:` address, at most `side` pixels long; WebP where Pillow can write it, else JPEG."""
    picture = image.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def font_path() -> Path:
    """The DejaVu Sans inside matplotlib: Latin, Greek, Cyrillic; Pillow's own stops at Latin. matplotlib is not imported, which
    takes longer than drawing."""
    spec = find_spec("matplotlib")
    folder = Path(next(iter((spec and spec.submodule_search_locations) or [""])))
    return folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


class Canvas:
    """A copy of a picture to draw on: boxes, points, and labels that never lie on each other.

    Lines have a dark rim, so that they show on any ground; they and the text grow with the picture.

    Args:
        picture: RGB of any size.
        size: pixels of the long side; as the picture is if None.
        dim: share of the picture's light that is taken away, in [0, 1], so that what is drawn stands out.
        smooth: draw at twice the size and reduce it, for points and slanting lines.
    """

    def __init__(
        self, picture: Image.Image, *, size: int | None = None, dim: float = 0.0, smooth: bool = False
    ) -> None:
        scale = 1.0 if size is None else size / max(picture.size)
        self.width, self.height = (max(1, round(side * scale)) for side in picture.size)
        self._fine = 2 if smooth else 1
        self._picture = picture.convert("RGB")
        drawn = (self.width * self._fine, self.height * self._fine)
        if drawn != picture.size:
            self._picture = self._picture.resize(drawn, Image.Resampling.LANCZOS)
        elif self._picture is picture:
            self._picture = picture.copy()
        if dim:
            self._picture = Image.blend(self._picture, Image.new("RGB", drawn), dim)
        side = (self.width * self.height) ** 0.5
        self._line = max(2 if side >= 300 else 1, round(side / 400))
        self._text = max(10, round(side / 60))
        self._labels: list[_Label] = []
        self._areas: list[tuple[float, ...]] = []

    def box(
        self,
        xyxy: ArrayLike,
        colour: str,
        *,
        label: str = "",
        key: str = "",
        width: float = 1.0,
        dashed: bool = False,
        strength: float = 1.0,
    ) -> None:
        """A box.

        Args:
            xyxy: (4,) in [0, 1] of the picture; what reaches beyond is cut off.
            label: beside it, where there is place.
            key: what its colour means. Where boxes are too many for labels, one key to the colours takes their place.
            width: of the line, in multiples of the usual one.
            strength: its opacity.
        """
        line = max(1, round(self._line * width * self._fine))
        limits = np.array([self.width, self.height] * 2) * self._fine
        corners = np.nan_to_num(np.asarray(xyxy, float)) * limits
        x0, y0, x1, y1 = corners.clip(-line, limits + line).round().astype(int).tolist()
        x0, y0 = min(x0, x1), min(y0, y1)
        pen = ImageDraw.Draw(self._picture, "RGBA")
        for grown, thick, ink in ((1, line + 2, _faint(_RIM, strength)), (0, line, _faint(colour, strength))):
            place = (x0 - grown, y0 - grown, x1 + grown, y1 + grown)
            if dashed:
                _dashed(pen, place, ink, thick, dash=4 * line + 4)
            else:
                pen.rectangle(place, outline=ink, width=thick)
        self._areas.append((x0, y0, x1, y1))
        if label or key:
            places = [value / self._fine for value in (x0, y0, x1, y1)]
            self._labels.append(_Label((places[0], places[1], places[2], places[3]), printable(label), colour, key))

    def dots(self, points: ArrayLike, colour: str, *, radii: ArrayLike, strength: float = 0.85) -> None:
        """Discs at points (P, 2) in [0, 1] with radii (P,) in pixels; what lies outside of the picture is not seen."""
        places = np.asarray(points, float).reshape(-1, 2) * [self.width, self.height] * self._fine
        pen = ImageDraw.Draw(self._picture, "RGBA")
        sizes = np.broadcast_to(np.asarray(radii, float) * self._fine, len(places))
        for (x, y), radius in zip(places.tolist(), sizes.tolist(), strict=True):
            for r, ink in ((radius + 1.5, _faint(_RIM, 1.0)), (radius, _faint(colour, strength))):
                pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)

    def label(self, point: ArrayLike, text: str, colour: str) -> None:
        """A word on a point in [0, 1]."""
        x, y = (np.asarray(point, float)[:2] * [self.width, self.height]).tolist()
        self._labels.append(_Label((x, y, x, y), printable(text), colour, ""))

    def picture(self) -> Image.Image:
        """RGB, with the labels, or where they are too many a key to the colours, in one of the corners."""
        drawn = (
            self._picture if self._fine == 1 else self._picture.resize((self.width, self.height), Image.Resampling.BOX)
        )
        pen = ImageDraw.Draw(drawn, "RGBA")
        keyed = any(label.key for label in self._labels)
        for size in (self._text, max(9, round(0.8 * self._text))):
            font = _font(size)
            pad = max(1, size // 8)
            places = self._places(pen, font, pad)
            if None not in places:
                break
        if keyed and (len(self._labels) > MOST_LABELS or None in places):
            self._draw_key(pen, _font(self._text))
            return drawn
        for label, place in zip(self._labels, places, strict=True):
            if place is not None:
                pen.rectangle(place, fill=label.colour)
                left, top, _, _ = pen.textbbox((0, 0), label.text, font=font)
                pen.text((place[0] + pad - left, place[1] + pad - top), label.text, fill=_on(label.colour), font=font)
        return drawn

    def _places(self, pen: ImageDraw.ImageDraw, font: Any, pad: int) -> list[tuple[float, float, float, float] | None]:
        """Of every label; the last, which is the surest, chooses first. None where there is no place that is free."""
        taken: list[tuple[float, float, float, float]] = []
        found: list[tuple[float, float, float, float] | None] = []
        for label in reversed(self._labels if len(self._labels) <= _MOST_PLACED else []):
            left, top, right, bottom = pen.textbbox((0, 0), label.text, font=font)
            wide, tall = right - left + 2 * pad, bottom - top + 2 * pad
            x0, y0, x1, y1 = label.box
            spots = [(x, y) for x in (x0, x1 - wide) for y in (y0 - tall, y1, y0, y1 - tall)]
            free = None
            for x, y in spots:
                x, y = max(min(x, self.width - wide - 1), 0), max(min(y, self.height - tall - 1), 0)
                place = (x, y, x + wide, y + tall)
                if not any(_overlap(place, other) for other in taken):
                    free = place
                    break
            found.append(free)
            if free is not None:
                taken.append(free)
        return found[::-1] if found else [None] * len(self._labels)

    def _draw_key(self, pen: ImageDraw.ImageDraw, font: Any) -> None:
        """Colours, what they mean, and how many boxes have each, in the corner where the fewest boxes are hidden."""
        counts = Counter((printable(label.key), label.colour) for label in self._labels)
        row, pad = round(1.4 * font.size), round(0.4 * font.size)
        most = max(1, int(0.5 * self.height / row))
        room = self.width - font.size - 3 * pad
        rows = [(_shortened(key, f" {count}", font, room), colour) for (key, colour), count in counts.most_common()]
        if len(rows) > most:
            rows = [*rows[: most - 1], (f"+ {len(rows) - most + 1} more", _GREY)]
        wide = max(font.getlength(text) for text, _ in rows) + font.size + 3 * pad
        tall = len(rows) * row + pad
        corners = [(x, y) for x in (0, self.width - wide) for y in (0, self.height - tall)]
        areas = np.array(self._areas).reshape(-1, 4) / self._fine

        def hidden(corner: tuple[float, float]) -> float:
            low = np.maximum(areas[:, :2], corner)
            high = np.minimum(areas[:, 2:], np.add(corner, (wide, tall)))
            return float(np.prod(np.maximum(high - low, 0), axis=1).sum())

        x, y = min(corners, key=hidden)
        pen.rectangle((x, y, x + wide, y + tall), fill=(255, 255, 255, 215))
        for number, (text, colour) in enumerate(rows):
            top = y + pad / 2 + number * row
            pen.rectangle((x + pad, top + row * 0.2, x + pad + font.size * 0.8, top + row * 0.8), fill=colour)
            pen.text((x + 2 * pad + font.size * 0.8, top + row / 2), text, fill="black", font=font, anchor="lm")


class _Label(NamedTuple):
    """Text for a box, in pixels of the picture."""

    box: tuple[float, float, float, float]
    text: str
    colour: str
    key: str


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """A picture under a line of text on white; of text that is too long the end is kept, which says more of a file's name."""
    font, bar = _font(11), 17
    text = printable(text)
    while text and font.getlength(text) > picture.width - 2:
        text = "…" + text.lstrip("…")[1:] if len(text) > 1 else ""
    framed = Image.new("RGB", (picture.width, picture.height + bar), "white")
    framed.paste(picture, (0, bar))
    ImageDraw.Draw(framed).text((1, 1), text, fill="#222222", font=font)
    return framed


def _shortened(text: str, after: str, font: Any, room: float) -> str:
    while len(text) > 1 and font.getlength(text + after) > room:
        text = text.rstrip("…")[:-1] + "…"
    return text + after


@cache
def _font(size: int) -> Any:
    file = font_path()
    return ImageFont.truetype(str(file), size) if file.is_file() else ImageFont.load_default(size)


def _dashed(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], ink: Any, width: int, *, dash: int) -> None:
    x0, y0, x1, y1 = box
    for start in range(x0, x1, 2 * dash):
        end = min(start + dash, x1)
        pen.rectangle((start, y0, end, y0 + width - 1), fill=ink)
        pen.rectangle((start, y1 - width + 1, end, y1), fill=ink)
    for start in range(y0, y1, 2 * dash):
        end = min(start + dash, y1)
        pen.rectangle((x0, start, x0 + width - 1, end), fill=ink)
        pen.rectangle((x1 - width + 1, start, x1, end), fill=ink)


def _faint(colour: str, strength: float) -> tuple[int, int, int, int]:
    red, green, blue, alpha = ImageColor.getcolor(colour, "RGBA")  # type: ignore[misc]
    return red, green, blue, round(alpha * strength)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    grey = ImageColor.getcolor(colour, "L")
    return "black" if isinstance(grey, int) and grey > 130 else "white"
