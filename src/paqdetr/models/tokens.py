"""From backbone maps to tokens: levels of one width, laid out as one sequence, with what is needed to find a token's place again.

The valid cells of a level are a rectangle that begins at its first cell: padding lies right and below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paqdetr.paq.extractor import MaskedGroupNorm, norm_groups


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


@dataclass(frozen=True, slots=True)
class Tokens:
    """Levels one after another, finest first, each row by row.

    Attributes:
        values: (B, S, d).
        spatial_shapes: L pairs (height, width); S = sum of height * width.
        padding_mask: (B, S) bool, True at padding; None if no image of the batch has any.
        position: (B, S, d) sine embedding; (1, S, d) without padding, where all images have the same.
        centers: (B, S, 2) xy of every cell's centre in [0, 1] of the image without its padding.
        valid_ratios: (B, L, 2) xy: which share of each level is image rather than padding.
        level_index: (S,) int64, the level of every token.
    """

    values: Tensor
    spatial_shapes: list[tuple[int, int]]
    padding_mask: Tensor | None
    position: Tensor
    centers: Tensor
    valid_ratios: Tensor
    level_index: Tensor

    def with_values(self, values: Tensor) -> Tokens:
        """The same places with other values."""
        return replace(self, values=values)

    @classmethod
    def from_maps(
        cls, maps: Sequence[Tensor], padding_mask: Tensor | None, *, temperature: float, offset: float = 0.0
    ) -> Tokens:
        """Lay out the neck's maps.

        Args:
            maps: per level (B, d, h, w).
            padding_mask: (B, H, W) bool of the images, True at padding, or None if there is none. One without a single True
                gives the same result; only on the CPU it also saves the work.
            temperature, offset: of the sine embedding, see `sine_map`.
        """
        masks: list[Tensor] | None = None
        if padding_mask is not None and _may_have_padding(padding_mask):
            masks = [downsample_mask(padding_mask, x.shape[-2:]) for x in maps]
        shapes = [(int(x.shape[2]), int(x.shape[3])) for x in maps]
        values = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        return cls.from_values(values, shapes, masks, temperature=temperature, offset=offset)

    @classmethod
    def from_values(
        cls,
        values: Tensor,
        spatial_shapes: list[tuple[int, int]],
        masks: Sequence[Tensor] | None,
        *,
        temperature: float,
        offset: float = 0.0,
    ) -> Tokens:
        """From values (B, S, d) already laid out, and per-level masks (B, h, w), True at padding, or None."""
        batch, _, dim = values.shape
        dtype = torch.promote_types(values.dtype, torch.float32)
        # Without padding all images have the same places: computed once, and a constant in an exported graph.
        levels = masks or [
            torch.zeros(1, height, width, dtype=torch.bool, device=values.device) for height, width in spatial_shapes
        ]
        ratios = torch.stack([_valid_ratio(mask, dtype) for mask in levels], dim=1)  # (B or 1, L, 2)
        position = [sine_map(mask, dim, temperature, offset, dtype) for mask in levels]
        centers = [_centers(mask, dtype) for mask in levels]
        level_index = [
            torch.full((height * width,), level, device=values.device)
            for level, (height, width) in enumerate(spatial_shapes)
        ]
        return cls(
            values=values,
            spatial_shapes=spatial_shapes,
            padding_mask=None if masks is None else torch.cat([mask.flatten(1) for mask in masks], dim=1),
            position=torch.cat(position, dim=1),
            centers=torch.cat(centers, dim=1).expand(batch, -1, -1),
            valid_ratios=ratios.expand(batch, -1, -1),
            level_index=torch.cat(level_index),
        )


def _may_have_padding(mask: Tensor) -> bool:
    """Whether there is any; on a GPU taken for granted, since looking would be a GPU sync."""
    return mask.device.type != "cpu" or bool(mask.any())


def _valid_ratio(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, h, w) -> (B, 2): share of valid cells along x and y, read off the first row and column."""
    valid = ~mask
    return torch.stack([valid[:, 0].to(dtype).mean(1), valid[:, :, 0].to(dtype).mean(1)], dim=-1)


def _centers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, h, w) -> (B, h * w, 2) xy, counted from the first cell; beyond 1 at padding."""
    _, height, width = mask.shape
    y = torch.arange(height, device=mask.device, dtype=dtype) + 0.5
    x = torch.arange(width, device=mask.device, dtype=dtype) + 0.5
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)  # (h*w, 2)
    # One division by the number of valid cells: to the last bit the same however many padded ones follow.
    valid = ~mask
    counts = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], dim=-1)  # (B, 2)
    return grid / counts[:, None].clamp(min=1)


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
    swapped = torch.cat([boxes[..., 1:2], boxes[..., :1], boxes[..., 2:]], dim=-1)
    return _sine(swapped, dim, temperature).flatten(-2)


def sine_proposals(boxes: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """(..., 4) cxcywh in [0, 1] -> (..., 4 * dim): embeddings of cx, cy, w, h in the order of Deformable DETR's proposals."""
    return _sine(boxes, dim, temperature).flatten(-2)


def _sine(position: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) in [0, 1] -> (..., dim), sine and cosine in turn."""
    exponent = 2 * torch.arange(dim // 2, device=position.device) / dim
    angle = position.unsqueeze(-1) * 2 * math.pi / temperature ** exponent.to(position.dtype)  # (..., dim / 2)
    # Stacked as blocks and then transposed, which is faster than to stack along a last axis of two.
    return torch.stack([angle.sin(), angle.cos()], dim=-2).transpose(-1, -2).flatten(-2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in [0, 1], with x and 1 - x each held at eps or more."""
    # One clamp each, with float bounds: exporters to ONNX merge two in a row into an invalid node.
    return x.clamp(eps, 1.0).log() - (1 - x).clamp(eps, 1.0).log()


def at_least_float32(x: Tensor) -> Tensor:
    """Boxes and places are computed in float32 whatever autocast does, or in float64 where the model is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
