"""Sine embeddings of places and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_map(
    padding_mask: Tensor, dim: int, temperature: float, offset: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Position of every cell, counted over valid cells and normalised to (0, 2 pi]; first y, then x.

    Args:
        padding_mask: (B, h, w) bool, True at padding.
        dim: channels, divisible by 4.
        temperature: ratio of the longest to the shortest wavelength.
        offset: added to the count: 0 as in DETR and DINO, where the first cell is 1; -0.5 as in Deformable DETR.
        dtype: of the result.

    Returns:
        (B, h * w, dim).
    """
    valid = (~padding_mask).to(dtype)
    parts = []
    for axis in (1, 2):
        count = valid.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        parts.append(_sine((count + offset) / (last + 1e-6), dim // 2, temperature))
    return torch.cat(parts, dim=-1).flatten(1, 2)


def sine_boxes(boxes: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(..., 4) cxcywh in [0, 1] -> (..., 4 * dim): embeddings of cy, cx, w, h in the order of DAB-DETR and DINO."""
    center_x, center_y, width, height = boxes.unbind(-1)
    return _sine(torch.stack([center_y, center_x, width, height], dim=-1), dim, temperature).flatten(-2)


def sine_proposals(boxes: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(..., 4) cxcywh in [0, 1] -> (..., 4 * dim): embeddings of cx, cy, w, h in the order of Deformable DETR's proposals."""
    return _sine(boxes, dim, temperature).flatten(-2)


def _sine(position: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) in [0, 1] -> (..., dim), sine and cosine in turn."""
    exponent = 2 * torch.div(torch.arange(dim, device=position.device), 2, rounding_mode="floor") / dim
    angle = position.unsqueeze(-1) * 2 * math.pi / temperature ** exponent.to(position.dtype)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in [0, 1], with x and 1 - x each held at eps or more."""
    # One clamp each, with float bounds: exporters to ONNX merge two in a row into an invalid node.
    return x.clamp(eps, 1.0).log() - (1 - x).clamp(eps, 1.0).log()


def at_least_float32(x: Tensor) -> Tensor:
    """Boxes and places are computed in float32 whatever autocast does, or in float64 where the model is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
