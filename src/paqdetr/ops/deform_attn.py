"""Multi-scale deformable attention: the one door to its back ends.

Source: Deformable DETR (arXiv 2010.04159), equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from paqdetr.ops import registered
from paqdetr.ops.choice import choose_backend, require_backend
from paqdetr.ops.reference import ms_deform_attn_gather, ms_deform_attn_reference

SpatialShapes = Tensor | Sequence[tuple[int, int]]
Backend = Literal["auto", "reference", "gather", "numba", "triton"]

_COMPOSED = {"reference": ms_deform_attn_reference, "gather": ms_deform_attn_gather}


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of values sampled bilinearly at a few points of every level.

    Sums are taken in float32, or in float64 where the values are; locations and weights are cast to that too, whatever autocast
    says. Locations that are not finite make the result NaN.

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
