"""Whether an exported file finds what the model finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from paqdetr.models import Detector
from paqdetr.models.inference import detect_batch
from paqdetr.runtime import Predictor
from paqdetr.structures import Detections

IMAGES = 8
# Where fewer are over the threshold, as with a model that is hardly trained, the best of an image are compared.
_AT_LEAST = 20
TOLERANCES = {"f32": (0.99, 1e-3), "f16": (0.95, 2e-2)}
"""By precision: the least IoU and the largest difference of scores between a detection and its partner."""
_RAW = 1e-3


@dataclass(frozen=True, slots=True)
class ImageParity:
    """One image's comparison.

    Attributes:
        compared: detections of the model and of the file that were looked for in the other's.
        missing: those without a partner of their class.
        min_iou, max_score_difference: over those that have one.
        raw_difference: largest difference of logits and boxes over queries that did not change places; None unless exported raw.
    """

    compared: int
    missing: int
    min_iou: float
    max_score_difference: float
    raw_difference: float | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """What the comparison found. It passes if no detection lacks its partner and no raw output is off by more than 1e-3."""

    min_iou: float
    max_score_difference: float
    images: tuple[ImageParity, ...]

    @property
    def passed(self) -> bool:
        return not any(image.missing or (image.raw_difference or 0) > _RAW for image in self.images)

    def to_json(self) -> dict[str, Any]:
        """Ready for json."""
        limits = {"min_iou": self.min_iou, "max_score_difference": self.max_score_difference}
        return {"passed": self.passed, "allowed": limits, "images": [asdict(image) for image in self.images]}


def compare_with_model(
    model: Detector, exported: Predictor, pictures: Sequence[Image.Image], *, threshold: float
) -> Parity:
    """Detect in the same pixels with both, and look for every detection of the one among those of the other.

    They are compared as sets: where two proposals have all but the same score, they may change places, and their queries with
    them.

    Args:
        model: on any device.
        exported: the file.
        pictures: of any size; each is stretched to the file's.
        threshold: detections from this score on are compared, and 20 of an image if there are fewer.
    """
    size = exported.preprocessing
    limits = TOLERANCES.get(exported.info.precision, TOLERANCES["f32"])
    whole, found = (size.height, size.width), []
    for picture in pictures:
        pixels, seen, raw = size(picture), [], None
        [own] = detect_batch(model, [model.preprocessing(Image.fromarray(pixels), whole)], [whole], look=seen.append)
        [other] = exported.detect([pixels], [whole])
        if exported.info.raw:
            logits, boxes = (values[0].float().cpu().numpy() for values in (seen[0].pred_logits, seen[0].pred_boxes))
            raw = _raw_difference(exported.outputs(pixels[None]), logits, boxes)
        found.append(_compared(own, other, threshold, *limits, raw))
    return Parity(*limits, tuple(found))


def _compared(
    own: Detections, other: Detections, threshold: float, min_iou: float, max_difference: float, raw: float | None
) -> ImageParity:
    compared, missing, ious, differences = 0, 0, [1.0], [0.0]
    for one, among in ((own, other), (other, own)):
        count = max(int((one.scores >= threshold).sum()), min(_AT_LEAST, len(one)))
        iou = box_iou(torch.from_numpy(one.boxes[:count]), torch.from_numpy(among.boxes)).numpy()
        difference = np.abs(one.scores[:count, None] - among.scores)
        fits = (one.labels[:count, None] == among.labels) & (iou >= min_iou) & (difference <= max_difference)
        for row, partners in enumerate(fits):
            compared += 1
            if not partners.any():
                missing += 1
                continue
            best = int(np.where(partners, iou[row] - difference[row], -1).argmax())
            ious.append(float(iou[row, best]))
            differences.append(float(difference[row, best]))
    return ImageParity(compared, missing, min(ious), max(differences), raw)


def _raw_difference(given: tuple[np.ndarray, ...], logits: np.ndarray, boxes: np.ndarray) -> float:
    """Over queries whose box has not moved by more than a hundredth of the image; infinite if that is not half of them."""
    still = np.abs(given[1][0] - boxes).max(1) < 0.01
    if 2 * still.sum() < len(still):
        return float("inf")
    return float(max(np.abs(given[0][0] - logits)[still].max(), np.abs(given[1][0] - boxes)[still].max()))


def digits_pictures(count: int = IMAGES, side: int = 320) -> list[Image.Image]:
    """Rendered digits, the same on every machine: pictures to compare on where no data is given."""
    from paqdetr.data.digits.scenes import SceneSpec, compose_scene

    spec = SceneSpec(size=side)
    return [Image.fromarray(compose_scene(spec, seed=0, split="val", index=i).image) for i in range(count)]
