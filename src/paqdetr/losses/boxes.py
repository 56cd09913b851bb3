"""Losses of matched pairs, for all layers and images of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from paqdetr.paq import Pairs
from paqdetr.paq.costs import iou_and_giou
from paqdetr.structures import Targets


@dataclass(frozen=True, slots=True)
class FlatPairs:
    """All matched pairs of K layers and B images as flat index tensors, each (P,) int64, with their truth.

    Attributes:
        layer, image, query: where the prediction stands in (K, B, N).
        label: its class.
        box: (P, 4) cxcywh it should have.
        weight: (P,) how much of a positive it is; None if all pairs are whole ones.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    label: Tensor
    box: Tensor
    weight: Tensor | None = None

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[Sequence[Pairs]], targets: Sequence[Targets], device: torch.device
    ) -> FlatPairs:
        """From [layer][image] -> Pairs; indices travel to the device in one go."""
        offsets = [0]
        for target in targets:
            offsets.append(offsets[-1] + len(target))
        rows = [
            torch.stack(
                [
                    torch.full_like(found.query_indices, layer),
                    torch.full_like(found.query_indices, image),
                    found.query_indices,
                    found.target_indices + offsets[image],
                ]
            )
            for layer, row in enumerate(pairs)
            for image, found in enumerate(row)
        ]
        layer, image, query, truth = torch.cat(rows, dim=1).to(device)
        labels = torch.cat([target.labels for target in targets]).to(device)
        boxes = torch.cat([target.boxes for target in targets]).to(device)
        weight = None
        if any(found.weights is not None for row in pairs for found in row):
            parts = [_weights_of(found) for row in pairs for found in row]
            weight = torch.cat(parts).to(device, boxes.dtype)
        return cls(layer, image, query, labels[truth], boxes[truth], weight)


def _weights_of(pairs: Pairs) -> Tensor:
    if pairs.weights is None:
        return torch.ones(len(pairs), dtype=torch.float64)
    return pairs.weights.to(torch.float64)


def box_losses(pred_boxes: Tensor, pairs: FlatPairs) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the pairs of each layer.

    Args:
        pred_boxes: (K, B, N, 4) cxcywh.
        pairs: of the K layers; weighted ones count by their weight.

    Returns:
        L1 (K,), GIoU loss (K,), and the detached IoU of every pair (P,), at least float32.
    """
    predicted = pred_boxes[pairs.layer, pairs.image, pairs.query]  # (P, 4)
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    truth = pairs.box.to(predicted.dtype)
    l1 = (predicted - truth).abs().sum(-1)
    corners, truth_corners = box_convert(predicted, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
    # The default eps, 1e-7, is a tenth of the area of one pixel of 800 x 1333.
    giou = generalized_box_iou_loss(corners, truth_corners, eps=1e-12)
    with torch.no_grad():
        iou, _ = iou_and_giou(predicted.T, truth.T)
    if pairs.weight is not None:
        weight = pairs.weight.to(predicted.dtype)
        l1, giou = weight * l1, weight * giou
    zero = predicted.new_zeros(pred_boxes.shape[0])
    return zero.index_add(0, pairs.layer, l1), zero.index_add(0, pairs.layer, giou), iou
