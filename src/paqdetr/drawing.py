"""Boxes, names and scores drawn on a copy of an image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor

from paqdetr.images import read_image
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
    image: Image.Image | np.ndarray,
    boxes: ArrayLike,
    labels: ArrayLike,
    names: Mapping[int, str],
    scores: ArrayLike | None = None,
) -> Image.Image:
    """Boxes drawn on a copy of an image, in the colour of their class: `name`, or `name 0.87` where there are scores.

    Lines and text grow with the image. The best detection is drawn last, so that its label stays readable.

    Args:
        image: the PIL image (its EXIF turn is applied) or (H, W, 3) uint8 RGB array.
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


def font_path() -> Path:
    """The DejaVu Sans inside matplotlib: Latin, Greek, Cyrillic; Pillow's own stops at Latin."""
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _draw(image: Image.Image | np.ndarray, boxes: ArrayLike, ids: np.ndarray, texts: list[str]) -> Image.Image:
    """Draws in the order given: the last lies on top."""
    picture, texts = read_image(image), list(map(printable, texts))
    xyxy = np.asarray(boxes, dtype=np.float32).reshape(-1, 4).round()  # supervision would cut decimals off
    if not len(xyxy):
        return picture
    sv = _supervision()
    side = (picture.width * picture.height) ** 0.5
    found = sv.Detections(xyxy=xyxy, class_id=np.asarray(ids, dtype=int))
    colours, text_colours = sv.ColorPalette.from_hex(list(PALETTE)), sv.ColorPalette.from_hex(_on(PALETTE))
    picture = sv.BoxAnnotator(color=colours, thickness=max(2 if side >= 300 else 1, round(side / 400))).annotate(
        picture, found
    )
    # The "rich" annotator takes a TrueType font: sharp at 10 pixels, and not bound to ASCII.
    writer = sv.RichLabelAnnotator(
        color=colours,
        text_color=text_colours,
        font_path=str(font_path()),
        font_size=max(10, round(side / 60)),
        text_padding=max(1, round(side / 400)),
        smart_position=True,  # moves labels into the image and apart from each other
    )
    return writer.annotate(picture, found, labels=texts)


def _on(colours: tuple[str, ...]) -> list[str]:
    """Black or white, whichever is easier to read on each colour."""
    return ["#000000" if ImageColor.getcolor(colour, "L") > 130 else "#FFFFFF" for colour in colours]  # type: ignore[operator]


def _supervision() -> Any:
    """supervision, without its advice to install OpenCV: its own drawing is all that is needed here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        import supervision
    return supervision
