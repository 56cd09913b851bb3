"""Deformable attention on a CPU: shares numba's loops (`numba_kernels.py`) between threads.

Forward and the gradients of locations and weights are split by queries, the gradient of the values by image and head, and by
level where that makes too few: every number is written by one thread, from additions in one order. So results have the same
bits whatever the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from paqdetr.ops.compiled import kernel
from paqdetr.ops.threads import for_each

NAME = "numba"

_POINTS_A_TASK = 8192  # some 50 us: less is not worth waking a thread for
_TASKS_A_THREAD = 4  # so that a thread that is held up leaves its share to others


def forward(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """(B, S, H, D), L pairs, (B, Q, H, L, P, 2), (B, Q, H, L, P) -> (B, Q, H * D) in the dtype of `value`."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, tokens, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = value.new_zeros(batch, queries, heads * channels, dtype=dtype)
    if out.numel() and weights.numel():
        levels = _levels(tuple(shapes), heads, points, dtype)
        loop = _loop("forward", dtype, channels)
        arrays = [_flat(value, dtype), levels, *(_flat(x, dtype) for x in (locations, weights)), out]
        addresses, count = [x.data_ptr() for x in arrays], levels.shape[1]

        def work(span: tuple[int, ...]) -> None:
            scratch = _scratch(levels)
            loop(*addresses, count, tokens, heads, queries, *span, *_halves(scratch))

        threads = torch.get_num_threads()
        for_each(work, _spans(batch * queries, count, threads), threads=threads)
    return out.to(value.dtype)


def backward(
    gradient: Tensor, value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights from that of the output, each in its own dtype."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, tokens, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    to_value, to_locations, to_weights = (x.new_zeros(x.shape, dtype=dtype) for x in (value, locations, weights))
    if gradient.numel() and weights.numel():
        levels = _levels(tuple(shapes), heads, points, dtype)
        read_loop, write_loop = (_loop(name, dtype, channels) for name in ("read", "scatter"))
        count, arrays = levels.shape[1], [_flat(x, dtype) for x in (value, locations, weights, gradient)]
        at_value, at_locations, at_weights, at_gradient = (x.data_ptr() for x in arrays)
        at_levels, sizes = levels.data_ptr(), (count, tokens, heads, queries)

        def read(span: tuple[int, ...]) -> None:
            scratch = _scratch(levels)
            read_loop(
                at_value, at_levels, at_locations, at_weights, at_gradient, to_locations.data_ptr(), to_weights.data_ptr(),
                *sizes, *span, *_halves(scratch),
            )  # fmt: skip

        def write(part: tuple[int, ...]) -> None:
            scratch = _scratch(levels)
            write_loop(
                to_value.data_ptr(), at_levels, at_locations, at_weights, at_gradient, *sizes, *part, *_halves(scratch)
            )

        # Neither needs the other's results, so they are one list of work.
        threads = torch.get_num_threads()
        parts = _parts(batch, heads, len(shapes), points, threads)
        spans = _spans(batch * queries, count, threads)
        for_each(_call, [(write, part) for part in parts] + [(read, span) for span in spans], threads=threads)
    return to_value.to(value.dtype), to_locations.to(locations.dtype), to_weights.to(weights.dtype)


def _call(task: tuple[Callable[[tuple[int, ...]], None], tuple[int, ...]]) -> None:
    work, item = task
    work(item)


def _spans(queries: int, points: int, threads: int) -> list[tuple[int, ...]]:
    """Ranges of queries of `points` points each: a few per thread, unless they become too small."""
    most = threads * _TASKS_A_THREAD if threads > 1 else 1
    count = min(most, -(-queries * points // _POINTS_A_TASK))
    return list(pairwise(queries * i // count for i in range(count + 1)))


def _parts(batch: int, heads: int, levels: int, points: int, threads: int) -> list[tuple[int, ...]]:
    """Slices of the values' gradient that do not overlap: image, range of heads, and of points, which are levels."""
    if threads == 1:
        return [(image, 0, heads, 0, levels * points) for image in range(batch)]
    together = levels if batch * heads >= 2 * threads else 1
    return [
        (image, head, head + 1, level * points, (level + together) * points)
        for level in range(0, levels, together)
        for image in range(batch)
        for head in range(heads)
    ]


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


def _scratch(levels: Tensor) -> Tensor:
    """Room for a row and a number for each of the 4 corners of a query's points."""
    return levels.new_empty(2, 4 * levels.shape[1])


def _halves(scratch: Tensor) -> tuple[int, int]:
    return scratch[0].data_ptr(), scratch[1].data_ptr()


@functools.lru_cache(maxsize=64)
def _levels(shapes: tuple[tuple[int, int], ...], heads: int, points: int, dtype: torch.dtype) -> Tensor:
    """(3, H * L * P): width, height and first token of the level that every point of a query looks at."""
    sizes = np.array(shapes, dtype=np.int64).reshape(-1, 2)
    starts = np.cumsum(sizes.prod(1)) - sizes.prod(1)
    table = np.stack([sizes[:, 1], sizes[:, 0], starts])  # (3, L)
    table = np.tile(np.repeat(table, points, axis=1), heads)
    return torch.from_numpy(table).to(dtype)


def _loop(name: str, dtype: torch.dtype, channels: int) -> Callable[..., None]:
    return kernel(name, "float64" if dtype == torch.float64 else "float32", channels)
