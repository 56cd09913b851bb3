"""Deformable attention in plain torch: with `grid_sample`, which other back ends must equal, and as gathers of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_gather(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See `paqdetr.ops.ms_deform_attn`, whose arguments these are, already checked."""
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = sampling_locations.shape
    dtype = sampling_locations.dtype
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], dim=1)
    image = torch.arange(batch, device=value.device)[:, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None]
    total = value.new_zeros(batch, queries, heads, channels, dtype=dtype)
    for level, (height, width) in enumerate(spatial_shapes):
        table = levels[level].reshape(-1, channels)  # (B * S_l * H, D)
        x, y = sampling_locations[:, :, :, level].unbind(-1)  # (B, Q, H, P)
        rows, shares = [], []
        for row, share_y in _neighbours(y * height - 0.5, height):
            for column, share_x in _neighbours(x * width - 0.5, width):
                rows.append((image * (height * width) + row * width + column) * heads + head)
                shares.append(share_y * share_x * attention_weights[:, :, :, level])
        read = table.index_select(0, torch.stack(rows, -1).flatten())
        read = read.view(batch, queries, heads, points * 4, channels)
        total = total + (read * torch.stack(shares, -1).flatten(3)[..., None]).sum(3)
    return total.flatten(2).to(value.dtype)


def _neighbours(place: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pixels before and after places along an axis of `size` pixels, each with its share, 0 outside."""
    # Further out nothing changes, and a whole number may not hold it. NaN stays NaN in the shares alone.
    before = place.clamp(-2, size).floor().nan_to_num(-2.0)
    found = []
    for pixel, share in ((before, 1 + before - place), (before + 1, place - before)):
        inside = (pixel >= 0) & (pixel < size)
        found.append((pixel.clamp(0, size - 1).long(), torch.where(inside, share, 0 * place)))
    return found


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See `paqdetr.ops.ms_deform_attn`, whose arguments these are, already checked."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    grids = 2 * sampling_locations - 1  # in at least float32; grid_sample wants the values in the same dtype
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    mixed = []
    for level, (height, width) in enumerate(spatial_shapes):
        # (B, S_l, H, D) -> (B*H, D, h, w)
        plane = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        # (B, Q, H, P, 2) -> (B*H, Q, P, 2)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(plane.to(grid.dtype), grid, align_corners=False)  # (B*H, D, Q, P)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]  # (B*H, 1, Q, P)
        mixed.append((sampled * weights.to(sampled.dtype)).sum(-1))  # (B*H, D, Q)
    total = torch.stack(mixed).sum(0)
    return total.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()
