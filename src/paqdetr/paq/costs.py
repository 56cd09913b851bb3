"""From predictions to matches: what every assigner looks at, computed for all layers and images at once.

The costs of a step cross to the host in one transfer, whatever the number of layers; the solvers then run on numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from paqdetr.errors import NonFiniteError
from paqdetr.structures import Targets


@dataclass(frozen=True, slots=True)
class CostWeights:
    """Weights of the matching cost, and the focal parameters of its class term."""

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


@dataclass(frozen=True, slots=True)
class Matchables:
    """What an assigner may look at in one image of one layer, on the host.

    Attributes:
        cost: (n, G) float64, the usual DETR matching cost; lower is better.
        iou: (n, G) float64 in [0, 1].
        class_confidence: (n, G) float64 in [0, 1], the probability of each box's class.
        max_confidence: (n,) float64 in [0, 1], the probability of the likeliest class.
    """

    cost: np.ndarray
    iou: np.ndarray
    class_confidence: np.ndarray
    max_confidence: np.ndarray


def matchables(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    targets: Sequence[Targets],
    *,
    weights: CostWeights | None = None,
    names: Sequence[str] | None = None,
) -> list[list[Matchables]]:
    """Costs and qualities of K layers and B images.

    Args:
        pred_logits: (K, B, n, C) float.
        pred_boxes: (K, B, n, 4) cxcywh in [0, 1].
        targets: B of them, on the device of the predictions.
        weights: of the cost's terms; the DETR family's by default.
        names: of the K layers, for errors; "layer1", "layer2", ... by default.

    Returns:
        [layer][image] -> Matchables.

    Raises:
        NonFiniteError: a NaN or infinite prediction, naming layer and image ids. Nothing else can make a cost infinite.
    """
    weights = weights or CostWeights()
    layers, batch, num_queries, _ = pred_logits.shape
    counts = [len(target) for target in targets]
    with torch.no_grad():
        packed = torch.stack(
            [
                _image_terms(pred_logits[:, b], pred_boxes[:, b], targets[b], weights, max(counts))
                for b in range(batch)
            ],
            dim=1,
        )  # (K, B, 3 * Gmax + 1, n)
        host = packed.to(torch.float64).cpu().numpy()
    _require_finite(host, targets, names or [f"layer{i + 1}" for i in range(layers)])
    most = max(counts)
    result: list[list[Matchables]] = []
    for layer in range(layers):
        row: list[Matchables] = []
        for image, count in enumerate(counts):
            terms = host[layer, image]
            row.append(
                Matchables(
                    cost=terms[:count].T,
                    iou=terms[most : most + count].T,
                    class_confidence=terms[2 * most : 2 * most + count].T,
                    max_confidence=terms[3 * most],
                )
            )
        result.append(row)
    return result


def _image_terms(logits: Tensor, boxes: Tensor, target: Targets, weights: CostWeights, most: int) -> Tensor:
    """Cost, IoU and class confidence of one image over all layers, padded to `most` boxes: (K, 3 * most + 1, n)."""
    layers, num_queries, _ = logits.shape
    count = len(target)
    # Half precision would tie costs and round IoUs; float64 stays for those who want exact tests.
    working = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.to(working).sigmoid()  # (K, n, C)
    boxes, truth = boxes.to(working), target.boxes.to(working)
    of_class = probability[..., target.labels]  # (K, n, G)

    positive = weights.alpha * (1 - of_class) ** weights.gamma * -(of_class + 1e-8).log()
    negative = (1 - weights.alpha) * of_class**weights.gamma * -(1 - of_class + 1e-8).log()
    flat = boxes.flatten(0, 1)  # (K*n, 4)
    corners, truth_corners = box_convert(flat, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
    # A box of zero area on a target of zero area has no union: such a pair has IoU 0.
    iou = box_iou(corners, truth_corners).nan_to_num(0.0) if count else flat.new_zeros(len(flat), 0)
    giou = generalized_box_iou(corners, truth_corners).nan_to_num(-1.0) if count else iou
    l1 = torch.cdist(flat, truth, p=1)
    cost = weights.l1 * l1 + weights.giou * -giou
    cost = cost.view(layers, num_queries, count) + weights.classification * (positive - negative)

    # Neither nan_to_num nor the sigmoid of an infinite logit may hide a broken prediction from the check below.
    sound = flat.isfinite().all(-1).view(layers, num_queries, 1) & logits.isfinite().all(-1, keepdim=True)
    highest = probability.amax(-1, keepdim=True).masked_fill(~sound, torch.nan)  # (K, n, 1)
    padding = logits.new_zeros(layers, num_queries, most - count, dtype=working)
    terms = [cost, padding, iou.view_as(cost), padding, of_class, padding, highest]
    return torch.cat(terms, dim=-1).transpose(1, 2)


def _require_finite(host: np.ndarray, targets: Sequence[Targets], names: Sequence[str]) -> None:
    bad = ~np.isfinite(host).all(axis=(2, 3))  # (K, B)
    if not bad.any():
        return
    layers = [names[layer] for layer in sorted({int(layer) for layer in np.nonzero(bad)[0]})]
    images = sorted({int(image) for image in np.nonzero(bad)[1]})
    ids = [f"batch position {i}" if (name := targets[i].image_id) is None else name for i in images]
    raise NonFiniteError(
        f"predictions of {', '.join(layers)} (or the boxes they are matched with) are NaN or infinite for image(s) {ids}",
        "lower the learning rate, clip gradients harder, or train without half precision",
        layers=layers,
        images=ids,
    )
