"""Large images in tiles: every tile goes through the model at its full size, and what two tiles show of one object becomes one.

Within a tile the model's own answer stands, however dense the objects are. Boxes of different tiles are compared: two that lie
whole inside their tiles are one object if they overlap as two boxes of one object do (IoU); one that is cut off at an inner edge
belongs to a box of another tile that covers most of it, and gives way to it (of two that are both cut off, the lower score gives
way if one covers most of the other); and the two parts of an object that is longer than the overlap, which both reach through all
of the overlap, are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from PIL.Image import Image

from paqdetr.errors import ConfigError
from paqdetr.structures import Detections
from paqdetr.values import is_real, is_whole

_A: TypeAlias = np.ndarray
# The least batch that tiles go through the model in, where the caller's own is smaller.
_BATCH = 4
# Two boxes are one object: by IoU of whole ones, by the covered share of one that is cut off.
_SAME, _COVERED = 0.5, 0.5
# Parts of an object agree in their extent along the cut.
_ALIGNED = 0.6


@dataclass(frozen=True, slots=True)
class Tiles:
    """How images are cut.

    Attributes:
        size: sides of a tile in pixels of the image.
        overlap: the least share of a tile that it has in common with the next, from 0 to 0.9. An object that is shorter than the
            overlap lies whole in some tile.
        with_whole: the whole image goes through the model as well, for objects that are larger than a tile.

    Raises:
        ConfigError: a value out of its range.
    """

    size: int
    overlap: float = 0.2
    with_whole: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.size) or self.size < 16:
            raise ConfigError(
                f"tiles: expected a side in whole pixels, at least 16, found {self.size!r}", "tiles=640 is usual"
            )
        if not is_real(self.overlap) or not 0 <= self.overlap <= 0.9:
            raise ConfigError(f"overlap: expected a share from 0 to 0.9, found {self.overlap!r}", "0.2 is usual")

    @classmethod
    def of(cls, tiles: Tiles | int) -> Tiles:
        """Itself, or tiles of this side with the usual overlap.

        Raises:
            ConfigError: it is neither.
        """
        return tiles if isinstance(tiles, Tiles) else cls(tiles)

    def windows(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of the tiles of an image, in pixels. All have one size, at even distances."""
        rows, columns = self._starts(height), self._starts(width)
        tall, wide = min(self.size, height), min(self.size, width)
        return [(left, top, left + wide, top + tall) for top in rows for left in columns]

    def count(self, height: int, width: int) -> int:
        """The number of `windows`."""
        return self._count(height) * self._count(width)

    def _count(self, length: int) -> int:
        step = max(int(self.size * (1 - self.overlap)), 1)
        return -(-max(length - self.size, 0) // step) + 1

    def _starts(self, length: int) -> list[int]:
        count = self._count(length)
        return [round(i * (length - self.size) / max(count - 1, 1)) for i in range(count)]


def predict_tiles(
    image: Image, tiles: Tiles, predict: Callable[[Iterable[Image], int], list[Detections]], *, batch_size: int = 1
) -> Detections:
    """Detections of an image by its tiles; where it is not larger than a tile, what the model says of it.

    Args:
        image: RGB.
        tiles: how it is cut.
        predict: (images, batch size) -> their detections. All tiles are given together, each cut when it is asked for.
        batch_size: tiles that go through the model together; 4 at least.
    """
    windows = tiles.windows(image.height, image.width)
    if len(windows) == 1:
        return predict([image], batch_size)[0]
    parts = predict(map(image.crop, windows), max(batch_size, _BATCH))
    if tiles.with_whole:
        windows.append((0, 0, image.width, image.height))
        parts += predict([image], batch_size)
    return merge_tiles(parts, windows, (image.height, image.width))


def merge_tiles(
    parts: Sequence[Detections], windows: Sequence[tuple[int, int, int, int]], size: tuple[int, int]
) -> Detections:
    """Detections of the tiles of an image as those of the image, each object once.

    Args:
        parts: of the tiles, in pixels of the tile.
        windows: (left, top, right, bottom) of each tile in the image.
        size: (height, width) of the image.

    Returns:
        best first, without query indices. A joined box has the better score of its parts.
    """
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    bounds = np.array(windows, dtype=np.float64)[owners]  # (N, 4)
    boxes = np.concatenate([part.boxes.reshape(-1, 4) for part in parts]).astype(np.float64) + np.tile(bounds[:, :2], 2)
    scores = np.concatenate([part.scores for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    height, width = size
    inner = bounds != np.array([0, 0, width, height])
    near = np.maximum(2.0, 0.01 * (bounds[:, 2:] - bounds[:, :2]).max(1, initial=0.0))[:, None]
    cut = inner & (np.abs(boxes - bounds) <= near)  # (N, 4): the box ends at an edge where the image goes on
    kept = np.ones(len(scores), dtype=bool)
    for axis in (0, 1):
        _join(axis, boxes, scores, labels, bounds, cut, kept)
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    owners, cut = owners[kept], cut[kept]
    chosen = _distinct(boxes, scores, labels, owners, cut.any(1))
    found = {"boxes": boxes.astype(np.float32), "scores": scores, "labels": labels, "query_indices": None, "size": size}
    return replace(parts[0], **found)[chosen[np.argsort(-scores[chosen], kind="stable")]]


def _join(axis: int, boxes: _A, scores: _A, labels: _A, bounds: _A, cut: _A, kept: _A) -> None:
    """Join the two parts of an object that is cut through at facing edges of two tiles, where both parts fill the overlap.

    Args:
        axis: 0 for parts beside each other, 1 for one above the other.
        boxes, scores, labels, cut, kept: of `merge_tiles`, changed in place, as all of these are.
        bounds: (N, 4) of the tiles; of a joined box, of both.
    """
    low, high = axis, axis + 2
    across = [1 - axis, 3 - axis]
    for first in np.argsort(bounds[:, low], kind="stable"):
        while kept[first] and cut[first, high]:
            others = kept & cut[:, low] & (labels == labels[first])
            # The next tile in this direction: it begins within the first one, and ends later.
            others &= (bounds[:, low] > bounds[first, low]) & (bounds[:, low] <= bounds[first, high])
            others &= bounds[:, high] > bounds[first, high]
            begin = np.maximum(boxes[:, across[0]], boxes[first, across[0]])
            end = np.minimum(boxes[:, across[1]], boxes[first, across[1]])
            both = np.maximum(boxes[:, across[1]], boxes[first, across[1]])
            both -= np.minimum(boxes[:, across[0]], boxes[first, across[0]])
            alike = np.where(others & (both > 0), (end - begin) / np.maximum(both, 1e-9), 0.0)
            # Through all of the overlap: each begins, or ends, beyond the other tile's edge.
            alike[boxes[first, low] > bounds[:, low]] = 0
            alike[boxes[:, high] < bounds[first, high]] = 0
            other = int(alike.argmax())
            if alike[other] < _ALIGNED:
                break
            kept[other] = False
            scores[first] = max(scores[first], scores[other])
            boxes[first, :2] = np.minimum(boxes[first, :2], boxes[other, :2])
            boxes[first, 2:] = np.maximum(boxes[first, 2:], boxes[other, 2:])
            bounds[first, high], cut[first, high] = bounds[other, high], cut[other, high]
            cut[first, across] |= cut[other, across]


def _distinct(boxes: _A, scores: _A, labels: _A, owners: _A, cut: _A) -> _A:
    """Positions of what is left where boxes of different tiles show one object: whole ones first, then by score."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = np.lexsort((-scores, cut))
    alive = np.ones(len(order), dtype=bool)
    for i in order:
        if not alive[i]:
            continue
        corner = np.minimum(boxes[i, 2:], boxes[:, 2:]) - np.maximum(boxes[i, :2], boxes[:, :2])
        shared = corner.clip(min=0).prod(1)
        whole = shared > _SAME * (area[i] + area - shared)
        # A small whole object before a large one that is cut off does not take its place.
        part = shared > _COVERED * (np.minimum(area[i], area) if cut[i] else area)
        same = np.where(cut, part, whole) & (labels == labels[i]) & (owners != owners[i])
        same[i] = False
        alive &= ~same
    return np.flatnonzero(alive)
