"""The loop of `depthwise.py`, compiled at run time by numba."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from paqdetr.ops.simd import INT64, Emit

_intrinsic: Any = intrinsic  # a function of one argument less, which a type checker cannot know


@_intrinsic(prefer_literal=True)
def _add_products(typingctx, total, at, a, a_first, a_stride, b, b_first, b_stride, steps, lanes):
    """total[at:] += sum over `steps` rows of `lanes` (a constant) channels of a * b."""
    size = types.int64
    signature = types.void(total, size, a, size, size, b, size, size, size, lanes)
    width = lanes.literal_value

    def generate(context, builder, signature, args):
        total, at, a, a_first, a_stride, b, b_first, b_stride, steps, _ = args
        e = Emit(builder, ir.FloatType(), width)
        entry = builder.block
        loop = builder.append_basic_block("rows")
        done = builder.append_basic_block("done")
        start = e.load(total, at)
        builder.branch(loop)
        builder.position_at_end(loop)
        row, so_far = builder.phi(INT64), builder.phi(e.vector)
        left = e.load(a, builder.add(a_first, builder.mul(row, a_stride)))
        right = e.load(b, builder.add(b_first, builder.mul(row, b_stride)))
        added = e.fma(left, right, so_far)
        following = builder.add(row, INT64(1))
        row.add_incoming(INT64(0), entry)
        row.add_incoming(following, loop)
        so_far.add_incoming(start, entry)
        so_far.add_incoming(added, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
        builder.position_at_end(done)
        e.store(added, total, at)
        return context.get_dummy_value()

    return signature, generate


def compile_weight_gradient(lanes: int) -> Any:
    """Gradient of the weights of `lanes` channels from `first` on, of maps in channels-last order.

    Addresses of x: (B, H, W, C), gradient: (B, h, w, C) and out: (kernel height * kernel width, C), zero at these channels.
    """
    floats = types.CPointer(types.float32)

    @numba.cfunc(types.void(floats, floats, floats, *[types.int64] * 12), error_model="numpy", forceinline=True)
    def weight_gradient(
        x, gradient, out, first, batch, height, width, channels, high, wide, kernel_height, kernel_width,
        stride, padding, dilation,
    ):  # fmt: skip
        for image in range(batch):
            for row in range(high):
                of = (image * high + row) * wide * channels + first
                for down in range(kernel_height):
                    y = row * stride - padding + down * dilation
                    if y < 0 or y >= height:
                        continue
                    for across in range(kernel_width):
                        # Columns of the result whose tap lies within the map: 0 <= column * stride + shift < width.
                        shift = across * dilation - padding
                        begin = (max(-shift, 0) + stride - 1) // stride
                        end = min((width - 1 - shift) // stride + 1, wide) if shift < width else 0
                        if end > begin:
                            place = (image * height + y) * width + begin * stride + shift
                            _add_products(
                                out, (down * kernel_width + across) * channels + first,
                                gradient, of + begin * channels, channels,
                                x, place * channels + first, stride * channels,
                                end - begin, lanes,
                            )  # fmt: skip

    return weight_gradient
