"""Deformable attention as Triton kernels. `paqdetr.ops.cuda` launches them.

A program works on a block of queries of one image and head. Points are one loop, and their four corners are loads of
(BLOCK, D) numbers, masked where they lie outside the map. Sums are float32, whatever the values are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(locations, levels, points, level, inside):
    """Pixel coordinates of one point of every query, and the level's size and first token."""
    width = tl.load(levels + level * 3)
    height = tl.load(levels + level * 3 + 1)
    first = tl.load(levels + level * 3 + 2)
    x = tl.load(locations + points * 2, mask=inside, other=0.0) * width - 0.5
    y = tl.load(locations + points * 2 + 1, mask=inside, other=0.0) * height - 0.5
    return x, y, width, height, first


@triton.jit
def _corner(x, y, left, top, width, height, first, inside, RIGHT: tl.constexpr, BELOW: tl.constexpr):
    """Token of a corner, whether it is on the map, and what the point takes of it along x and y."""
    column, row = left + RIGHT, top + BELOW
    there = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # Off the map a number may not fit an integer.
    token = first + tl.where(there, row, 0.0).to(tl.int64) * width + tl.where(there, column, 0.0).to(tl.int64)
    share_x = x - left if RIGHT else 1.0 - (x - left)
    share_y = y - top if BELOW else 1.0 - (y - top)
    return token, there, share_x, share_y


@triton.jit
def forward(
    value, levels, locations, weights, out, tokens, queries,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside, held = query < queries, channel < CHANNELS
    place = (image * queries + query) * HEADS + head  # (BLOCK,) row of the output, of D channels
    value += (image * tokens * HEADS + head) * CHANNELS
    total = tl.zeros((BLOCK, WIDE), tl.float32)
    for point in range(LEVELS * POINTS):
        points = place * (LEVELS * POINTS) + point
        x, y, width, height, first = _place(locations, levels, points, point // POINTS, inside)
        weight = tl.load(weights + points, mask=inside, other=0.0)
        left, top = tl.floor(x), tl.floor(y)
        for corner in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            token, there, share_x, share_y = _corner(
                x, y, left, top, width, height, first, inside, corner % 2, corner // 2
            )
            row = tl.load(
                value + (token * (HEADS * CHANNELS))[:, None] + channel[None, :],
                mask=there[:, None] & held[None, :],
                other=0.0,
            )
            total += (share_x * share_y * weight)[:, None] * row.to(tl.float32)
    tl.store(
        out + (place * CHANNELS)[:, None] + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=inside[:, None] & held[None, :],
    )


@triton.jit
def backward(
    gradient, value, levels, locations, weights, to_value, to_locations, to_weights, tokens, queries,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`to_value` is float32 and starts as zero: programs add to it, in no fixed order."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside, held = query < queries, channel < CHANNELS
    place = (image * queries + query) * HEADS + head
    start = (image * tokens * HEADS + head) * CHANNELS
    value += start
    to_value += start
    grad = tl.load(
        gradient + (place * CHANNELS)[:, None] + channel[None, :], mask=inside[:, None] & held[None, :], other=0.0
    ).to(tl.float32)
    for point in range(LEVELS * POINTS):
        points = place * (LEVELS * POINTS) + point
        x, y, width, height, first = _place(locations, levels, points, point // POINTS, inside)
        weight = tl.load(weights + points, mask=inside, other=0.0)
        left, top = tl.floor(x), tl.floor(y)
        to_weight = tl.zeros((BLOCK,), tl.float32)
        to_x = tl.zeros((BLOCK,), tl.float32)
        to_y = tl.zeros((BLOCK,), tl.float32)
        for corner in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            token, there, share_x, share_y = _corner(
                x, y, left, top, width, height, first, inside, corner % 2, corner // 2
            )
            rows = (token * (HEADS * CHANNELS))[:, None] + channel[None, :]
            mask = there[:, None] & held[None, :]
            row = tl.load(value + rows, mask=mask, other=0.0)
            product = tl.sum(row.to(tl.float32) * grad, axis=1)
            to_weight += share_x * share_y * product
            to_x += (share_y if corner % 2 else -share_y) * product
            to_y += (share_x if corner // 2 else -share_x) * product
            tl.atomic_add(to_value + rows, (share_x * share_y * weight)[:, None] * grad, mask=mask)
        tl.store(to_weights + points, to_weight, mask=inside)
        tl.store(to_locations + points * 2, to_x * weight * width, mask=inside)
        tl.store(to_locations + points * 2 + 1, to_y * weight * height, mask=inside)
