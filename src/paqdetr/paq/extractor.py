"""The extractor of F_w: one vector per image, from encoder tokens of every level, blind to padding.

`FusedExtractor` is the paper's (section "pattern-based dynamic queries"), `PooledExtractor` the simple variant.
Padded tokens are zero before every convolution and left out of every mean and norm, so that neither their content nor
their number reaches the result. The valid tokens of a level form a rectangle, anywhere in the map: padding may lie on any side,
as with centred images. Masks with holes or slanted edges are read by their bounding rectangle where a level is enlarged; the
result is still blind to what stands in the padding, though no longer to its amount.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm over the valid cells only; with no padding it equals `nn.GroupNorm`."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x: (B, d, h, w); valid: (B, 1, h, w), 1 at valid cells, 0 at padding. Padded cells of the result mean nothing."""
        if valid is None:
            return super().forward(x)
        batch, channels, height, width = x.shape
        working = torch.promote_types(x.dtype, torch.float32)
        # Channels last, as tokens are: sums over the valid cells are matrix products then.
        cells = x.to(working).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        weight = valid.to(working).reshape(batch, 1, height * width)
        count = weight.sum(2).clamp(min=1)  # (B, 1)
        with torch.autocast(x.device.type, enabled=False):  # which would round the sums to a half, where they overflow
            mean = (weight @ cells)[:, 0] / count  # (B, d), of each channel
            centred = cells - mean[:, None]
            variance = (weight @ centred.square())[:, 0] / count  # (B, d), of each channel
        # Of a group: the mean of its channels' variances, and the variance of their means.
        mean, variance = (figure.unflatten(1, (self.num_groups, -1)) for figure in (mean, variance))
        offset = mean - mean.mean(2, keepdim=True)  # (B, groups, d / groups)
        scale = ((variance + offset.square()).mean(2, keepdim=True) + self.eps).rsqrt()
        gain, shift = (scale.expand_as(offset).flatten(1) * self.weight, (offset * scale).flatten(1) * self.weight)
        normed = torch.addcmul((shift + self.bias)[:, None], centred, gain[:, None])
        return normed.to(x.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


class PooledExtractor(nn.Module):
    """Mean over the valid tokens of all levels -> Linear, ReLU. (B, S, d) -> (B, d)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())

    def forward(self, tokens: Tensor, spatial_shapes: Sequence[tuple[int, int]], padding_mask: Tensor | None) -> Tensor:
        """See `PatternQueries.forward`."""
        if padding_mask is None:
            return self.mlp(tokens.mean(1))
        working = torch.promote_types(tokens.dtype, torch.float32)  # thousands of tokens overflow a half
        count = (~padding_mask).sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        tokens = tokens.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        return self.mlp((tokens.sum(1, dtype=working) / count).to(tokens.dtype))


class FusedExtractor(nn.Module):
    """Top-down fusion of the levels with attention, then the mean over the finest map. (B, S, d) -> (B, d).

    Per level a 1x1 and a dilated 3x3 convolution, norm, ReLU; from the coarsest level down, the fused map is enlarged, added to
    the next finer level and passed through channel and spatial attention with a skip.

    Args:
        dim: channels d.
        num_levels: L, finest first.
        conv: "depthwise" (a tenth of the cost) or "full", the paper's.
    """

    def __init__(self, *, dim: int, num_levels: int, conv: str = "depthwise") -> None:
        super().__init__()
        if conv not in ("depthwise", "full"):
            raise ValueError(f"conv: expected 'depthwise' or 'full', found {conv!r}")
        self.levels = nn.ModuleList(
            _LevelBranch(dim=dim, dilation=2**level, depthwise=conv == "depthwise") for level in range(num_levels)
        )
        self.attention = nn.ModuleList(_ChannelSpatialAttention(dim=dim) for _ in range(max(num_levels - 1, 1)))

    def forward(self, tokens: Tensor, spatial_shapes: Sequence[tuple[int, int]], padding_mask: Tensor | None) -> Tensor:
        """See `PatternQueries.forward`."""
        count = sum(height * width for height, width in spatial_shapes)
        if len(spatial_shapes) != len(self.levels) or count != tokens.shape[1]:
            raise ValueError(
                f"spatial_shapes: expected {len(self.levels)} levels with {tokens.shape[1]} tokens in all, "
                f"found {list(spatial_shapes)} with {count}"
            )
        maps, valids = _to_maps(tokens, spatial_shapes, padding_mask)
        maps = [branch(x, valid) for branch, x, valid in zip(self.levels, maps, valids, strict=True)]
        fused, fused_valid = maps[-1], valids[-1]
        if len(maps) == 1:
            fused = self.attention[0](fused, fused_valid)
        for attention, x, valid in zip(self.attention, maps[-2::-1], valids[-2::-1], strict=False):
            fused = attention(x + _enlarge(fused, fused_valid, x.shape[-2:], valid), valid)
            fused_valid = valid
        return _mean_over_valid(fused, fused_valid).flatten(1)


class _LevelBranch(nn.Module):
    """1x1 convolution, dilated 3x3 convolution, norm, ReLU."""

    def __init__(self, *, dim: int, dilation: int, depthwise: bool) -> None:
        super().__init__()
        self.point = nn.Conv2d(dim, dim, 1)
        self.context = nn.Conv2d(
            dim, dim, 3, padding=dilation, dilation=dilation, groups=dim if depthwise else 1, bias=False
        )
        self.norm = MaskedGroupNorm(norm_groups(dim), dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = _zero_padding(self.point(x), valid)  # the bias has just filled the padding
        return _zero_padding(F.relu(self.norm(self.context(x), valid)), valid)


class _ChannelSpatialAttention(nn.Module):
    """Which channels, then which places matter (CBAM, arXiv 1807.06521), with a skip around both."""

    def __init__(self, *, dim: int, reduction: int = 16, kernel: int = 7) -> None:
        super().__init__()
        hidden = max(dim // reduction, 4)
        self.channel = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))
        self.spatial = nn.Conv2d(2, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """x: (B, d, h, w), zero at padding; so is the result."""
        # x is a sum of ReLUs at first and stays non-negative, so zeros at padding cannot win the maximum.
        mean, peak = _mean_over_valid(x, valid), x.amax((2, 3), keepdim=True)
        attended = x * (self.channel(mean) + self.channel(peak)).sigmoid()
        places = torch.cat([attended.mean(1, keepdim=True), attended.amax(1, keepdim=True)], dim=1)  # (B, 2, h, w)
        return x + attended * self.spatial(places).sigmoid()


def _to_maps(
    tokens: Tensor, spatial_shapes: Sequence[tuple[int, int]], padding_mask: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(B, S, d) -> per level (B, d, h, w), zero at padding, and (B, 1, h, w) with 1 at valid cells or None."""
    sizes = [height * width for height, width in spatial_shapes]
    maps, valids = [], []
    masks = [None] * len(sizes) if padding_mask is None else padding_mask.split(sizes, dim=1)
    for x, mask, (height, width) in zip(tokens.split(sizes, dim=1), masks, spatial_shapes, strict=True):
        plane = x.transpose(1, 2).unflatten(2, (height, width))
        valid = None if mask is None else (~mask).unflatten(1, (height, width)).unsqueeze(1).to(x.dtype)
        maps.append(plane if mask is None else plane.masked_fill(mask.unflatten(1, (height, width)).unsqueeze(1), 0.0))
        valids.append(valid)
    return maps, valids


def _zero_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid


def _mean_over_valid(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, d, h, w), zero at padding -> (B, d, 1, 1)."""
    if valid is None:
        return x.mean((2, 3), keepdim=True)
    working = torch.promote_types(x.dtype, torch.float32)  # thousands of cells overflow a half
    count = valid.sum((2, 3), keepdim=True, dtype=working).clamp(min=1)
    return (x.sum((2, 3), keepdim=True, dtype=working) / count).to(x.dtype)


def _enlarge(x: Tensor, valid: Tensor | None, size: Sequence[int], fine_valid: Tensor | None) -> Tensor:
    """Bilinear enlargement that maps the valid part of x onto the valid part of the finer level, zero beyond it.

    x: (B, d, h, w) -> (B, d, *size). Interpolating the padded maps would tie the result to the amount of padding, since the
    ratio of their sides changes with it.
    """
    if valid is None or fine_valid is None:
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    rows = _sample_positions(valid.amax((1, 3)), fine_valid.amax((1, 3)))  # (B, H) in [-1, 1]
    columns = _sample_positions(valid.amax((1, 2)), fine_valid.amax((1, 2)))  # (B, W)
    height, width = size
    grid = torch.stack(
        [columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=-1
    )  # (B, H, W, 2)
    # In half precision a position would be off by a good part of a cell, and by how much would depend on the padding.
    working = torch.promote_types(x.dtype, torch.float32)
    read = F.grid_sample(x.to(working), grid.to(working), mode="bilinear", padding_mode="border", align_corners=True)
    return _zero_padding(read.to(x.dtype), fine_valid)  # padded cells have read the edge of the valid part


def _sample_positions(coarse: Tensor, fine: Tensor) -> Tensor:
    """Where each fine cell reads along one axis: (B, h) and (B, H) valid flags -> (B, H) for `align_corners=True`.

    The valid cells of an axis are one run, wherever it begins.
    """
    have, want = coarse.float().sum(1, keepdim=True), fine.float().sum(1, keepdim=True).clamp(min=1)
    start = coarse.float().argmax(1, keepdim=True)
    cells = torch.arange(fine.shape[1], device=fine.device) - fine.float().argmax(1, keepdim=True)  # (B, H)
    # Half-pixel centres, held inside the valid cells so that padding is never read.
    position = torch.minimum(((cells + 0.5) * have / want - 0.5).clamp(min=0), (have - 1).clamp(min=0))
    return 2 * (start + position) / max(coarse.shape[1] - 1, 1) - 1


def norm_groups(dim: int) -> int:
    """32 groups at the usual widths; of four channels at least, as one alone on a level of 1 x 1 is normed to a constant."""
    return next((count for count in (32, 16, 8, 4, 2) if dim % count == 0 and dim // count >= 4), 1)
