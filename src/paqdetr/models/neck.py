"""From backbone maps to levels of one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Neck(nn.Module):
    """1x1 convolution and GroupNorm on every backbone map; further levels by stride-2 convolutions.

    Args:
        in_channels: of the backbone's maps, finest first.
        dim: width of every level.
        num_levels: at least as many as there are maps; the rest is made from the coarsest map.
    """

    def __init__(self, *, in_channels: Sequence[int], dim: int, num_levels: int) -> None:
        super().__init__()
        # 32 groups at the usual widths; of four channels at least, as one alone on a level of 1 x 1 is normed to a constant.
        norm_groups = next((n for n in (32, 16, 8, 4, 2) if dim % n == 0 and dim // n >= 4), 1)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(norm_groups, dim))
            for channels in in_channels
        )
        extra = num_levels - len(in_channels)
        self.extra = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels[-1] if i == 0 else dim, dim, 3, stride=2, padding=1),
                nn.GroupNorm(norm_groups, dim),
            )
            for i in range(extra)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Per stride (B, c, h, w) -> per level (B, dim, h, w)."""
        levels = [project(x) for project, x in zip(self.lateral, maps, strict=True)]
        for i, downsample in enumerate(self.extra):
            levels.append(downsample(maps[-1] if i == 0 else levels[-1]))
        return levels


def downsample_mask(padding_mask: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) bool at image resolution -> (B, h, w) bool at a level's, True at padding."""
    return F.interpolate(padding_mask[:, None].float(), size=tuple(size), mode="nearest")[:, 0].bool()
