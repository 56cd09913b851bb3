"""What each stage of a detector finds: the encoder's proposals, then one decoder layer after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from paqdetr.config import ModelConfig
from paqdetr.data.dataset import DetectionDataset
from paqdetr.metrics.coco import CocoRecords, evaluate_detections
from paqdetr.models.inference import postprocess
from paqdetr.models.outputs import DetectorOutput
from paqdetr.serialize import fields_of, json_number
from paqdetr.structures import CONFIDENT, ClassTable, Detections, Targets

_FOUND_IOU = 0.5


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage, over all images. What nothing defines is NaN.

    Attributes:
        stage: "proposals" or "layer 1", "layer 2", ...
        best_iou: mean over boxes of the largest IoU that any query has with it, whatever its class and score, in [0, 1].
        found: share of boxes for which that is 0.5 or more.
        AP, AP_nms: of the stage's predictions, as of `Evaluation`: without and with duplicates removed. NaN for proposals of an
            encoder that predicts no classes.
        predictions_per_image: that score over 0.3.
    """

    stage: str
    best_iou: float
    found: float
    AP: float
    AP_nms: float
    predictions_per_image: float

    @property
    def duplicates(self) -> float:
        """What duplicates cost: AP after removing them, less AP."""
        return self.AP_nms - self.AP

    def to_json(self) -> dict[str, Any]:
        """Figures by name, with `duplicates`, to six digits; None where a figure is NaN."""
        return fields_of(self, 6) | {"duplicates": json_number(self.duplicates, 6)}


@dataclass(slots=True)
class _Seen:
    """One stage of one image: (G,) float32 the largest IoU of each box, and detections; None where none are predicted."""

    best_iou: np.ndarray
    detections: Detections | None


@dataclass(slots=True)
class LayerCollector:
    """An observer of an evaluation that keeps what every stage of the detector predicts:
    `evaluate_split(model, split, observers=[collector])`, then `collector.figures(split)`.

    It keeps the best predictions of every image and stage; 300 take some 6 kB.

    Attributes:
        classes: of the model.
        config: of the model; it says how many predictions are kept.
    """

    classes: ClassTable
    config: ModelConfig = field(default_factory=ModelConfig)
    _seen: dict[int, dict[str, _Seen]] = field(default_factory=dict)

    def see(self, output: DetectorOutput, targets: Sequence[Targets], indices: Sequence[int]) -> None:
        """As an observer of an evaluation: take in a batch."""
        stages: dict[str, tuple[Tensor, Tensor]] = {}
        if output.proposals is not None:
            stages["proposals"] = output.proposals.logits, output.proposals.boxes
        for number, layer in enumerate(zip(output.layers.logits, output.layers.boxes, strict=True), start=1):
            stages[f"layer {number}"] = layer
        for stage, (logits, boxes) in stages.items():
            logits, boxes = logits.float().cpu(), boxes.float().cpu()  # (B, n, C), (B, n, 4)
            for place, (index, target) in enumerate(zip(indices, targets, strict=True)):
                seen = _Seen(_best_iou(boxes[place], target), self._detect(logits[place], boxes[place], target))
                self._seen.setdefault(index, {})[stage] = seen

    def merge(self, other: LayerCollector) -> None:
        """Take over what another process's collector has seen."""
        self._seen |= other._seen

    def figures(self, split: DetectionDataset) -> tuple[StageFigures, ...]:
        """From the first stage to the last.

        Args:
            split: the images that were seen, all of them.
        """
        if len(self._seen) != len(split):
            raise ValueError(
                f"split: {len(split)} images, {len(self._seen)} were seen; expected the split of the evaluation"
            )
        truth = CocoRecords.open(split.ground_truth(), "bbox")
        return tuple(self._stage(stage, split, truth) for stage in self._seen[0]) if len(split) else ()

    def _stage(self, stage: str, split: DetectionDataset, truth: CocoRecords) -> StageFigures:
        seen = [self._seen[index][stage] for index in range(len(split))]
        best = np.concatenate([one.best_iou for one in seen])
        found: list[Detections] = []
        for image_id, one in zip(split.image_ids, seen, strict=True):
            if one.detections is not None:
                kept = one.detections.as_classes(self.classes.ids_in(split.classes), split.classes.id_to_name)
                kept.image_id = image_id
                found.append(kept)
        ap = ap_nms = sure = float("nan")
        if found:
            ap, ap_nms = (
                evaluate_detections(truth, [row for one in some for row in one.to_coco()]).AP
                for some in (found, [one.without_duplicates() for one in found])
            )
            sure = float(np.mean([(one.scores > CONFIDENT).sum() for one in found]))
        nothing = float("nan")
        return StageFigures(
            stage=stage,
            best_iou=float(best.mean()) if best.size else nothing,
            found=float((best >= _FOUND_IOU).mean()) if best.size else nothing,
            AP=ap,
            AP_nms=ap_nms,
            predictions_per_image=sure,
        )

    def _detect(self, logits: Tensor, boxes: Tensor, target: Targets) -> Detections | None:
        if logits.shape[1] != len(self.classes):
            return None
        assert target.size is not None
        return postprocess(logits, boxes, target.size, self.classes, self.config, threshold=0.0)


def _best_iou(boxes: Tensor, target: Targets) -> np.ndarray:
    """(n, 4) cxcywh and G boxes -> (G,) float32."""
    if not len(target):
        return np.zeros(0, dtype=np.float32)
    truth = target.boxes.to("cpu", torch.float32)
    overlaps = box_iou(box_convert(truth, "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))  # (G, n)
    return overlaps.amax(1).numpy()
