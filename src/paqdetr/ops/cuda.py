"""Deformable attention on a GPU: launches Triton's kernels (`triton_kernels.py`).

Their results have been held equal to the other back ends in Triton's interpreter, and they have been compiled for GPUs; nobody
has timed them on one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

NAME = "triton"

_BLOCK = 16  # queries of a program


def forward(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """(B, S, H, D), L pairs, (B, Q, H, L, P, 2), (B, Q, H, L, P) -> (B, Q, H * D) in the dtype of `value`."""
    batch, tokens, heads, channels = value.shape
    queries = locations.shape[1]
    out = value.new_empty(batch, queries, heads * channels)
    if out.numel():
        from paqdetr.ops import triton_kernels

        with _on(value):
            triton_kernels.forward[_grid(batch, queries, heads)](
                value.contiguous(), _levels(tuple(shapes), value.device),
                locations.float().contiguous(), weights.float().contiguous(), out, tokens, queries,
                **_sizes(locations, channels),
            )  # fmt: skip
    return out


def backward(
    gradient: Tensor, value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights from that of the output, each in its own dtype."""
    batch, tokens, heads, channels = value.shape
    queries = locations.shape[1]
    to_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    to_locations, to_weights = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (locations, weights)
    )
    if gradient.numel():
        from paqdetr.ops import triton_kernels

        with _on(value):
            triton_kernels.backward[_grid(batch, queries, heads)](
                gradient.contiguous(), value.contiguous(), _levels(tuple(shapes), value.device),
                locations.float().contiguous(), weights.float().contiguous(),
                to_value, to_locations, to_weights, tokens, queries, **_sizes(locations, channels),
            )  # fmt: skip
    return to_value.to(value.dtype), to_locations.to(locations.dtype), to_weights.to(weights.dtype)


def _grid(batch: int, queries: int, heads: int) -> tuple[int, int, int]:
    return -(-queries // _BLOCK), heads, batch


def _sizes(locations: Tensor, channels: int) -> dict[str, Any]:
    """Constants of a kernel."""
    _, _, heads, levels, points, _ = locations.shape
    wide = 1 << max(channels - 1, 0).bit_length()
    return dict(HEADS=heads, LEVELS=levels, POINTS=points, CHANNELS=channels, BLOCK=_BLOCK, WIDE=wide)


def _on(value: Tensor) -> Any:
    """Triton launches on the current device, which need not be the values'."""
    return torch.cuda.device_of(value)


@functools.lru_cache(maxsize=64)
def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(L, 3) int32: width, height and first token."""
    rows, first = [], 0
    for height, width in shapes:
        rows.append((width, height, first))
        first += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)
