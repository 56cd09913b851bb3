"""Training-time changes of picture and boxes: mosaic, crop, flip, the resize to a batch's size, and colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2 as T
from torch import Tensor

from paqdetr.config import AugmentConfig
from paqdetr.preprocessing import Preprocessing, resize

# A box of which a crop leaves less than this share is dropped: too little to recognise what it was.
MIN_VISIBLE = 0.2

# DETR's crop: the short side is resized to one of these, then a window of sides in this range is cut out. The resize that
# follows makes only their ratios count.
_DETR_SHORT_SIDES = (400, 500, 600)
DETR_WINDOW = (384, 600)


@dataclass(frozen=True, slots=True)
class Augmented:
    """A training image.

    Attributes:
        pixels: (3, h, w) uint8.
        boxes: (G, 4) float32 xyxy in these pixels.
        labels: (G,) int64.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


class Augment:
    """Random changes drawn from torch's global generator; seed it for each image to make them repeatable."""

    def __init__(self, config: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.config, self.preprocessing = config, preprocessing
        strength = config.color
        self._color = T.ColorJitter(strength, strength, strength, strength / 10) if strength else None

    def __call__(self, pixels: Tensor, boxes: np.ndarray, labels: np.ndarray, *, scale: float) -> Augmented:
        """Change one image.

        Args:
            pixels: (3, H, W) uint8.
            boxes: (G, 4) float32 xyxy in pixels.
            labels: (G,) int64.
            scale: size of the result relative to the configured one; a batch shares it, so that little is padded.
        """
        image = Augmented(pixels, torch.from_numpy(boxes), torch.from_numpy(labels))
        if torch.rand(()) < self.config.crop:
            image = self._crop(image)
        pixels, corners = image.pixels, image.boxes
        height, width = pixels.shape[1:]
        if torch.rand(()) < self.config.flip:
            x0, y0, x1, y1 = corners.unbind(1)
            pixels, corners = pixels.flip(2), torch.stack([width - x1, y0, width - x0, y1], 1)
        size = self.preprocessing.target_size(height, width, scale)
        pixels = resize(pixels, *size)
        zoom = corners.new_tensor([size[1] / width, size[0] / height] * 2)
        if self._color is not None:  # after the resize: a photograph of a camera has many times the pixels
            pixels = self._color(pixels)
        return Augmented(pixels, corners * zoom, image.labels)

    def _frame(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop that is drawn."""
        if self.config.crop_style == "detr":
            short = _DETR_SHORT_SIDES[int(torch.randint(len(_DETR_SHORT_SIDES), ()))]
            zoom = short / min(height, width)
            crop_height, crop_width = (_window(side, zoom) for side in (height, width))
        else:
            low, high = self.config.crop_size
            share = low + (high - low) * float(torch.rand(()))
            crop_height, crop_width = max(round(height * share), 1), max(round(width * share), 1)
        top = int(torch.randint(height - crop_height + 1, ())) if crop_height < height else 0
        left = int(torch.randint(width - crop_width + 1, ())) if crop_width < width else 0
        return top, left, crop_height, crop_width

    def _crop(self, image: Augmented) -> Augmented:
        """A part of the image; a crop that loses every box is not made."""
        height, width = image.pixels.shape[1:]
        frame = self._frame(height, width)
        if self.config.keep_small:
            frame = spare_small(frame, image.boxes, self.config.keep_small)
        cropped = crop(image, *frame)
        return image if len(image.labels) and not len(cropped.labels) else cropped


def crop(image: Augmented, top: int, left: int, height: int, width: int) -> Augmented:
    """The part of an image in a frame; boxes of which less than `MIN_VISIBLE` is left are dropped."""
    moved = image.boxes - image.boxes.new_tensor([left, top] * 2)
    cut = torch.minimum(moved.clamp(min=0), moved.new_tensor([width, height] * 2))
    kept = _area(cut) / _area(moved).clamp(min=1e-6) >= MIN_VISIBLE
    return Augmented(image.pixels[:, top : top + height, left : left + width], cut[kept], image.labels[kept])


def _window(side: int, zoom: float) -> int:
    """A side of DETR's crop, in pixels of the image before its resize by `zoom`."""
    low, high = DETR_WINDOW
    most = min(round(side * zoom), high)
    drawn = low + int(torch.randint(most - low + 1, ())) if most > low else most
    return min(max(round(drawn / zoom), 1), side)


def spare_small(frame: tuple[int, int, int, int], boxes: Tensor, side: float) -> tuple[int, int, int, int]:
    """The least frame around `frame` whose edges cut no box with a side (root of its area) below `side`.

    Args:
        frame: top, left, height, width in pixels.
        boxes: (G, 4) xyxy in pixels.
    """
    top, left = frame[:2]
    bottom, right = top + frame[2], left + frame[3]
    small = boxes[_area(boxes).sqrt() < side]
    while True:
        x0, y0, x1, y1 = small.unbind(1)
        meets = (x0 < right) & (x1 > left) & (y0 < bottom) & (y1 > top)
        within = (x0 >= left) & (x1 <= right) & (y0 >= top) & (y1 <= bottom)
        cut = small[meets & ~within]
        if not len(cut):
            return top, left, bottom - top, right - left
        top, left = min(top, int(cut[:, 1].min().floor())), min(left, int(cut[:, 0].min().floor()))
        bottom, right = max(bottom, int(cut[:, 3].max().ceil())), max(right, int(cut[:, 2].max().ceil()))


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


# The point lies in this middle part of the picture; a tile is enlarged at most so far beyond what fills its place.
_MIDDLE = (0.35, 0.65)
_MOST_ZOOM = 1.5


def mosaic(tiles: Sequence[Augmented]) -> Augmented:
    """Puts four images together, from left to right and top to bottom; the result has the size of the first, and is the first
    where that is one pixel high or wide. Draws from torch's global generator."""
    height, width = tiles[0].pixels.shape[1:]
    if min(height, width) == 1:
        return tiles[0]
    low, high = _MIDDLE
    down, across = (low + (high - low) * float(torch.rand(())) for _ in range(2))
    middle, centre = round(height * down), round(width * across)
    canvas = tiles[0].pixels.new_empty(3, height, width)
    boxes, labels = [], []
    for number, tile in enumerate(tiles):
        top, bottom = (0, middle) if number < 2 else (middle, height)
        left, right = (0, centre) if number % 2 == 0 else (centre, width)
        part = _fill(tile, bottom - top, right - left)
        canvas[:, top:bottom, left:right] = part.pixels
        boxes.append(part.boxes + part.boxes.new_tensor([left, top] * 2))
        labels.append(part.labels)
    return Augmented(canvas, torch.cat(boxes), torch.cat(labels))


def _fill(image: Augmented, height: int, width: int) -> Augmented:
    """A part of an image, enlarged, that fills (height, width)."""
    old_height, old_width = image.pixels.shape[1:]
    zoom = max(height / old_height, width / old_width) * (1 + (_MOST_ZOOM - 1) * float(torch.rand(())))
    full_height, full_width = max(round(old_height * zoom), height), max(round(old_width * zoom), width)
    ratio = image.boxes.new_tensor([full_width / old_width, full_height / old_height] * 2)
    enlarged = Augmented(resize(image.pixels, full_height, full_width), image.boxes * ratio, image.labels)
    top = int(torch.randint(full_height - height + 1, ()))
    left = int(torch.randint(full_width - width + 1, ()))
    return crop(enlarged, top, left, height, width)
