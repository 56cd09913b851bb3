"""Boxes, names and scores drawn on a copy of an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont, features

from paqdetr.images import ImageSource, read_image
from paqdetr.text import printable

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
# And some of Paul Tol's, for classes.
PALETTE = (
    ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK,
    "#EE3377", "#44AA99", "#999933", "#AA4499", "#BBBBBB", "#332288", "#882255",
)  # fmt: skip


def draw_boxes(
    image: ImageSource, boxes: ArrayLike, labels: ArrayLike, names: Mapping[int, str], scores: ArrayLike | None = None
) -> Image.Image:
    """Boxes drawn on a copy of an image, in the colour of their class: `name`, or `name 0.87` where there are scores.

    Lines and text grow with the image. The best detection is drawn last, so that its label stays readable.

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
    texts = [str(names.get(int(label), label)) for label in ids]
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    if scores is None:
        return _draw(image, corners, ids, texts)
    order = np.argsort(np.asarray(scores), kind="stable")
    texts = [f"{text} {score:.2f}" for text, score in zip(texts, np.asarray(scores), strict=True)]
    return _draw(image, corners[order], ids[order], [texts[i] for i in order])


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


def _draw(image: ImageSource, boxes: np.ndarray, ids: np.ndarray, texts: list[str]) -> Image.Image:
    """Draws in the order given: the last lies on top."""
    picture = read_image(image)
    side = (picture.width * picture.height) ** 0.5
    line, pad = max(2 if side >= 300 else 1, round(side / 400)), max(1, round(side / 400))
    file, size = font_path(), max(10, round(side / 60))
    font = ImageFont.truetype(str(file), size) if file.is_file() else ImageFont.load_default(size)
    pen = ImageDraw.Draw(picture)
    limit = [picture.width + line, picture.height + line] * 2
    corners = np.nan_to_num(boxes).clip(-line, limit).round().astype(int)
    colours = [PALETTE[category % len(PALETTE)] for category in ids.tolist()]
    for box, colour in zip(corners.tolist(), colours, strict=True):
        pen.rectangle([min(box[0], box[2]), min(box[1], box[3]), *box[2:]], outline=colour, width=line)
    # Places are given to the best first, and its label is written last.
    placed: list[_Label] = []
    for box, colour, text in list(zip(corners.tolist(), colours, map(printable, texts), strict=True))[::-1]:
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        wide, tall = int(right - left) + 2 * pad, int(bottom - top) + 2 * pad
        x, y = _free_place(box, (wide, tall), picture.size, [label.area for label in placed])
        placed.append(_Label((x, y, x + wide, y + tall), (x + pad - left, y + pad - top), text, colour))
    for label in reversed(placed):
        pen.rectangle(label.area, fill=label.colour)
        pen.text(label.start, label.text, fill=_on(label.colour), font=font)
    return picture


class _Label(NamedTuple):
    """Text on a coloured ground: its area in pixels, and where the text starts."""

    area: tuple[int, int, int, int]
    start: tuple[float, float]
    text: str
    colour: str


def _free_place(
    box: list[int], size: tuple[int, int], image: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int]:
    """Where a label goes: on its box, below it, or inside at the top, within the image; the first where no other one lies."""
    places = []
    for y in (box[1] - size[1], box[3], box[1]):
        place = max(min(box[0], image[0] - size[0] - 1), 0), max(min(y, image[1] - size[1] - 1), 0)
        places.append(place)
        left, top, right, bottom = *place, place[0] + size[0], place[1] + size[1]
        if all(right < other[0] or other[2] < left or bottom < other[1] or other[3] < top for other in taken):
            return place
    return places[0]


def _on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    grey = ImageColor.getcolor(colour, "L")
    return "black" if isinstance(grey, int) and grey > 130 else "white"
