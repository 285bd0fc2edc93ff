"""What a CPU kernel is written in: vectors as wide as the machine's, loops, memory, and one task at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir

from fastbert.cpu.instructions import Dot, float32_dot
from fastbert.cpu.machine import Machine
from fastbert.cpu.values import F32, I32, I64, POINTER, Value, bitcast, constant, intrinsic, shuffled, to_int32

# The sums of a block of a product: `sums(n, body)` has `body(row, sums)` follow for vector n of each row's outputs.
Sums = Callable[[int, Callable[["Value | int", Value], None]], None]


class Code:
    """The kernel being written.

    Attributes:
        machine: for which.
        lanes: float32 in a vector of it.
        task, worker: int64: the number of the task at hand, and of the thread that does it.
    """

    def __init__(self, machine: Machine, builder: Any, arguments: dict[str, Any], task: Any, worker: Any) -> None:
        self.machine, self.builder = machine, builder
        self.lanes = machine.vectors.lanes
        self.arguments = arguments
        self.task, self.worker = Value(builder, task), Value(builder, worker)

    def __getitem__(self, parameter: str) -> Value:
        """The argument of this name, int64."""
        return Value(self.builder, self.arguments[parameter])

    def float_of(self, parameter: str) -> Value:
        """The argument of this name, which `program.float_bits` made of a float."""
        return bitcast(to_int32(self[parameter]), F32)

    def number(self, number: int) -> Value:
        """An int64."""
        return Value(self.builder, constant(I64, number))

    def scalar(self, number: float) -> Value:
        """A float32."""
        return Value(self.builder, constant(F32, number))

    def vector(self, number: float = 0.0, type_: Any = F32) -> Value:
        """`[lanes]`, float32 unless said, the same number in each."""
        return Value(self.builder, constant(ir.VectorType(type_, self.lanes), number))

    def lane_numbers(self, type_: Any = I32, lanes: int | None = None) -> Value:
        """0, 1, 2, ..., int32 and of as many lanes as float32 has unless said."""
        lanes = lanes or self.lanes
        return Value(self.builder, ir.Constant(ir.VectorType(type_, lanes), list(range(lanes))))

    def splat(self, scalar: Value, lanes: int | None = None) -> Value:
        """A vector with the scalar in each lane, of as many as float32 has unless said."""
        lanes = lanes or self.lanes
        first = self.builder.insert_element(
            ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar.raw, ir.Constant(I32, 0)
        )
        return shuffled(Value(self.builder, first), Value(self.builder, first), [0] * lanes)

    def dot(self, dtype: torch.dtype) -> Dot:
        """How words of float32 or of a pair of bfloat16 are multiplied."""
        if dtype == torch.float32:
            return float32_dot
        assert self.machine.bfloat16 is not None
        return self.machine.bfloat16.dot

    def loop(
        self,
        begin: Value | int,
        end: Value | int,
        step: int,
        body: Callable[..., Sequence[Value] | None],
        *carried: Value,
    ) -> list[Value]:
        """Run `body(i, *carried)`, which gives the next `carried`, for `range(begin, end, step)`; the last of them."""
        builder, before = self.builder, self.builder.block
        header, inside, after = (builder.append_basic_block(name) for name in ("loop", "body", "done"))
        builder.branch(header)
        builder.position_at_end(header)
        index = builder.phi(I64)
        states = [builder.phi(value.type) for value in carried]
        builder.cbranch(builder.icmp_signed("<", index, self._int(end)), inside, after)
        builder.position_at_end(inside)
        following = body(Value(self.builder, index), *(Value(self.builder, state) for state in states)) or ()
        for state, value, next_value in zip(states, carried, following, strict=True):
            state.add_incoming(value.raw, before)
            state.add_incoming(next_value.raw, builder.block)
        index.add_incoming(self._int(begin), before)
        index.add_incoming(builder.add(index, ir.Constant(I64, step)), builder.block)
        builder.branch(header)
        builder.position_at_end(after)
        return [Value(self.builder, state) for state in states]

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        """Run `body` where a condition holds."""
        inside, after = (self.builder.append_basic_block(name) for name in ("then", "else"))
        self.builder.cbranch(condition.raw, inside, after)
        self.builder.position_at_end(inside)
        body()
        self.builder.branch(after)
        self.builder.position_at_end(after)

    def _int(self, number: Value | int) -> Any:
        return number.raw if isinstance(number, Value) else ir.Constant(I64, number)

    def load(self, address: Value, type_: Any, lanes: int | None = None) -> Value:
        """A scalar, or `lanes` of a type from int64 `address` on."""
        whole = type_ if lanes is None else ir.VectorType(type_, lanes)
        return Value(self.builder, self.builder.load(self._pointer(address), typ=whole, align=_size(type_)))

    def store(self, value: Value, address: Value, lanes: int | None = None) -> None:
        """Write a scalar or a vector; of that, the first `lanes` where they are told."""
        type_ = value.type
        if lanes is None or lanes == type_.count:
            self.builder.store(value.raw, self._pointer(address), align=_size(getattr(type_, "element", type_)))
        elif lanes == 1:  # by LLVM 22 a masked store of one int8 that was made of an int32 writes four bytes
            first = self.builder.extract_element(value.raw, ir.Constant(I32, 0))
            self.builder.store(first, self._pointer(address), align=_size(type_.element))
        else:
            mask = ir.Constant(ir.VectorType(ir.IntType(1), type_.count), [i < lanes for i in range(type_.count)])
            alignment = ir.Constant(I32, _size(type_.element))
            intrinsic("llvm.masked.store", None, value, Value(self.builder, self._pointer(address)), alignment, mask)

    def prefetch(self, address: Value) -> None:
        """Have the line of this address brought to the nearest cache while other work goes on."""
        read, nearest, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        intrinsic("llvm.prefetch.p0", None, Value(self.builder, self._pointer(address)), read, nearest, data, suffix="")

    def load_first(self, address: Value, type_: Any, count: int, lanes: int) -> Value:
        """A vector of `lanes`, of which the first `count` are read and the others are 0."""
        if count == lanes:
            return self.load(address, type_, lanes)
        mask = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [i < count for i in range(lanes)])
        return self._load_masked(address, ir.VectorType(type_, lanes), mask)

    def load_where(self, address: Value, type_: Any, mask: Value) -> Value:
        """A vector of as many lanes as the mask has: those where it holds are read and the others are 0."""
        return self._load_masked(address, ir.VectorType(type_, mask.type.count), mask.raw)

    def _load_masked(self, address: Value, vector: Any, mask: Any) -> Value:
        alignment, zeros = ir.Constant(I32, _size(vector.element)), ir.Constant(vector, [0] * vector.count)
        return intrinsic(
            "llvm.masked.load", vector, Value(self.builder, self._pointer(address)), alignment, mask, zeros
        )

    def _pointer(self, address: Value) -> Any:
        return self.builder.inttoptr(address.raw, POINTER)


def _size(type_: Any) -> int:
    return {"i8": 1, "i16": 2, "i32": 4, "float": 4, "i64": 8, "bfloat": 2}[str(type_)]
