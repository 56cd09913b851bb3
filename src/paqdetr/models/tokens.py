"""Feature maps laid out as one sequence, with what is needed to find a token's place again.

The valid cells of a level are a rectangle that begins at its first cell: padding lies right and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paqdetr.models.neck import downsample_mask
from paqdetr.models.position import sine_map


@dataclass(frozen=True, slots=True)
class Tokens:
    """Levels one after another, finest first, each row by row.

    Attributes:
        values: (B, S, d).
        spatial_shapes: L pairs (height, width); S = sum of height * width.
        padding_mask: (B, S) bool, True at padding; None if no image of the batch has any.
        position: (B, S, d) sine embedding.
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
            position=torch.cat(position, dim=1).expand(batch, -1, -1),
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
