"""From predictions to matches: what every assigner looks at, computed for all layers and images at once.

The costs of a step cross to the host in one transfer, whatever the number of layers; the solvers then run on numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paqdetr.errors import NonFiniteError
from paqdetr.structures import Targets

# Boxes may leave [0, 1] by so much: a pixel of an image of 1000, and far more than any rounding.
_TOLERANCE = 1e-3


def require_targets(targets: Sequence[Targets], *, batch: int, device: torch.device | None = None) -> None:
    """Raise ValueError unless there are targets for each image, without a GPU sync.

    Args:
        targets: of a batch.
        batch: images in it.
        device: where they have to be; None: anywhere.
    """
    if len(targets) != batch:
        raise ValueError(
            f"{len(targets)} targets for {batch} images: give one of each image, with no rows if it has no boxes"
        )
    for position, target in enumerate(targets):
        if not isinstance(target, Targets):
            raise ValueError(
                f"target of batch position {position} is a {type(target).__name__}:"
                " give paqdetr.paq.Targets(labels=..., boxes=...)"
            )
        for name, tensor in (("labels", target.labels), ("boxes", target.boxes)):
            if device is not None and tensor.device != device:
                raise ValueError(
                    f"{name} of {_name(target, position)} are on {tensor.device}, the predictions on {device}:"
                    f" move them with target.to({str(device)!r})"
                )


def require_predictions(logits: Tensor, boxes: Tensor, *axes: str) -> None:
    """Raise ValueError unless logits are (*axes, C) and boxes (*axes, 4)."""
    if logits.ndim != len(axes) + 1 or boxes.shape != (*logits.shape[:-1], 4):
        wanted, found = ", ".join(axes), f"{tuple(logits.shape)} and {tuple(boxes.shape)}"
        raise ValueError(f"predictions: expected logits ({wanted}, C) and boxes ({wanted}, 4), found {found}")


def require_values(targets: Sequence[Targets], num_classes: int) -> None:
    """Labels in [0, C), boxes finite and in [0, 1] up to a thousandth. A GPU sync where targets are on one.

    Raises:
        ValueError: naming the first image that is wrong, and what to do.
    """
    for position, target in enumerate(targets):
        if bool(values_fit(target, num_classes)):
            continue
        where, boxes = _name(target, position), target.boxes
        wrong = target.labels[(target.labels < 0) | (target.labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"labels of {where} hold {wrong[0].item()}, and there are {num_classes} classes:"
                f" number them from 0 to {num_classes - 1}"
            )
        row = boxes[~_in_range(boxes).all(-1)][0].tolist()
        raise ValueError(
            f"boxes of {where} hold {row}: give finite cxcywh in [0, 1], divided by the image's width and height"
            " (pixels or corners want torchvision.ops.box_convert first)"
        )


def values_fit(target: Targets, num_classes: int) -> Tensor:
    """Whether `require_values` has nothing against an image's targets: a bool scalar where they are."""
    labels = ((target.labels >= 0) & (target.labels < num_classes)).all()
    return labels & _in_range(target.boxes).all()


def _in_range(boxes: Tensor) -> Tensor:
    # NaN is never in a range.
    return (boxes >= -_TOLERANCE) & (boxes <= 1 + _TOLERANCE)


def _name(target: Targets, position: int) -> str:
    return f"batch position {position}" if target.image_id is None else f"image {target.image_id!r}"


@dataclass(frozen=True, slots=True)
class CostWeights:
    """Weights of the matching cost, and the focal parameters of its class term."""

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


@dataclass(frozen=True, slots=True)
class MatchingCosts:
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

    def only(self, queries: np.ndarray) -> MatchingCosts:
        """The same image without all other queries; int64 indices or a mask."""
        return MatchingCosts(
            self.cost[queries], self.iou[queries], self.class_confidence[queries], self.max_confidence[queries]
        )


def matching_costs(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    targets: Sequence[Targets],
    *,
    weights: CostWeights | None = None,
    names: Sequence[str] | None = None,
) -> list[list[MatchingCosts]]:
    """Costs and qualities of K layers and B images.

    Args:
        pred_logits: (K, B, n, C) float.
        pred_boxes: (K, B, n, 4) cxcywh in [0, 1].
        targets: B of them, on the device of the predictions.
        weights: of the cost's terms; the DETR family's by default.
        names: of the K layers, for errors; "layer1", "layer2", ... by default.

    Returns:
        MatchingCosts, a list of images for each layer.

    Raises:
        ValueError: predictions of another shape; or targets that are not what `Targets` says, naming the image and the remedy.
            Their values cross to the host with the costs, without a GPU sync of their own.
        NonFiniteError: a NaN or infinite prediction, naming layer and image ids. Nothing else can make a cost infinite.
    """
    weights = weights or CostWeights()
    require_predictions(pred_logits, pred_boxes, "K", "B", "n")
    layers, batch, _, num_classes = pred_logits.shape
    require_targets(targets, batch=batch, device=pred_boxes.device)
    counts = [len(target) for target in targets]
    with torch.no_grad():
        packed = torch.stack(
            [_image_terms(pred_logits[:, b], pred_boxes[:, b], targets[b], weights, max(counts)) for b in range(batch)],
            dim=1,
        )  # (K, B, 3 * Gmax + 1, n)
        # Half the bytes cross, and some devices have no float64.
        host = packed.cpu().to(torch.float64).numpy()
    _require_finite(host, targets, num_classes, names or [f"layer{i + 1}" for i in range(layers)])
    most = max(counts)
    result: list[list[MatchingCosts]] = []
    for layer in range(layers):
        row: list[MatchingCosts] = []
        for image, count in enumerate(counts):
            terms = host[layer, image]
            row.append(
                MatchingCosts(
                    cost=terms[:count].T,
                    iou=terms[most : most + count].T,
                    class_confidence=terms[2 * most : 2 * most + count].T,
                    max_confidence=terms[3 * most],
                )
            )
        result.append(row)
    return result


def _image_terms(logits: Tensor, boxes: Tensor, target: Targets, weights: CostWeights, most: int) -> Tensor:
    """Cost, IoU and class confidence of one image over all layers, padded to `most` boxes: (K, 3 * most + 1, n).

    Queries are the last axis throughout, as the solvers want them: nothing is turned afterwards, and all operators run along it.
    """
    layers, num_queries, num_classes = logits.shape
    count = len(target)
    # Half precision would tie costs and round IoUs; float64 stays for those who want exact tests.
    working = torch.promote_types(logits.dtype, torch.float32)
    boxes, truth = boxes.to(working), target.boxes.to(working)
    by_class = logits.to(working).sigmoid()  # (K, n, C)
    # Neither the repairs of iou_and_giou nor the sigmoid of an infinite logit may hide a broken prediction from the check below.
    sound = (boxes.isfinite().all(-1) & logits.isfinite().all(-1))[:, None]
    sound &= values_fit(target, num_classes)
    # A wrong label must not end a GPU's program before the check below can name it.
    labels = target.labels.clamp(0, num_classes - 1)
    highest = by_class.amax(-1)[:, None].masked_fill(~sound, torch.nan)  # (K, 1, n)

    by_class = by_class.transpose(1, 2).contiguous()
    of_class = by_class.index_select(1, labels)  # (K, G, n)
    if count > num_classes:  # the term depends on the class alone
        class_cost = _class_cost(by_class, weights).index_select(1, labels)
    else:
        class_cost = _class_cost(of_class, weights)

    predicted = boxes.permute(2, 0, 1)[:, :, None].contiguous()  # (4, K, 1, n)
    wanted = truth.t()[:, :, None]  # (4, G, 1)
    l1 = sum((mine - theirs).abs_() for mine, theirs in zip(predicted, wanted, strict=True))  # (K, G, n)
    iou, giou = iou_and_giou(predicted, wanted)
    cost = weights.l1 * l1 + weights.giou * -giou
    cost += weights.classification * class_cost
    padding = logits.new_zeros(layers, most - count, num_queries, dtype=working)
    return torch.cat([cost, padding, iou, padding, of_class, padding, highest], dim=1)


def _class_cost(probability: Tensor, weights: CostWeights) -> Tensor:
    """The focal loss of a positive less that of a negative, elementwise."""
    positive = weights.alpha * (1 - probability) ** weights.gamma * -(probability + 1e-8).log()
    negative = (1 - weights.alpha) * probability**weights.gamma * -(1 - probability + 1e-8).log()
    return positive - negative


def iou_and_giou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of cxcywh boxes, coordinates first: two (4, ...) -> two (...), broadcast.

    The arithmetic is that of torchvision's two functions, to the last bit; intersections are computed once, and no axis has a
    length of 2. A box of zero area on another of zero area has no union: such a pair has IoU 0, and GIoU -1 if not even a hull.
    """
    (left, top, right, bottom), area = _corners(boxes)
    (others_left, others_top, others_right, others_bottom), others_area = _corners(others)
    width = (torch.minimum(right, others_right) - torch.maximum(left, others_left)).clamp_(min=0)
    height = (torch.minimum(bottom, others_bottom) - torch.maximum(top, others_top)).clamp_(min=0)
    overlap = width.mul_(height)
    union = (area + others_area).sub_(overlap)
    iou = overlap.div_(union)
    width = (torch.maximum(right, others_right) - torch.minimum(left, others_left)).clamp_(min=0)
    height = (torch.maximum(bottom, others_bottom) - torch.minimum(top, others_top)).clamp_(min=0)
    hull = width.mul_(height)
    giou = iou - (hull - union).div_(hull)
    return iou.nan_to_num_(0.0), giou.nan_to_num_(-1.0)


def _corners(boxes: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(4, ...) cxcywh -> left, top, right, bottom, and the area."""
    x, y, width, height = boxes
    left, top, right, bottom = x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height
    return (left, top, right, bottom), (right - left) * (bottom - top)


def _require_finite(host: np.ndarray, targets: Sequence[Targets], num_classes: int, names: Sequence[str]) -> None:
    # A sum of finite float32 numbers is finite in float64, and one with a NaN or an infinity never is.
    bad = ~np.isfinite(host.sum(axis=(2, 3)))  # (K, B)
    if not bad.any():
        return
    require_values(targets, num_classes)
    layers = [names[layer] for layer in sorted({int(layer) for layer in np.nonzero(bad)[0]})]
    images = sorted({int(image) for image in np.nonzero(bad)[1]})
    ids = [f"batch position {i}" if (name := targets[i].image_id) is None else name for i in images]
    raise NonFiniteError(
        f"predictions of {', '.join(layers)} are NaN or infinite for image(s) {ids}",
        "lower the learning rate, clip gradients harder, or train without half precision",
        layers=layers,
        images=ids,
    )
