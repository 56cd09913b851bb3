"""Boxes, names and scores drawn on a copy of an image."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from math import ceil, inf
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont, features

from paqdetr.errors import ConfigError
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
Key = Sequence[tuple[str, str, str]]
"""What colours mean: (name, what stands after it, colour) of each; of long names the beginning is shown."""
_RIM, _GREY = "#00000096", "#757575"


def draw_boxes(
    image: ImageSource,
    boxes: ArrayLike,
    labels: ArrayLike,
    names: Mapping[int, str],
    scores: ArrayLike | None = None,
    *,
    colours: Mapping[int, str] | None = None,
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
        colours: category id -> colour, where a key outside of the picture says what they mean: none is drawn into it.

    Returns:
        An RGB image of the same size.
    """
    ids = np.asarray(labels, dtype=np.int64).reshape(-1)
    picture = read_image(image)
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) / ([picture.width, picture.height] * 2)
    own = class_colours(ids) if colours is None else colours
    canvas = Canvas(picture)
    scores = None if scores is None else np.asarray(scores)
    order = np.arange(len(ids)) if scores is None else np.argsort(scores, kind="stable")
    for i in order.tolist():
        name = str(names.get(int(ids[i]), ids[i]))
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        canvas.box(corners[i], own[int(ids[i])], label=text, key=name)
    return canvas.picture("inside" if colours is None else "none")


def tiled(rows: Sequence[Sequence[Image.Image]], *, gap: int, border: int = 0, key: Key = ()) -> Image.Image:
    """Pictures of any size on white ground: one row below the other, in columns as wide as the widest picture, then a key to
    the colours of all."""
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
    if not key:
        return sheet
    block = _KeyBlock.fitting(key, _font(max(12, round(sheet.width / 60))), sheet.width - 2 * border)[-1]
    size = (max(sheet.width, block.wide + 2 * border), sheet.height + gap + block.tall)
    framed = Image.new("RGB", size, "white")
    framed.paste(sheet)
    block.draw(ImageDraw.Draw(framed), (border, sheet.height + gap - border))
    return framed


def class_key(ids: ArrayLike, names: Mapping[int, str]) -> tuple[dict[int, str], Key]:
    """Of pictures that share a key: the colour of each class among `ids`, and the key."""
    colours = class_colours(ids)
    return colours, [(printable(str(names.get(own, own))), "", colour) for own, colour in colours.items()]


def mark(number: int) -> str:
    """The number-th colour for things on a photograph; after fourteen they repeat."""
    return PALETTE[number % len(PALETTE)]


def class_colours(ids: ArrayLike) -> dict[int, str]:
    """A colour for each class: its own in every picture, another where two of one picture would share it."""
    found: dict[int, str] = {}
    for category in np.unique(np.asarray(ids, dtype=np.int64)).tolist():
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
    """That of `PAQDETR_FONT`, or the DejaVu Sans inside matplotlib: Latin, Greek, Cyrillic; Pillow's own stops at Latin.
    matplotlib is not imported, which takes longer than drawing."""
    if chosen := os.environ.get("PAQDETR_FONT"):
        return Path(chosen)
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

    def picture(self, key: Literal["inside", "below", "none"] = "inside") -> Image.Image:
        """RGB, with the labels, or where they are too many a key to the colours.

        Args:
            key: where it stands: in the picture, on white below it, or nowhere, if something else says what the colours mean.
        """
        drawn = (
            self._picture if self._fine == 1 else self._picture.resize((self.width, self.height), Image.Resampling.BOX)
        )
        pen = ImageDraw.Draw(drawn, "RGBA")
        keyed = any(label.key for label in self._labels)
        placed: list[_Placed] = []
        if not keyed or len(self._labels) <= MOST_LABELS:
            for size in (self._text, max(9, round(0.8 * self._text))):
                placed = self._placed(pen, _font(size))
                if len(placed) == len(self._labels):
                    break
        if keyed and len(placed) < len(self._labels):
            rows = self._key()
            if key == "inside":
                self._draw_key(pen, rows)
            return tiled([[drawn]], gap=4, key=rows) if key == "below" else drawn
        for place, label, font in placed:
            pad = max(1, font.size // 8)
            pen.rectangle(place, fill=label.colour)
            left, top, _, _ = pen.textbbox((0, 0), label.text, font=font)
            pen.text((place[0] + pad - left, place[1] + pad - top), label.text, fill=_on(label.colour), font=font)
        return drawn

    def _placed(self, pen: ImageDraw.ImageDraw, font: Any) -> list[_Placed]:
        """The labels that find a free place, and where; the last, which is the surest, chooses first."""
        pad, found = max(1, font.size // 8), []
        for label in reversed(self._labels):
            left, top, right, bottom = pen.textbbox((0, 0), label.text, font=font)
            wide, tall = right - left + 2 * pad, bottom - top + 2 * pad
            x0, y0, x1, y1 = label.box
            for x, y in ((x, y) for x in (x0, x1 - wide) for y in (y0 - tall, y1, y0, y1 - tall)):
                x, y = max(min(x, self.width - wide - 1), 0), max(min(y, self.height - tall - 1), 0)
                place = (x, y, x + wide, y + tall)
                if not any(_overlap(place, other) for other, _, _ in found):
                    found.append((place, label, font))
                    break
        return found[::-1]

    def _key(self) -> Key:
        """Colours, what they mean, and how many boxes have each."""
        counts = Counter((printable(label.key), label.colour) for label in self._labels)
        return [(name, f" ({count})", colour) for (name, colour), count in counts.most_common()]

    def _draw_key(self, pen: ImageDraw.ImageDraw, key: Key) -> None:
        """In the corner, and in the form, that hides the least of the boxes."""
        areas = np.array(self._areas).reshape(-1, 4) / self._fine

        def hidden(place: tuple[_KeyBlock, int, int]) -> tuple[float, int]:
            block, x, y = place
            low, high = np.maximum(areas[:, :2], (x, y)), np.minimum(areas[:, 2:], (x + block.wide, y + block.tall))
            return float(np.prod(np.maximum(high - low, 0), axis=1).sum()), block.wide * block.tall

        blocks = _KeyBlock.fitting(key, _font(self._text), self.width, self.height // 2)
        places = [(b, x, y) for b in blocks for x in (0, self.width - b.wide) for y in (0, self.height - b.tall)]
        block, x, y = min(places, key=hidden)
        pen.rectangle((x, y, x + block.wide, y + block.tall), fill=(255, 255, 255, 215))
        block.draw(pen, (x, y))


class _KeyBlock:
    """A key to colours: a square of the colour and a text for each, in rows and columns."""

    def __init__(self, rows: Sequence[tuple[str, str]], font: Any, columns: int) -> None:
        self._rows, self._font, self._columns = rows, font, columns
        self._tall, self._pad = round(1.4 * font.size), round(0.4 * font.size)
        self._wide = ceil(max(font.getlength(text) for text, _ in rows) + font.size + 2 * self._pad)
        self.wide = columns * self._wide + self._pad
        self.tall = -(-len(rows) // columns) * self._tall + self._pad

    @classmethod
    def fitting(cls, key: Key, font: Any, width: int, height: float = inf) -> list[Self]:
        """In every form that fits into a place, narrow ones first; with shorter names, or fewer rows, if none does. That may
        still be wider than the place."""
        room = width - 2.5 * font.size
        rows = [(_shortened(name, after, font, room), colour) for name, after, colour in key]
        blocks = [cls(rows, font, columns) for columns in range(1, len(rows) + 1)]
        if found := [block for block in blocks if block.wide <= width and block.tall <= height]:
            return found
        one = blocks[0]
        if height == inf:
            return [one]
        columns = max(1, (width - one._pad) // one._wide)
        most = max(1, int((height - one._pad) // one._tall)) * columns
        return [cls([*rows[: most - 1], (f"+ {len(rows) - most + 1} more", _GREY)], font, columns)]

    def draw(self, pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
        """Its left upper corner stands at `corner`."""
        side = 0.8 * self._font.size
        for number, (text, colour) in enumerate(self._rows):
            x = corner[0] + self._pad + number % self._columns * self._wide
            y = corner[1] + (self._pad + self._tall) / 2 + number // self._columns * self._tall
            pen.rectangle((x, y - 0.3 * self._tall, x + side, y + 0.3 * self._tall), fill=colour)
            pen.text((x + side + self._pad, y), text, fill="black", font=self._font, anchor="lm")


class _Label(NamedTuple):
    """Text for a box, in pixels of the picture."""

    box: tuple[float, float, float, float]
    text: str
    colour: str
    key: str


_Placed = tuple[tuple[float, float, float, float], _Label, Any]  # its rectangle, the label, the font


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
    if not file.is_file() and not os.environ.get("PAQDETR_FONT"):
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(file), size)
    except OSError as error:
        raise ConfigError(
            f"PAQDETR_FONT={file}: no font can be read ({error})", "name a .ttf, .otf or .ttc file"
        ) from None


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
