"""A detector that needs no weights: it finds patches of plain colour, wherever they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from paqdetr.structures import ClassTable, Detections


@dataclass
class Patches:
    """Finds connected red (id 7) and green (id 3) pixels on dark ground.

    Attributes:
        smallest: share of the image's longer side below which a patch is not seen, as small objects are lost where an image is
            made smaller.
        delay: seconds that a call takes.
        calls: how many images came in each call, and how many of them go together.
    """

    smallest: float = 0.0
    delay: float = 0.0
    classes: ClassTable = field(default_factory=lambda: ClassTable((7, 3), ("red", "green/x")))
    calls: list[tuple[int, int]] = field(default_factory=list)

    def predict(self, images: Sequence[Image.Image], /, *, batch_size: int = 1, **how: Any) -> list[Detections]:
        self.calls.append((len(images), batch_size))
        time.sleep(self.delay)
        return [self._one(np.asarray(image)).above(how.get("threshold", 0.3)) for image in images]

    def _one(self, pixels: np.ndarray) -> Detections:
        boxes, scores, labels = [], [], []
        for channel, label in ((0, 7), (1, 3)):
            others = [c for c in range(3) if c != channel]
            regions, _ = ndimage.label((pixels[..., channel] > 150) & (pixels[..., others].max(-1) < 100))
            for rows, columns in ndimage.find_objects(regions):
                box = [columns.start, rows.start, columns.stop, rows.stop]
                side = max(box[2] - box[0], box[3] - box[1])
                if side >= self.smallest * max(pixels.shape[:2]):
                    boxes.append(box)
                    scores.append(0.5 + 0.4 * min(side / 1000, 1.0))
                    labels.append(label)
        order = np.argsort(-np.array(scores), kind="stable")
        return Detections(
            boxes=np.array(boxes, np.float32).reshape(-1, 4)[order],
            scores=np.array(scores, np.float32)[order],
            labels=np.array(labels, np.int64)[order],
            names=self.classes.id_to_name,
        )


def scene(size: tuple[int, int], *boxes: tuple[float, ...], colour: str = "#ff0000") -> Image.Image:
    """Dark ground with a patch at each (left, top, right, bottom), where right and bottom are left out."""
    image = Image.new("RGB", size, "#101018")
    draw = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return image
