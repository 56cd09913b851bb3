"""Whether targets are what `Targets` promises, checked where they enter and not deep inside of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paqdetr.structures import Targets

# Boxes may leave [0, 1] by so much: a pixel of an image of 1000, and far more than any rounding.
_TOLERANCE = 1e-3


def require_form(targets: Sequence[Targets], *, batch: int, device: torch.device | None = None) -> None:
    """Types, shapes and number of targets, without a GPU sync.

    Args:
        targets: of a batch.
        batch: images in it.
        device: where they have to be; None: anywhere.

    Raises:
        ValueError: naming the image and what to do.
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
        labels, boxes, where = target.labels, target.boxes, _name(target, position)
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(
                f"labels of {where} are {labels.dtype} of shape {tuple(labels.shape)}: give int64 of shape (G,)"
            )
        if not boxes.is_floating_point() or tuple(boxes.shape) != (len(labels), 4):
            raise ValueError(
                f"boxes of {where} are {boxes.dtype} of shape {tuple(boxes.shape)}:"
                f" give floats of shape ({len(labels)}, 4), one row for each label"
            )
        for name, tensor in (("labels", labels), ("boxes", boxes)):
            if device is not None and tensor.device != device:
                raise ValueError(
                    f"{name} of {where} are on {tensor.device}, the predictions on {device}:"
                    f" move them with target.to({str(device)!r})"
                )


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
