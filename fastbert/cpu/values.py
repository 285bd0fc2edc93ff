"""What a CPU kernel computes with: numbers and vectors that LLVM will hold in registers, and what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = ir.PointerType()


class BFloatType(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


class Value:
    """An integer (int64 unless said), a float32, or a vector of either, with Python's operators.

    Where another operand may be a plain number, that is taken as one of this type, the same in each lane.
    """

    def __init__(self, builder: Any, raw: Any) -> None:
        self.builder, self.raw = builder, raw

    @property
    def type(self) -> Any:
        """LLVM's type of it."""
        return self.raw.type

    @property
    def floating(self) -> bool:
        """Whether it is a float32 or a vector of them."""
        return getattr(self.type, "element", self.type) == F32

    def like(self, other: Value | float) -> Value:
        """A plain number as a value of this type; a value as it is."""
        return other if isinstance(other, Value) else Value(self.builder, constant(self.type, other))

    def _binary(self, name: str, other: Value | float) -> Value:
        made = getattr(self.builder, f"f{name}" if self.floating else name)(self.raw, self.like(other).raw)
        return Value(self.builder, made)

    def __add__(self, other: Value | float) -> Value:
        return self._binary("add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("div", other)

    def __floordiv__(self, other: Value | int) -> Value:
        return Value(self.builder, self.builder.udiv(self.raw, self.like(other).raw))

    def __mod__(self, other: Value | int) -> Value:
        return Value(self.builder, self.builder.urem(self.raw, self.like(other).raw))

    def __lshift__(self, bits: int) -> Value:
        return Value(self.builder, self.builder.shl(self.raw, self.like(bits).raw))

    def __rshift__(self, bits: int) -> Value:
        return Value(self.builder, self.builder.lshr(self.raw, self.like(bits).raw))  # zeros come in

    def __and__(self, other: Value | int) -> Value:
        return Value(self.builder, self.builder.and_(self.raw, self.like(other).raw))

    def __neg__(self) -> Value:
        return Value(self.builder, self.builder.fneg(self.raw))

    def __lt__(self, other: Value | float) -> Value:
        compare = self.builder.fcmp_ordered if self.floating else self.builder.icmp_signed
        return Value(self.builder, compare("<", self.raw, self.like(other).raw))


def constant(type_: Any, number: float) -> Any:
    """LLVM's constant of a number: a scalar, or a vector with it in each lane."""
    return ir.Constant(type_, [number] * type_.count if isinstance(type_, ir.VectorType) else number)


def intrinsic(name: str, result: Any, *arguments: Any, flags: str = "", suffix: Any = None) -> Value:
    """An intrinsic of LLVM; its name goes on with the type it is for. One argument or more is a `Value`."""
    builder = next(argument.builder for argument in arguments if isinstance(argument, Value))
    raw = [argument.raw if isinstance(argument, Value) else argument for argument in arguments]
    type_ = suffix if suffix is not None else result if result is not None else raw[0].type
    if type_ != "":
        name += f".{_mangled(type_)}" + (".p0" if "masked" in name else "")
    return Value(builder, called(builder, name, result, raw, flags))


def called(builder: Any, name: str, result: Any, raw: Sequence[Any], flags: str = "") -> Any:
    """What a function that is not of the module gives, of LLVM's type `result`; None for nothing."""
    function = builder.module.globals.get(name)
    if function is None:
        signature = ir.FunctionType(ir.VoidType() if result is None else result, [x.type for x in raw])
        function = ir.Function(builder.module, signature, name)
    return builder.call(function, raw, fastmath=(flags,) if flags else ())


def _mangled(type_: Any) -> str:
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_mangled(type_.element)}"
    return {"float": "f32", "bfloat": "bf16"}.get(str(type_), str(type_))


def minimum(a: Value, b: Value | float) -> Value:
    """The lesser of two integers, or lane by lane of floats."""
    b = a.like(b)
    return intrinsic("llvm.minnum", a.type, a, b) if a.floating else select(a < b, a, b)


def maximum(a: Value, b: Value | float) -> Value:
    """The greater, lane by lane, of floats."""
    return intrinsic("llvm.maxnum", a.type, a, a.like(b))


def maximum_or_nan(a: Value, b: Value | float) -> Value:
    """The greater, lane by lane, of floats; NaN where either is."""
    return intrinsic("llvm.maximum", a.type, a, a.like(b))


def select(condition: Value, yes: Value | float, no: Value) -> Value:
    """Lane by lane where `condition` is a vector."""
    return Value(no.builder, no.builder.select(condition.raw, no.like(yes).raw, no.raw))


def exclusive_or(a: Value, b: Value) -> Value:
    """The bits of integers that are set in one of the two."""
    return Value(a.builder, a.builder.xor(a.raw, b.raw))


def fma(a: Value, b: Value | float, c: Value | float) -> Value:
    """a * b + c, rounded once."""
    return intrinsic("llvm.fma", a.type, a, a.like(b), a.like(c))


def absolute(x: Value) -> Value:
    """Floats without their sign."""
    return intrinsic("llvm.fabs", x.type, x)


def sqrt(x: Value) -> Value:
    """The square root of floats."""
    return intrinsic("llvm.sqrt", x.type, x)


def nearest(x: Value) -> Value:
    """Floats rounded to whole numbers, halves to even ones."""
    return intrinsic("llvm.nearbyint", x.type, x)


def sum_of_lanes(x: Value) -> Value:
    """All lanes added up."""
    return intrinsic("llvm.vector.reduce.fadd", F32, constant(F32, 0.0), x, flags="reassoc", suffix=x.type)


def greatest_lane(x: Value) -> Value:
    """The greatest of floats."""
    return intrinsic("llvm.vector.reduce.fmax", F32, x, flags="nnan", suffix=x.type)


def least_lane(x: Value) -> Value:
    """The least of floats."""
    return intrinsic("llvm.vector.reduce.fmin", F32, x, flags="nnan", suffix=x.type)


def shuffled(a: Value, b: Value, lanes: Sequence[int]) -> Value:
    """The lanes of `a` and then `b` with these numbers."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return Value(a.builder, a.builder.shuffle_vector(a.raw, b.raw, mask))


def first_lanes(x: Value, count: int) -> Value:
    """The first `count` lanes, and 0 in the others."""
    lanes = x.type.count
    return x if count == lanes else shuffled(x, x.like(0.0), [*range(count), *[lanes] * (lanes - count)])


def interleaved(a: Value, b: Value) -> tuple[Value, Value]:
    """a0 b0 a1 b1 ..., in two vectors."""
    count = a.type.count
    order = [number for i in range(count) for number in (i, i + count)]
    return shuffled(a, b, order[:count]), shuffled(a, b, order[count:])


def transposed(rows: list[Value]) -> list[Value]:
    """As many vectors as lanes: lane i of row j becomes lane j of row i."""
    half = len(rows) // 2
    for _ in range(int(math.log2(len(rows)))):
        rows = [vector for i in range(half) for vector in interleaved(rows[i], rows[i + half])]
    return rows


def bitcast(x: Value, type_: Any) -> Value:
    """The same bits as another type."""
    return Value(x.builder, x.builder.bitcast(x.raw, type_))


def widened(x: Value) -> Value:
    """An int32 as an int64."""
    return Value(x.builder, x.builder.sext(x.raw, I64))


def to_float(x: Value) -> Value:
    """An integer -> float32; int32 `[lanes]` -> float32 `[lanes]`."""
    return Value(x.builder, x.builder.sitofp(x.raw, _of_as_many(x, F32)))


def to_int32(x: Value) -> Value:
    """Whole float32 `[lanes]` that fit -> int32; an int64 -> int32."""
    made = x.builder.fptosi(x.raw, _of_as_many(x, I32)) if x.floating else x.builder.trunc(x.raw, I32)
    return Value(x.builder, made)


def to_int8(x: Value) -> Value:
    """Whole float32 `[lanes]` that fit -> int8."""
    return Value(x.builder, x.builder.trunc(to_int32(x).raw, _of_as_many(x, I8)))


def from_bfloat16(x: Value) -> Value:
    """int16 bits of bfloat16 `[lanes]` -> float32 `[lanes]`."""
    wide = Value(x.builder, x.builder.zext(x.raw, _of_as_many(x, I32)))
    return bitcast(wide << 16, _of_as_many(x, F32))


def to_bfloat16(x: Value) -> Value:
    """float32 `[lanes]` -> int16 bits of bfloat16, rounded to nearest even."""
    narrow = Value(x.builder, x.builder.fptrunc(x.raw, _of_as_many(x, BFloatType())))
    return bitcast(narrow, _of_as_many(x, I16))


def _of_as_many(x: Value, element: Any) -> Any:
    """A type as that of `x`, a scalar or a vector of as many lanes, of another element."""
    return ir.VectorType(element, x.type.count) if isinstance(x.type, ir.VectorType) else element
