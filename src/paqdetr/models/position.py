"""Sine embeddings of places and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_map(padding_mask: Tensor, dim: int, temperature: float) -> Tensor:
    """Position of every cell, counted over valid cells and normalised to (0, 2 pi]; first y, then x.

    Args:
        padding_mask: (B, h, w) bool, True at padding.
        dim: channels, divisible by 4.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (B, h * w, dim) float32.
    """
    valid = (~padding_mask).float()
    parts = []
    for axis in (1, 2):
        count = valid.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        parts.append(_sine(count / (last + 1e-6), dim // 2, temperature))
    return torch.cat(parts, dim=-1).flatten(1, 2)


def sine_boxes(boxes: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(..., 4) cxcywh in [0, 1] -> (..., 4 * dim): embeddings of cy, cx, w, h in the order of DAB-DETR and DINO."""
    center_x, center_y, width, height = (_sine(boxes[..., i], dim, temperature) for i in range(4))
    return torch.cat([center_y, center_x, width, height], dim=-1)


def _sine(position: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) in [0, 1] -> (..., dim), sine and cosine in turn."""
    exponent = 2 * torch.div(torch.arange(dim, device=position.device), 2, rounding_mode="floor") / dim
    angle = position.unsqueeze(-1) * 2 * math.pi / temperature**exponent
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in [0, 1], held inside +-log(1 / eps)."""
    return torch.logit(x.clamp(eps, 1 - eps))
