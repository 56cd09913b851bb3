"""Four training images in one, around a point that is drawn: more and smaller objects in contexts that do not belong to them."""

from __future__ import annotations

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

# The point lies in this middle part of the picture; a tile is enlarged at most so far beyond what fills its place.
_MIDDLE = (0.35, 0.65)
_MOST_ZOOM = 1.5


def mosaic(
    tiles: list[tuple[Tensor, Tensor, Tensor]], *, min_visible: float
) -> tuple[Tensor, Tensor, Tensor]:
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


def _fill(
    pixels: Tensor, boxes: Tensor, height: int, width: int, min_visible: float
) -> tuple[Tensor, Tensor, Tensor]:
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
    visible = _area(cut) / _area(whole).clamp(min=1e-6)
    kept = (visible >= min_visible) & (_area(cut) > 0)
    return resized[:, top : top + height, left : left + width], cut[kept], kept


def _area(boxes: Tensor) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]
