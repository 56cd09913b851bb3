"""Deformable attention as one weighted gather of rows a level: for devices and formats without `grid_sample`.

The four corners of every point are rows of a table, read with one `index_select` and added with their bilinear shares. It
holds four times as many numbers as the reference while it runs, so nobody picks it who has another choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ms_deform_attn_gather(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """See `paqdetr.ops.ms_deform_attn`, whose arguments these are, already checked."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], dim=1)
    # (B, 1, H, 1): the table of a level holds the tokens of one image and head one after another.
    table_of = (torch.arange(batch, device=value.device)[:, None] * heads).add(
        torch.arange(heads, device=value.device)
    )[:, None, :, None]
    total = value.new_zeros(batch, queries, heads, channels, dtype=dtype)
    for level, (height, width) in enumerate(spatial_shapes):
        table = levels[level].transpose(1, 2).reshape(-1, channels)  # (B * H * S_l, D)
        x, y = (locations[:, :, :, level] * locations.new_tensor([width, height]) - 0.5).unbind(-1)
        rows, shares = [], []
        # (B, Q, H, P) each: pixels before and after along an axis, and what the point takes of each.
        for row, share_y in _neighbours(y, height):
            for column, share_x in _neighbours(x, width):
                rows.append(table_of * (height * width) + row * width + column)
                shares.append(share_y * share_x * weights[:, :, :, level])
        read = table.index_select(0, torch.stack(rows, -1).flatten())  # (B * Q * H * P * 4, D)
        read = read.view(batch, queries, heads, -1, channels)  # (B, Q, H, P * 4, D)
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
