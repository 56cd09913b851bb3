"""Multi-scale deformable attention: the one door to its back ends.

Source: Deformable DETR (arXiv 2010.04159), equation 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from paqdetr.ops.reference import ms_deform_attn_reference

SpatialShapes = Tensor | Sequence[tuple[int, int]]
Backend = Literal["auto", "reference"]

_BACKENDS: dict[str, Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]] = {
    "reference": ms_deform_attn_reference,
}


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of values sampled bilinearly at a few points of every level.

    Args:
        value: (B, S, H, D) float, the levels' tokens one after another, row by row; S = sum of height * width.
        spatial_shapes: (L, 2) int64 tensor or L pairs (height, width).
        sampling_locations: (B, Q, H, L, P, 2) float, (x, y), where [0, 1] spans the level from its first pixel's
            outer edge to its last's; what lies outside reads zero.
        attention_weights: (B, Q, H, L, P) float, usually summing to 1 over (L, P).
        backend: "auto" picks by device and shapes; a name forces one.

    Returns:
        (B, Q, H * D), in the dtype of `value`.

    Raises:
        ValueError: shapes that contradict each other, or an unknown back end.
    """
    shapes = as_shape_list(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    name = "reference" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(f"unknown back end {backend!r}: expected 'auto' or one of {sorted(_BACKENDS)}")
    return _BACKENDS[name](value, shapes, sampling_locations, attention_weights)


def as_shape_list(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """(L, 2) tensor or pairs -> list of (height, width) integers. A tensor on a GPU costs a synchronisation."""
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(int(height), int(width)) for height, width in rows]


def _check(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or locations.ndim != 6 or weights.ndim != 5:
        raise ValueError(
            "expected value (B,S,H,D), sampling_locations (B,Q,H,L,P,2) and attention_weights (B,Q,H,L,P), found "
            f"{tuple(value.shape)}, {tuple(locations.shape)}, {tuple(weights.shape)}"
        )
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
