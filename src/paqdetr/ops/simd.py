"""Writes LLVM vectors into functions that numba compiles.

numba leaves vectors to LLVM, which gives up where it cannot tell whether arrays overlap. An `Emit` inside an intrinsic says what
is a vector, and LLVM splits it to what the machine has (AVX-512, AVX2, SSE, NEON).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

# llvmlite's classes carry no types that a checker could use.
Value = Any
Builder = Any

INT32, INT64 = ir.IntType(32), ir.IntType(64)
_WIDTHS = (16, 4, 1)  # points at once; what is left over goes to the next, narrower, width


class Emit:
    """Appends vector instructions of `lanes` floats to a function that is being compiled."""

    def __init__(self, builder: Builder, scalar: ir.Type, lanes: int) -> None:
        self.builder, self.scalar, self.lanes = builder, scalar, lanes
        self.vector = ir.VectorType(scalar, lanes)
        self.suffix = f"v{lanes}{'f32' if isinstance(scalar, ir.FloatType) else 'f64'}"

    def constant(self, number: float) -> Value:
        return ir.Constant(self.vector, [number] * self.lanes)

    def splat(self, number: Value) -> Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, number, INT32(0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        )

    def at(self, pointer: Value, index: Value, kind: ir.Type | None = None) -> Value:
        return self.builder.bitcast(self.builder.gep(pointer, [index]), (kind or self.vector).as_pointer())

    def load(self, pointer: Value, index: Value) -> Value:
        return self.builder.load(self.at(pointer, index), align=self.scalar_bytes)

    def store(self, value: Value, pointer: Value, index: Value) -> None:
        self.builder.store(value, self.at(pointer, index, value.type), align=4)

    def load_pairs(self, pointer: Value, index: Value) -> tuple[Value, Value]:
        """x0 y0 x1 y1 ... -> x0 x1 ..., y0 y1 ..."""
        double = ir.VectorType(self.scalar, 2 * self.lanes)
        pairs = self.builder.load(self.at(pointer, index, double), align=self.scalar_bytes)
        undefined = ir.Constant(double, ir.Undefined)
        mask = ir.VectorType(INT32, self.lanes)
        even, odd = ([2 * i + k for i in range(self.lanes)] for k in (0, 1))
        return (
            self.builder.shuffle_vector(pairs, undefined, ir.Constant(mask, even)),
            self.builder.shuffle_vector(pairs, undefined, ir.Constant(mask, odd)),
        )

    def store_pairs(self, x: Value, y: Value, pointer: Value, index: Value) -> None:
        order = [i + k * self.lanes for i in range(self.lanes) for k in (0, 1)]
        mask = ir.Constant(ir.VectorType(INT32, 2 * self.lanes), order)
        self.store(self.builder.shuffle_vector(x, y, mask), pointer, index)

    @property
    def scalar_bytes(self) -> int:
        return 4 if isinstance(self.scalar, ir.FloatType) else 8

    def add(self, a: Value, b: Value) -> Value:
        return self.builder.fadd(a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return self.builder.fsub(a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.builder.fmul(a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, in one rounding where the machine can."""
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        name = f"llvm.fmuladd.{self.suffix}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def floor(self, a: Value) -> Value:
        kind = ir.FunctionType(self.vector, [self.vector])
        name = f"llvm.floor.{self.suffix}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a])

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger one; b where a is not a number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def inside(self, a: Value, size: Value) -> Value:
        """0 <= a < size."""
        return self.builder.and_(
            self.builder.fcmp_ordered(">=", a, self.constant(0.0)), self.builder.fcmp_ordered("<", a, size)
        )

    def where(self, mask: Value, a: Value) -> Value:
        """a where the mask is set, else 0."""
        return self.builder.select(mask, a, self.constant(0.0))

    def sum(self, vector: Value) -> Value:
        """Sum over lanes, by halves: a fixed order, which LLVM must keep."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            mask = ir.VectorType(INT32, lanes)
            low, high = (
                self.builder.shuffle_vector(vector, undefined, ir.Constant(mask, [i + k * lanes for i in range(lanes)]))
                for k in (0, 1)
            )
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, INT32(0))


def each_width(
    builder: Builder, scalar: ir.Type, start: Value, stop: Value, body: Callable[[Emit, Value], None]
) -> None:
    """Emit `body(emit, point)` for all points of [start, stop), as many at once as possible."""
    for lanes in _WIDTHS:
        steps = builder.sdiv(builder.sub(stop, start), INT64(lanes))
        end = builder.add(start, builder.mul(steps, INT64(lanes)))
        with cgutils.for_range_slice(builder, start, end, INT64(lanes)) as (point, _):
            body(Emit(builder, scalar, lanes), point)
        start = end
