"""From backbone maps to levels of one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from paqdetr.paq.extractor import MaskedGroupNorm


class Neck(nn.Module):
    """1x1 convolution and GroupNorm on every backbone map; further levels by stride-2 convolutions.

    Args:
        in_channels: of the backbone's maps, finest first.
        dim: width of every level.
        num_levels: at least as many as there are maps; the rest is made from the coarsest map.
        masked_norm: norms and stride-2 convolutions leave padded cells out, so that equal maps give equal levels whatever the
            padding. The published codes do not; without padding both are the same.
    """

    def __init__(self, *, in_channels: Sequence[int], dim: int, num_levels: int, masked_norm: bool = False) -> None:
        super().__init__()
        self.masked_norm = masked_norm
        norm = MaskedGroupNorm if masked_norm else nn.GroupNorm
        groups = norm_groups(dim)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), norm(groups, dim)) for channels in in_channels
        )
        extra = num_levels - len(in_channels)
        self.extra = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels[-1] if i == 0 else dim, dim, 3, stride=2, padding=1), norm(groups, dim))
            for i in range(extra)
        )

    def forward(self, maps: Sequence[Tensor], padding_mask: Tensor | None = None) -> list[Tensor]:
        """Per stride (B, c, h, w) -> per level (B, dim, h, w).

        Args:
            maps: of the backbone, finest first.
            padding_mask: (B, H, W) bool of the images, True at padding; None if there is none. Read with `masked_norm` alone;
                padded cells are zero then.
        """
        mask = padding_mask if self.masked_norm else None
        levels = [_project(part, x, mask) for part, x in zip(self.lateral, maps, strict=True)]
        for i, downsample in enumerate(self.extra):
            levels.append(_project(downsample, maps[-1] if i == 0 else levels[-1], mask))
        return levels


def norm_groups(dim: int) -> int:
    """32 groups at the usual widths; of four channels at least, as one alone on a level of 1 x 1 is normed to a constant."""
    return next((n for n in (32, 16, 8, 4, 2) if dim % n == 0 and dim // n >= 4), 1)


def _project(part: nn.Module, x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Convolution and norm, which see no padded cell where a mask is given."""
    if padding_mask is None:
        return part(x)
    conv, norm = part.children()
    # Zero is what a 3x3 convolution finds beyond the border of an image without padding.
    x = conv(x.masked_fill(downsample_mask(padding_mask, x.shape[-2:])[:, None], 0.0))
    padded = downsample_mask(padding_mask, x.shape[-2:])[:, None]  # (B, 1, h, w)
    return norm(x, ~padded).masked_fill(padded, 0.0)


def downsample_mask(padding_mask: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) bool at image resolution -> (B, h, w) bool at a level's, True at padding."""
    return F.interpolate(padding_mask[:, None].float(), size=tuple(size), mode="nearest")[:, 0].bool()
