"""Deformable attention with torch's `grid_sample`: runs everywhere, exports to ONNX, and is what other back ends must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """See `paqdetr.ops.ms_deform_attn`, whose arguments these are, already checked."""
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    grids = 2 * sampling_locations - 1  # in at least float32; grid_sample wants the values in the same dtype
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    sampled = []
    for level, (height, width) in enumerate(spatial_shapes):
        # (B, S_l, H, D) -> (B*H, D, h, w)
        plane = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        # (B, Q, H, P, 2) -> (B*H, Q, P, 2)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(plane.to(grid.dtype), grid, align_corners=False))  # (B*H, D, Q, P)
    # (B, Q, H, L, P) -> (B*H, 1, Q, L*P)
    weights = attention_weights.transpose(1, 2).reshape(
        batch * heads, 1, queries, len(spatial_shapes) * points
    )
    corners = torch.cat(sampled, dim=-1)  # (B*H, D, Q, L*P)
    mixed = (corners * weights.to(corners.dtype)).sum(-1)  # (B*H, D, Q)
    return mixed.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()
