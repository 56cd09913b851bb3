"""Loops on a CPU that numba compiles at run time: deformable attention for `cpu.py`, and, at the end, one of `depthwise.py`.

The outer loops are numba's Python. The inner ones are vectors (`simd.py`): places of up to 16 points at once, and rows of
channels that stay in registers.

Each `compile_...` of attention makes a loop for one dtype, "float32" or "float64", and one number of channels D. It takes the
addresses of contiguous arrays: value, locations, attention, gradient, out and the like; `levels` (3, H L P), the width, height
and first token of what each of `count` = H L P points looks at, in the float dtype; scratch of 4 H L P elements for each call. A
call fills a part of the output that is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from paqdetr.ops.compiled import chunks
from paqdetr.ops.simd import INT32, INT64, Builder, Emit, Value, each_width

_CORNERS = 4
_intrinsic: Any = intrinsic  # a function of one argument less, which a type checker cannot know


class _Axis(NamedTuple):
    """The two pixels around places along one axis, before and after: where, whether there, and how much of each."""

    at: tuple[Value, Value]  # clamped to the map
    there: tuple[Value, Value]
    share: tuple[Value, Value]


def _neighbours(e: Emit, place: Value, size: Value) -> _Axis:
    """place: in pixels, whole numbers at pixel centres; size: of the map, all as vectors."""
    # Beyond these bounds both pixels lie outside, and the cast to whole numbers would be undefined far outside.
    place = e.minimum(e.maximum(place, e.constant(-2.0)), size)
    before = e.floor(place)
    after = e.add(before, e.constant(1.0))
    fraction = e.sub(place, before)
    last = e.sub(size, e.constant(1.0))
    return _Axis(
        at=(e.minimum(e.maximum(before, e.constant(0.0)), last), e.minimum(e.maximum(after, e.constant(0.0)), last)),
        there=(e.inside(before, size), e.inside(after, size)),
        share=(e.sub(e.constant(1.0), fraction), fraction),
    )


def _places(
    e: Emit, locations: Value, levels: Value, count: Value, point: Value
) -> tuple[_Axis, _Axis, Value, Value, Value, Value]:
    """The axes x and y of `lanes` points from `point` on, the points' widths, heights and first rows, and zeros: NaN where a
    location is not finite, so that it shows in the result as it does with grid_sample."""
    builder = e.builder
    width = e.load(levels, point)
    height = e.load(levels, builder.add(count, point))
    first = e.load(levels, builder.add(builder.mul(count, INT64(2)), point))
    x, y = e.load_pairs(locations, builder.mul(point, INT64(2)))
    half = e.constant(-0.5)
    x, y = e.add(e.mul(x, width), half), e.add(e.mul(y, height), half)
    zero = e.add(e.sub(x, x), e.sub(y, y))
    return _neighbours(e, x, width), _neighbours(e, y, height), width, height, first, zero


@_intrinsic
def _locate(typingctx, locations, attention, offset, levels, count, start, stop, rows, shares):
    """For points [start, stop) of a query: the 4 rows they read, and the share of each, times `attention`.

    locations: starts with the query's, 2 a point, `offset` points into the array; attention likewise, 1 a point.
    levels (3, count): width, height and first row of the level of every point. rows, shares (4, count) are written.
    """
    signature = types.void(locations, attention, offset, levels, count, start, stop, rows, shares)

    def generate(context, builder, signature, args):
        locations, attention, offset, levels, count, start, stop, rows, shares = args
        locations = builder.gep(locations, [builder.mul(offset, INT64(2))])
        attention = builder.gep(attention, [offset])

        def body(e: Emit, point: Value) -> None:
            x, y, width, _, first, zero = _places(e, locations, levels, count, point)
            weight = e.add(e.load(attention, point), zero)
            for row in (0, 1):
                line = e.add(first, e.mul(y.at[row], width))
                share = e.mul(e.where(y.there[row], y.share[row]), weight)
                for column in (0, 1):
                    to = builder.add(point, builder.mul(count, INT64(2 * row + column)))
                    index = builder.fptosi(e.add(line, x.at[column]), ir.VectorType(INT32, e.lanes))
                    e.store(index, rows, to)
                    e.store(e.mul(share, e.where(x.there[column], x.share[column])), shares, to)

        scalar = context.get_data_type(signature.args[0].dtype)
        each_width(builder, scalar, start, stop, body)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def _finish(typingctx, locations, attention, offset, levels, count, products, to_locations, to_attention):
    """Gradients of a query's locations and attention from the products (4, n) of its rows with the output's gradient."""
    signature = types.void(locations, attention, offset, levels, count, products, to_locations, to_attention)

    def generate(context, builder, signature, args):
        locations, attention, offset, levels, count, products, to_locations, to_attention = args
        twice = builder.mul(offset, INT64(2))
        locations, to_locations = builder.gep(locations, [twice]), builder.gep(to_locations, [twice])
        attention, to_attention = builder.gep(attention, [offset]), builder.gep(to_attention, [offset])

        def body(e: Emit, point: Value) -> None:
            x, y, width, height, _, zero = _places(e, locations, levels, count, point)
            product = [
                [
                    builder.select(
                        builder.and_(y.there[row], x.there[column]),
                        e.load(products, builder.add(point, builder.mul(count, INT64(2 * row + column)))),
                        zero,
                    )
                    for column in (0, 1)
                ]
                for row in (0, 1)
            ]
            # Along x in the row above and the row below, then along y.
            upper, lower = (e.fma(x.share[0], left, e.mul(x.share[1], right)) for left, right in product)
            e.store(e.fma(y.share[0], upper, e.mul(y.share[1], lower)), to_attention, point)
            slope_upper, slope_lower = (e.sub(right, left) for left, right in product)
            slope_x = e.fma(y.share[0], slope_upper, e.mul(y.share[1], slope_lower))
            weight = e.load(attention, point)
            e.store_pairs(
                e.mul(e.mul(slope_x, weight), width),
                e.mul(e.mul(e.sub(lower, upper), weight), height),
                to_locations,
                builder.mul(point, INT64(2)),
            )

        scalar = context.get_data_type(signature.args[0].dtype)
        each_width(builder, scalar, INT64(0), count, body)
        return context.get_dummy_value()

    return signature, generate


def _row_pointers(
    builder: Builder, table: Value, rows: Value, count: Value, point: Value, stride: Value
) -> list[tuple[Value, Value]]:
    """(index into rows and shares, pointer to the row's first channel) of a point's 4 corners."""
    found = []
    for corner in range(_CORNERS):
        index = builder.add(point, builder.mul(count, INT64(corner)))
        row = builder.sext(builder.load(builder.gep(rows, [index])), INT64)
        found.append((index, builder.gep(table, [builder.mul(row, stride)])))
    return found


def _over_rows(generate: Callable[..., None]) -> Any:
    """An intrinsic f(table, first, rows, numbers, count, start, stop, channels, stride, other, other_first) over points
    [start, stop) and their rows.

    table[first:] holds rows of `channels` (a constant) `stride` apart; rows and numbers (4, count) belong to the corners of
    points; `other` holds one row from `other_first` on.
    """

    def over_rows(typingctx, table, first, rows, numbers, count, start, stop, channels, stride, other, other_first):
        size = types.int64
        signature = types.void(table, size, rows, numbers, size, size, size, channels, size, other, size)
        vectors_of = chunks(channels.literal_value, 64)

        def code(context, builder, signature, args):
            table, first, rows, numbers, count, start, stop, _, stride, other, other_first = args
            scalar = context.get_data_type(signature.args[0].dtype)
            table, other = builder.gep(table, [first]), builder.gep(other, [other_first])
            # 64 channels of float32 are 4 registers of AVX-512, or 8 of AVX2.
            vectors = [(c, Emit(builder, scalar, n)) for c, n in vectors_of]
            generate(builder, vectors, table, rows, numbers, count, start, stop, stride, other)
            return context.get_dummy_value()

        return signature, code

    return _intrinsic(prefer_literal=True)(over_rows)


@_over_rows
def _mix(builder, vectors, table, rows, shares, count, start, stop, stride, out):
    """out = sum of shares * rows."""
    for first, e in vectors:
        # One sum a corner: a chain of additions to a single one would wait for each other.
        sums = [cgutils.alloca_once(builder, e.vector) for _ in range(_CORNERS)]
        for total in sums:
            builder.store(e.constant(0.0), total)
        with cgutils.for_range_slice(builder, start, stop, INT64(1)) as (point, _):
            corners = _row_pointers(builder, table, rows, count, point, stride)
            for (index, row), total in zip(corners, sums, strict=True):
                share = e.splat(builder.load(builder.gep(shares, [index])))
                builder.store(e.fma(share, e.load(row, INT64(first)), builder.load(total)), total)
        a, b, c, d = (builder.load(total) for total in sums)
        e.store(e.add(e.add(a, b), e.add(c, d)), out, INT64(first))


@_over_rows
def _dot(builder, vectors, table, rows, products, count, start, stop, stride, gradient):
    """products = rows . gradient"""
    loaded = [e.load(gradient, INT64(first)) for first, e in vectors]
    with cgutils.for_range_slice(builder, start, stop, INT64(1)) as (point, _):
        for index, row in _row_pointers(builder, table, rows, count, point, stride):
            total = None
            for (first, e), factor in zip(vectors, loaded, strict=True):
                part = e.sum(e.mul(e.load(row, INT64(first)), factor))
                total = part if total is None else builder.fadd(total, part)
            builder.store(total, builder.gep(products, [index]))


@_over_rows
def _add(builder, vectors, table, rows, shares, count, start, stop, stride, gradient):
    """rows += shares * gradient, one corner after another: two corners may be one row."""
    loaded = [e.load(gradient, INT64(first)) for first, e in vectors]
    with cgutils.for_range_slice(builder, start, stop, INT64(1)) as (point, _):
        for index, row in _row_pointers(builder, table, rows, count, point, stride):
            share = builder.load(builder.gep(shares, [index]))
            for (first, e), factor in zip(vectors, loaded, strict=True):
                added = e.fma(e.splat(share), factor, e.load(row, INT64(first)))
                e.store(added, row, INT64(first))


def _compile(dtype: str, arrays: int, numbers: int, *, scratch: bool = True) -> Callable[[Callable[..., None]], Any]:
    """For functions of so many arrays of floats, so many whole numbers, and the scratch."""
    floats = types.CPointer(getattr(types, dtype))
    room = [types.CPointer(types.int32), floats] if scratch else []
    signature = types.void(*[floats] * arrays, *[types.int64] * numbers, *room)
    return numba.cfunc(signature, error_model="numpy", forceinline=True)


def compile_forward(dtype: str, channels: int) -> Any:
    """`out` of queries [start, stop), counted through the batch."""

    @_compile(dtype, 5, 6)
    def forward(value, levels, locations, attention, out, count, tokens, heads, queries, start, stop, rows, shares):
        stride = heads * channels
        points = count // heads
        for query in range(start, stop):
            _locate(locations, attention, query * count, levels, count, 0, count, rows, shares)
            image = query // queries * tokens * stride
            for head in range(heads):
                first, last, to = head * points, (head + 1) * points, query * stride + head * channels
                of = image + head * channels
                _mix(value, of, rows, shares, count, first, last, channels, stride, out, to)

    return forward


def compile_read(dtype: str, channels: int) -> Any:
    """Gradients of locations and attention of queries [start, stop), counted through the batch."""

    @_compile(dtype, 7, 6)
    def read(
        value, levels, locations, attention, gradient, to_locations, to_attention,
        count, tokens, heads, queries, start, stop, rows, products,
    ):  # fmt: skip
        stride = heads * channels
        points = count // heads
        for query in range(start, stop):
            # Shares are written where products will be: nobody asks for them.
            _locate(locations, attention, query * count, levels, count, 0, count, rows, products)
            image = query // queries * tokens * stride
            for head in range(heads):
                first, last, by = head * points, (head + 1) * points, query * stride + head * channels
                of = image + head * channels
                _dot(value, of, rows, products, count, first, last, channels, stride, gradient, by)
            _finish(locations, attention, query * count, levels, count, products, to_locations, to_attention)

    return read


def compile_scatter(dtype: str, channels: int) -> Any:
    """Adds to the gradient of the values of one image and a range of heads, of the levels that points [first_point, last_point)
    look at."""

    @_compile(dtype, 5, 9)
    def scatter(
        to_value, levels, locations, attention, gradient, count, tokens, heads, queries,
        image, first_head, last_head, first_point, last_point, rows, shares,
    ):  # fmt: skip
        stride = heads * channels
        points = count // heads
        base = image * tokens * stride
        whole = last_point - first_point == points
        for query in range(image * queries, (image + 1) * queries):
            if whole:
                first, last = first_head * points, last_head * points
                _locate(locations, attention, query * count, levels, count, first, last, rows, shares)
            for head in range(first_head, last_head):
                first, last = head * points + first_point, head * points + last_point
                if not whole:
                    _locate(locations, attention, query * count, levels, count, first, last, rows, shares)
                of, by = base + head * channels, query * stride + head * channels
                _add(to_value, of, rows, shares, count, first, last, channels, stride, gradient, by)

    return scatter


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

    @_compile("float32", 3, 12, scratch=False)
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
