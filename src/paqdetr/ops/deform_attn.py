"""Multi-scale deformable attention: the one door to its back ends.

Source: Deformable DETR (arXiv 2010.04159), equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paqdetr.ops import registered
from paqdetr.ops.choice import choose_backend, require_backend

SpatialShapes = Tensor | Sequence[tuple[int, int]]
Backend = Literal["auto", "reference", "gather", "numba", "triton"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of values sampled bilinearly at a few points of every level.

    Sums are taken in float32, or in float64 where the values are; locations and weights are cast to that too, whatever autocast
    says. Locations that are not finite make the result NaN; their gradients differ between back ends.

    Args:
        value: (B, S, H, D) float, the levels' tokens one after another, row by row; S = sum of height * width.
        spatial_shapes: L pairs (height, width), or the same as an (L, 2) int64 tensor.
        sampling_locations: (B, Q, H, L, P, 2) float, (x, y), where [0, 1] spans the level from its first pixel's
            outer edge to its last's; what lies outside reads zero.
        attention_weights: (B, Q, H, L, P) float, usually summing to 1 over (L, P).
        backend: "auto" takes the fastest that runs here (`choose_backend`). "reference" is grid_sample and "gather" plain
            indexing: both run on every device and can be differentiated twice. "numba" (CPU) and "triton" (CUDA) are one
            operator, `torch.ops.paqdetr.ms_deform_attn`, which saves its three inputs for backward and nothing else.

    Returns:
        (B, Q, H * D), in the dtype of `value`.

    Raises:
        ValueError: shapes that contradict each other, an empty level, dtypes that are not floating, or an unknown back end.
        BackendError: the back end that was asked for cannot run here.
    """
    shapes = as_shape_list(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    if backend == "auto":
        name = choose_backend(value.device, value.dtype, tokens=value.shape[1])
    else:
        require_backend(backend, value.device, value.dtype, tokens=value.shape[1])
        name = backend
    # bfloat16 locations would be off by whole pixels.
    dtype = torch.promote_types(value.dtype, torch.float32)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if name in _COMPOSED:
        if not torch.compiler.is_compiling():
            registered.ran[name] = None
        return _COMPOSED[name](value, shapes, locations, weights)
    flat = [side for shape in shapes for side in shape]
    return registered.ms_deform_attn(value, flat, locations, weights)


def backends_run() -> tuple[str, ...]:
    """Names of the back ends that computed something in this process so far, in order of their first time. What
    `torch.compile` made of "reference" or "gather" is not counted."""
    return tuple(registered.ran)


def as_shape_list(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """(L, 2) tensor or pairs -> list of (height, width) integers. A tensor on a GPU costs a synchronisation."""
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(_whole(height), _whole(width)) for height, width in rows]


def _whole(side: int) -> int:
    """numpy's numbers as Python's; those that `torch.compile` keeps open stay so."""
    return side if isinstance(side, (int, torch.SymInt)) else int(side)


def _check(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or locations.ndim != 6 or weights.ndim != 5:
        raise ValueError(
            "expected value (B,S,H,D), sampling_locations (B,Q,H,L,P,2) and attention_weights (B,Q,H,L,P), found "
            f"{tuple(value.shape)}, {tuple(locations.shape)}, {tuple(weights.shape)}"
        )
    if not (value.is_floating_point() and locations.is_floating_point() and weights.is_floating_point()):
        raise ValueError(
            "expected floating value, sampling_locations and attention_weights, found "
            f"{value.dtype}, {locations.dtype}, {weights.dtype}"
        )
    if any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"expected levels of at least one pixel, found spatial_shapes {shapes}")
    tokens = sum(height * width for height, width in shapes)
    if value.shape[1] != tokens:
        raise ValueError(f"value has {value.shape[1]} tokens, but spatial_shapes {shapes} make {tokens}")
    batch, _, heads, _ = value.shape
    expected = (batch, locations.shape[1], heads, len(shapes), weights.shape[-1])
    if tuple(weights.shape) != expected or tuple(locations.shape) != (*expected, 2):
        raise ValueError(
            f"expected sampling_locations {(*expected, 2)} and attention_weights {expected}, found "
            f"{tuple(locations.shape)} and {tuple(weights.shape)}"
        )


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
    # Queries last: engines that run an exported graph are several times slower to sum over a last axis of a few points.
    # In at least float32; grid_sample wants the values in the same dtype.
    grids = (2 * sampling_locations - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1).contiguous()  # (B*H, L, P, Q, 2)
    weights = attention_weights.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous()  # (B*H, L, P, Q)
    planes = value.flatten(2).transpose(1, 2).split([height * width for height, width in spatial_shapes], dim=-1)
    total = value.new_zeros(())
    for level, (height, width) in enumerate(spatial_shapes):
        plane = planes[level].reshape(batch * heads, channels, height, width).to(grids.dtype)
        sampled = F.grid_sample(plane, grids[:, level], align_corners=False)  # (B*H, D, P, Q)
        total = total + (sampled * weights[:, None, level]).sum(2)  # (B*H, D, Q)
    return total.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


_COMPOSED = {"reference": ms_deform_attn_reference, "gather": ms_deform_attn_gather}
