"""Training-time changes of picture and boxes: mosaic, flip, crop, colour, and the resize to a batch's size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision import tv_tensors

from paqdetr.config import AugmentConfig
from paqdetr.preprocessing import Preprocessing

# A box of which a crop leaves less than this share is dropped: too little to tell what it was.
MIN_VISIBLE = 0.2

# DETR's crop: the short side is resized to one of these, then a window of sides in this range is cut out. The resize that
# follows makes only their ratios count.
_DETR_SHORT_SIDES = (400, 500, 600)
_DETR_WINDOW = (384, 600)


@dataclass(frozen=True, slots=True)
class Augmented:
    """A training image.

    Attributes:
        pixels: (3, h, w) float32; uint8 before they are normalised.
        boxes: (G, 4) float32 cxcywh in [0, 1].
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
        """As `change`, with normalised pixels."""
        return self.normalized(self.change(pixels, boxes, labels, scale=scale))

    def normalized(self, image: Augmented) -> Augmented:
        """The image as the backbone wants its pixels."""
        return Augmented(self.preprocessing.normalization(image.pixels), image.boxes, image.labels)

    def change(self, pixels: Tensor, boxes: np.ndarray, labels: np.ndarray, *, scale: float) -> Augmented:
        """Change one image; pixels stay uint8.

        Args:
            pixels: (3, H, W) uint8.
            boxes: (G, 4) float32 xyxy in pixels.
            labels: (G,) int64.
            scale: size of the result relative to the configured one; a batch shares it, so that little is padded.
        """
        image = tv_tensors.Image(pixels)
        canvas: tuple[int, int] = (int(pixels.shape[1]), int(pixels.shape[2]))
        corners = tv_tensors.BoundingBoxes(  # type: ignore[call-arg]
            torch.from_numpy(boxes.reshape(-1, 4)),
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=canvas,
        )
        kept = torch.from_numpy(labels)
        if torch.rand(()) < self.config.crop:
            image, corners, kept = self._crop(image, corners, kept)
        if torch.rand(()) < self.config.flip:
            image, corners = TF.horizontal_flip(image), TF.horizontal_flip(corners)
        if self._color is not None:
            image = self._color(image)
        height, width = image.shape[-2:]
        size = self.preprocessing.target_size(height, width, scale)
        resized = TF.resize(image.as_subclass(Tensor), list(size), antialias=True)
        side = torch.tensor([width, height, width, height])
        normed = TF.convert_bounding_box_format(corners, new_format=tv_tensors.BoundingBoxFormat.CXCYWH)
        return Augmented(resized, normed.as_subclass(Tensor) / side, kept)

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

    def _crop(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes, labels: Tensor
    ) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes, Tensor]:
        """A part of the image; a crop that loses every box is not made."""
        height, width = (int(side) for side in image.shape[-2:])
        frame = self._frame(height, width)
        if self.config.keep_small:
            frame = spare_small(frame, boxes.as_subclass(Tensor), self.config.keep_small)
        top, left, crop_height, crop_width = frame
        shifted = TF.clamp_bounding_boxes(TF.crop(boxes, top, left, crop_height, crop_width))
        visible = _area(shifted) / _area(boxes).clamp(min=1e-6)
        keep = visible >= MIN_VISIBLE
        if len(labels) and not bool(keep.any()):
            return image, boxes, labels
        kept = tv_tensors.BoundingBoxes(  # type: ignore[call-arg]
            shifted.as_subclass(Tensor)[keep],
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=(crop_height, crop_width),
        )
        cropped = tv_tensors.Image(TF.crop(image, top, left, crop_height, crop_width))
        return cropped, kept, labels[keep]


def _window(side: int, zoom: float) -> int:
    """A side of DETR's crop, in pixels of the image before its resize by `zoom`."""
    low, high = _DETR_WINDOW
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
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).as_subclass(Tensor)
    return sides[:, 0] * sides[:, 1]


# The point lies in this middle part of the picture; a tile is enlarged at most so far beyond what fills its place.
_MIDDLE = (0.35, 0.65)
_MOST_ZOOM = 1.5


def mosaic(tiles: list[tuple[Tensor, Tensor, Tensor]], *, min_visible: float) -> tuple[Tensor, Tensor, Tensor]:
    """Puts four images together; the picture has the size of the first.

    Args:
        tiles: (pixels (3, h, w) uint8, boxes (G, 4) cxcywh in [0, 1], labels (G,)), from left to right and top to bottom.
        min_visible: boxes of which less than this share is left are dropped.

    Returns:
        pixels, boxes and labels of the whole, in the same forms. Draws from torch's global generator.
    """
    height, width = tiles[0][0].shape[1:]
    low, high = _MIDDLE
    down, across = (low + (high - low) * float(torch.rand(())) for _ in range(2))
    middle, centre = round(height * down), round(width * across)
    canvas = tiles[0][0].new_empty(3, height, width)
    boxes, labels = [], []
    for number, (pixels, own_boxes, own_labels) in enumerate(tiles):
        top, bottom = (0, middle) if number < 2 else (middle, height)
        left, right = (0, centre) if number % 2 == 0 else (centre, width)
        part, part_boxes, kept = _fill(pixels, own_boxes, bottom - top, right - left, min_visible)
        canvas[:, top:bottom, left:right] = part
        boxes.append(part_boxes + torch.tensor([left, top, left, top], dtype=part_boxes.dtype))
        labels.append(own_labels[kept])
    corners = torch.cat(boxes)
    side = torch.tensor([width, height] * 2, dtype=corners.dtype)
    centred = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    return canvas, centred / side, torch.cat(labels)


def _fill(pixels: Tensor, boxes: Tensor, height: int, width: int, min_visible: float) -> tuple[Tensor, Tensor, Tensor]:
    """A part of an image that fills (height, width): pixels, boxes as xyxy in pixels of the part, and which of them are kept."""
    zoom = max(height / pixels.shape[1], width / pixels.shape[2])
    zoom *= 1 + (_MOST_ZOOM - 1) * float(torch.rand(()))
    full_height, full_width = (
        max(round(pixels.shape[1] * zoom), height),
        max(round(pixels.shape[2] * zoom), width),
    )
    resized = TF.resize(pixels, [full_height, full_width], antialias=True)
    top = int(torch.randint(full_height - height + 1, ()))
    left = int(torch.randint(full_width - width + 1, ()))
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    scale = torch.tensor([full_width, full_height] * 2, dtype=boxes.dtype)
    whole = torch.cat([centre - half, centre + half], dim=1) * scale - torch.tensor([left, top] * 2)
    cut = torch.minimum(whole.clamp(min=0), torch.tensor([width, height] * 2, dtype=boxes.dtype))
    visible = _visible_area(cut) / _visible_area(whole).clamp(min=1e-6)
    kept = (visible >= min_visible) & (_visible_area(cut) > 0)
    return resized[:, top : top + height, left : left + width], cut[kept], kept


def _visible_area(boxes: Tensor) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]
