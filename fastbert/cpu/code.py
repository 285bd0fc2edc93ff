"""What a CPU kernel is written in: vectors of float32 in the widths of this machine, loops, and one task at a time.

A kernel is a function of a task's number. `compiled` makes machine code of it with LLVM, which llvmlite brings, so no
compiler need be installed; a `Program` of kernels runs on the threads of torch, which are OpenMP's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from fastbert import forks
from fastbert.cpu import guards
from fastbert.cpu.machine import Machine, openmp
from fastbert.cpu.memory import PerWorker, Place, room

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
    """An integer (int64 unless said), a float32, or a vector of either, with Python's operators."""

    def __init__(self, code: Code, raw: Any) -> None:
        self.code, self.raw = code, raw

    @property
    def type(self) -> Any:
        """LLVM's type of it."""
        return self.raw.type

    @property
    def floating(self) -> bool:
        """Whether it is a float32 or a vector of them."""
        return getattr(self.type, "element", self.type) == F32

    def _of(self, other: Value | float) -> Any:
        return other.raw if isinstance(other, Value) else self.code.constant(self.type, other).raw

    def _binary(self, name: str, other: Value | float) -> Value:
        made = getattr(self.code.builder, f"f{name}" if self.floating else name)(self.raw, self._of(other))
        return Value(self.code, made)

    def __add__(self, other: Value | float) -> Value:
        return self._binary("add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("div", other)

    def __floordiv__(self, other: Value | int) -> Value:
        return Value(self.code, self.code.builder.udiv(self.raw, self._of(other)))

    def __mod__(self, other: Value | int) -> Value:
        return Value(self.code, self.code.builder.urem(self.raw, self._of(other)))

    def __lshift__(self, bits: int) -> Value:
        return Value(self.code, self.code.builder.shl(self.raw, self._of(bits)))

    def __lt__(self, other: Value | float) -> Value:
        compare = self.code.builder.fcmp_ordered if self.floating else self.code.builder.icmp_signed
        return Value(self.code, compare("<", self.raw, self._of(other)))


class Code:
    """The kernel being written.

    Attributes:
        machine: for which.
        task, worker: int64: the number of the task at hand, and of the thread that does it.
    """

    def __init__(self, machine: Machine, builder: Any, arguments: dict[str, Any]) -> None:
        self.machine, self.builder = machine, builder
        self.lanes = machine.lanes
        self.arguments = arguments
        self.task = self.worker = Value(self, ir.Constant(I64, 0))

    def __getitem__(self, parameter: str) -> Value:
        """The argument of this name, int64."""
        return Value(self, self.arguments[parameter])

    def float_of(self, parameter: str) -> Value:
        """The argument of this name, which `float_bits` made of a float."""
        return Value(self, self.builder.bitcast(self.builder.trunc(self.arguments[parameter], I32), F32))

    def constant(self, type_: Any, number: float) -> Value:
        """A number as a scalar, or in each lane of a vector."""
        if isinstance(type_, ir.VectorType):
            return Value(self, ir.Constant(type_, [number] * type_.count))
        return Value(self, ir.Constant(type_, number))

    def number(self, number: int) -> Value:
        """An int64."""
        return self.constant(I64, number)

    def vector(self, number: float = 0.0) -> Value:
        """float32 `[lanes]`, the same number in each."""
        return self.constant(ir.VectorType(F32, self.lanes), number)

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
        following = body(Value(self, index), *(Value(self, state) for state in states)) or ()
        for state, value, next_value in zip(states, carried, following, strict=True):
            state.add_incoming(value.raw, before)
            state.add_incoming(next_value.raw, builder.block)
        index.add_incoming(self._int(begin), before)
        index.add_incoming(builder.add(index, ir.Constant(I64, step)), builder.block)
        builder.branch(header)
        builder.position_at_end(after)
        return [Value(self, state) for state in states]

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

    def minimum(self, a: Value, b: Value | int) -> Value:
        """The lesser of two integers."""
        return self.select(a < b, a, b if isinstance(b, Value) else self.number(b))

    def maximum(self, a: Value, b: Value) -> Value:
        """The greater, lane by lane, of floats."""
        return self._call("llvm.maxnum", a.type, a, b)

    def maximum_or_nan(self, a: Value, b: Value) -> Value:
        """The greater, lane by lane, of floats; NaN where either is."""
        return self._call("llvm.maximum", a.type, a, b)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Lane by lane where `condition` is a vector."""
        return Value(self, self.builder.select(condition.raw, yes.raw, no.raw))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self._call("llvm.fma", a.type, a, b, c)

    def rsqrt(self, x: Value) -> Value:
        """1 / sqrt(x) of a scalar float."""
        return self.constant(F32, 1.0) / self.sqrt(x)

    def sqrt(self, x: Value) -> Value:
        """The square root of a scalar float."""
        return self._call("llvm.sqrt", F32, x)

    def load(self, address: Value, type_: Any, lanes: int | None = None) -> Value:
        """A scalar, or `lanes` of a type from int64 `address` on."""
        whole = type_ if lanes is None else ir.VectorType(type_, lanes)
        return Value(self, self.builder.load(self._pointer(address), typ=whole, align=_size(type_)))

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
            self._call("llvm.masked.store", None, value, Value(self, self._pointer(address)), alignment, mask)

    def prefetch(self, address: Value) -> None:
        """Have the line of this address brought to the nearest cache while other work goes on."""
        read, nearest, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        self._call("llvm.prefetch.p0", None, Value(self, self._pointer(address)), read, nearest, data, suffix="")

    def load_first(self, address: Value, type_: Any, count: int, lanes: int) -> Value:
        """A vector of `lanes`, of which the first `count` are read and the others are 0."""
        if count == lanes:
            return self.load(address, type_, lanes)
        vector = ir.VectorType(type_, lanes)
        mask = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [i < count for i in range(lanes)])
        alignment, zeros = ir.Constant(I32, _size(type_)), ir.Constant(vector, [0] * lanes)
        return self._call("llvm.masked.load", vector, Value(self, self._pointer(address)), alignment, mask, zeros)

    def splat(self, scalar: Value) -> Value:
        """A vector with the scalar in each lane."""
        type_ = ir.VectorType(scalar.type, self.lanes)
        first = self.builder.insert_element(ir.Constant(type_, ir.Undefined), scalar.raw, ir.Constant(I32, 0))
        return self.shuffle(Value(self, first), Value(self, first), [0] * self.lanes)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """The lanes of `a` and then `b` with these numbers."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return Value(self, self.builder.shuffle_vector(a.raw, b.raw, mask))

    def interleaved(self, a: Value, b: Value) -> tuple[Value, Value]:
        """a0 b0 a1 b1 ..., in two vectors."""
        count = a.type.count
        order = [number for i in range(count) for number in (i, i + count)]
        return self.shuffle(a, b, order[:count]), self.shuffle(a, b, order[count:])

    def transposed(self, rows: list[Value]) -> list[Value]:
        """As many vectors as lanes: lane i of row j becomes lane j of row i."""
        half = len(rows) // 2
        for _ in range(int(math.log2(len(rows)))):
            rows = [vector for i in range(half) for vector in self.interleaved(rows[i], rows[i + half])]
        return rows

    def sum(self, x: Value) -> Value:
        """All lanes added up."""
        zero = self.constant(F32, 0.0)
        return self._call("llvm.vector.reduce.fadd", F32, zero, x, flags="reassoc", suffix=x.type)

    def greatest(self, x: Value) -> Value:
        """The greatest lane."""
        return self._call("llvm.vector.reduce.fmax", F32, x, flags="nnan", suffix=x.type)

    def least(self, x: Value) -> Value:
        """The least lane."""
        return self._call("llvm.vector.reduce.fmin", F32, x, flags="nnan", suffix=x.type)

    def minimum_float(self, a: Value, b: Value) -> Value:
        """The lesser, lane by lane, of floats."""
        return self._call("llvm.minnum", a.type, a, b)

    def first(self, x: Value, count: int) -> Value:
        """The first `count` lanes of floats, and 0 in the others."""
        return (
            x
            if count == self.lanes
            else self.shuffle(x, self.vector(), [*range(count), *[self.lanes] * (self.lanes - count)])
        )

    def nearest(self, x: Value) -> Value:
        """Floats rounded to whole numbers, halves to even ones."""
        return self._call("llvm.nearbyint", x.type, x)

    def to_float(self, x: Value) -> Value:
        """An integer -> float32; int32 `[lanes]` -> float32 `[lanes]`."""
        whole = ir.VectorType(F32, x.type.count) if isinstance(x.type, ir.VectorType) else F32
        return Value(self, self.builder.sitofp(x.raw, whole))

    def to_int8(self, x: Value) -> Value:
        """Whole float32 `[lanes]` that fit -> int8."""
        integers = self.builder.fptosi(x.raw, ir.VectorType(I32, self.lanes))
        return Value(self, self.builder.trunc(integers, ir.VectorType(I8, self.lanes)))

    def gelu(self, x: Value, coarse: bool = False) -> Value:
        """x/2 (1 + erf(x / sqrt 2)), the error function to 3e-8 before rounding; if `coarse` to 3e-6, for bfloat16.

        erf(x / sqrt 2) is x P(x^2) / Q(x^2), fitted as `exp2` is, to a |x| past which it is 1 within that.
        """
        last, above, below = COARSE_ERF if coarse else ERF
        near = self.maximum(self.minimum_float(x, self.vector(last)), self.vector(-last))
        square, half = near * near, x * 0.5
        product = half * near * self._polynomial(square, above)
        return self.fma(product, self.reciprocal(self._polynomial(square, below)), half)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + e^-x)."""
        power = self.exp2(self.minimum_float(x * -1.4426950408889634, self.vector(126.0)))
        return self.reciprocal(power + 1.0)

    def reciprocal(self, x: Value) -> Value:
        """1 / x of a vector, to an ulp or two, for x from 2^-125 to 2^126; NaN stays."""
        if 32 * self.lanes < 512:
            return self.vector(1.0) / x
        # On Zen 4 a division takes the time of a dozen products. The estimate's error of 2^-14 becomes its square.
        bits = self.constant(I16, -1)
        estimate = self._call("llvm.x86.avx512.rcp14.ps.512", x.type, x, self.vector(), bits, suffix="")
        return self.fma(estimate, self.fma(self.negative(x), estimate, self.vector(1.0)), estimate)

    def _polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        """Coefficients from that of the highest power on."""
        total = self.vector(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.vector(coefficient))
        return total

    def negative(self, x: Value) -> Value:
        """-x of floats."""
        return Value(self, self.builder.fneg(x.raw))

    def lane_numbers(self) -> Value:
        """int32 0, 1, 2, ..."""
        return Value(self, ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes))))

    def splat_int32(self, x: Value) -> Value:
        """A vector with the integer in each lane."""
        return self.splat(Value(self, self.builder.trunc(x.raw, I32)))

    def exp2(self, x: Value) -> Value:
        """2^x to about an ulp; at most 2^-126 for anything lower, and NaN stays. x is at most 127.

        The polynomial of degree 6 was fitted to 2^f, |f| <= 1/2, by least squares whose weights even out the relative
        error: it is 2e-9 before rounding.
        """
        if 32 * self.lanes == 512:  # which has an instruction for either end
            every, nearest, as_it_is = self.constant(I16, -1), self.constant(I32, 8), self.constant(I32, 4)
            rest = self._call("llvm.x86.avx512.mask.reduce.ps.512", x.type, x, nearest, x, every, as_it_is, suffix="")
            power = self._polynomial(rest, EXP2)
            scaled = power, x - rest, power, every, as_it_is
            return self._call("llvm.x86.avx512.mask.scalef.ps.512", x.type, *scaled, suffix="")
        x = self.select(x < -126.0, self.vector(-126.0), x)
        whole = self.nearest(x)
        total = self._polynomial(x - whole, EXP2)
        integers = ir.VectorType(I32, self.lanes)
        power = Value(self, self.builder.fptosi(whole.raw, integers)) << 23
        bits = Value(self, self.builder.bitcast(total.raw, integers)) + power
        return Value(self, self.builder.bitcast(bits.raw, x.type))

    def from_bfloat16(self, x: Value) -> Value:
        """int16 bits of bfloat16 `[lanes]` -> float32 `[lanes]`."""
        wide = self.builder.zext(x.raw, ir.VectorType(I32, x.type.count))
        shifted = Value(self, wide) << 16
        return Value(self, self.builder.bitcast(shifted.raw, ir.VectorType(F32, x.type.count)))

    def to_bfloat16(self, x: Value) -> Value:
        """float32 `[lanes]` -> int16 bits of bfloat16, rounded to nearest even."""
        narrow = self.builder.fptrunc(x.raw, ir.VectorType(BFloatType(), x.type.count))
        return Value(self, self.builder.bitcast(narrow, ir.VectorType(I16, x.type.count)))

    def dot_bfloat16(self, total: Value, a: Value, b: Value) -> Value:
        """total + a0 * b0 + a1 * b1 of each lane's pair of bfloat16, both int32 `[lanes]`."""
        pairs = ir.VectorType(BFloatType(), 2 * self.lanes)
        a, b = (Value(self, self.builder.bitcast(x.raw, pairs)) for x in (a, b))
        return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", total.type, total, a, b, suffix="")

    def dot_int8(self, total: Value, a: Value, b: Value) -> Value:
        """total + the products of each lane's four bytes, uint8 in `a` and int8 in `b`; all are int32 `[lanes]`."""
        fours = ir.VectorType(I8, 4 * self.lanes)
        a, b = (self.bitcast(x, fours) for x in (a, b))
        return self._call(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", total.type, total, a, b, suffix="")

    def bitcast(self, x: Value, type_: Any) -> Value:
        """The same bits as another type."""
        return Value(self, self.builder.bitcast(x.raw, type_))

    def widened(self, x: Value) -> Value:
        """An int32 as an int64."""
        return Value(self, self.builder.sext(x.raw, I64))

    def _pointer(self, address: Value) -> Any:
        return self.builder.inttoptr(address.raw, POINTER)

    def _call(self, name: str, result: Any, *arguments: Any, flags: str = "", suffix: Any = None) -> Value:
        """An intrinsic of LLVM; its name goes on with the type it is for."""
        raw = [argument.raw if isinstance(argument, Value) else argument for argument in arguments]
        type_ = suffix if suffix is not None else result if result is not None else raw[0].type
        if type_ != "":
            name += f".{_mangled(type_)}" + (".p0" if "masked" in name else "")
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(ir.VoidType() if result is None else result, [x.type for x in raw])
            function = ir.Function(module, signature, name)
        return Value(self, self.builder.call(function, raw, fastmath=(flags,) if flags else ()))


# float32 coefficients of 2^f, |f| <= 1/2, highest power first; see `Code.exp2`.
EXP2 = (
    1.5353362e-4, 1.3398875e-3, 9.6184369e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0,
)  # fmt: skip
# What `Code.gelu` takes as the error function: the last x, and coefficients of P and Q, highest power first.
ERF = (
    5.6568542,
    (4.3637447e-8, 1.2729737e-5, 3.5387947e-4, 9.4518285e-3, 6.9384917e-2, 7.9788444e-1),
    (1.1712682e-6, 7.6022981e-5, 1.9305641e-3, 2.9119228e-2, 2.5362668e-1, 1.0),
)
COARSE_ERF = (
    4.7376154,
    (6.4981757e-5, 7.6002233e-3, 5.5092874e-2, 7.9787514e-1),
    (1.1476721e-3, 2.3803378e-2, 2.3569676e-1, 1.0),
)


def _size(type_: Any) -> int:
    return {"i8": 1, "i16": 2, "i32": 4, "float": 4, "i64": 8, "bfloat": 2}[str(type_)]


def _mangled(type_: Any) -> str:
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_mangled(type_.element)}"
    return {"float": "f32", "bfloat": "bf16"}.get(str(type_), str(type_))


def float_bits(number: float) -> int:
    """A float32 as the integer that a kernel takes."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(number)).value


# What a kernel is called with: numbers, places, and None for what no step reads.
Argument = Place | PerWorker | int | None


class Launch:
    """A kernel's tasks and its arguments, for a `Program` to run. It keeps the memory that they are alive."""

    def __init__(self, kernel: Kernel, tasks: int, arguments: Sequence[Argument]) -> None:
        self.kernel, self.tasks, self.arguments = kernel, tasks, arguments
        # What a worker reads: the next task, the next thread's number, how many tasks; then the arguments.
        self.fields = (ctypes.c_int64 * (3 + len(arguments)))(0, 0, tasks, *map(_integer, arguments))
        # Of the memory for each worker: where its address is to be written, and how large it is.
        self.scratch = [
            (self.fields, 3 + i, argument.size)
            for i, argument in enumerate(arguments)
            if isinstance(argument, PerWorker)
        ]

    def run(self) -> None:
        """Run it alone."""
        Program([self]).run()


def _integer(argument: Argument) -> int:
    """The argument as a kernel gets it; 0 for None, and for what the `Program` fills in."""
    if isinstance(argument, tuple):
        return argument.address if isinstance(argument, Place) else 0
    return argument or 0


def _give(threads: int, wanted: Sequence[tuple[Any, int, int]]) -> Tensor:
    """Memory for each of so many threads; launches that run one after another, of which it is wanted, share it."""
    memory = room([threads * max(size for _, _, size in wanted)], torch.uint8)
    for fields, i, _ in wanted:
        fields[i] = memory.data_ptr()
    return memory


@dataclass(frozen=True)
class Kernel:
    """Machine code of a kernel.

    Attributes:
        name: what it is called in messages.
        address: of `worker(int64 *fields)`, which takes tasks until there are none.
        engine: keeps the code alive.
        parameters: names of the arguments.
    """

    name: str
    address: int
    engine: Any
    parameters: Sequence[str]

    def __call__(self, tasks: int, *arguments: Argument) -> Launch:
        """Tasks 0 to `tasks`; the arguments in the order of the parameters."""
        return Launch(self, tasks, arguments)


class Program:
    """Launches that follow one another: the tasks of each begin when all of the one before are done.

    A run is a single call on torch's threads, so that short launches cost little. It may run often, but not in two
    threads at once. How many threads there are is settled when it is made, with the memory that they work in.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = launches
        threads = min(max((launch.tasks for launch in launches if launch.tasks), default=1), torch.get_num_threads())
        wanted = zip_longest(*(launch.scratch for launch in launches))
        self._scratch = [_give(threads, [one for one in some if one is not None]) for some in wanted]
        addresses = [x for one in launches for x in (one.kernel.address, ctypes.addressof(one.fields))]
        self._fields = (ctypes.c_int64 * (2 + len(addresses)))(len(launches), threads, *addresses)

    def run(self) -> None:
        """Run them all."""
        _driver()(self._fields)
        if guards.ON:
            self._verify()

    def _verify(self) -> None:
        for launch in self.launches:
            for parameter, argument in zip(launch.kernel.parameters, launch.arguments, strict=True):
                if isinstance(argument, Place):
                    guards.verify(f"{launch.kernel.name}: {parameter}", argument.owner)
        for scratch in self._scratch:
            guards.verify("scratch", scratch)


# What runs a `Program`: %program is how many launches there are, on how many threads, and of each launch the address of
# its worker and of its fields.
DRIVER = """
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare void @GOMP_barrier()

define void @team(ptr %program) {
entry:
  %launches = load i64, ptr %program
  br label %next
next:
  %i = phi i64 [0, %entry], [%following, %launch]
  %more = icmp slt i64 %i, %launches
  br i1 %more, label %launch, label %done
launch:
  %following = add i64 %i, 1
  %worker_at = getelementptr [2 x i64], ptr %program, i64 %following, i64 0
  %fields_at = getelementptr [2 x i64], ptr %program, i64 %following, i64 1
  %worker = load ptr, ptr %worker_at
  %fields = load ptr, ptr %fields_at
  call void %worker(ptr %fields)
  call void @GOMP_barrier()
  br label %next
done:
  ret void
}

define void @run(ptr %program) {
entry:
  %launches = load i64, ptr %program
  br label %next
next:
  %i = phi i64 [0, %entry], [%following, %reset]
  %more = icmp slt i64 %i, %launches
  br i1 %more, label %reset, label %start
reset:
  %following = add i64 %i, 1
  %fields_at = getelementptr [2 x i64], ptr %program, i64 %following, i64 1
  %fields = load ptr, ptr %fields_at
  store <2 x i64> zeroinitializer, ptr %fields, align 8
  br label %next
start:
  %threads_at = getelementptr i64, ptr %program, i64 1
  %threads = load i32, ptr %threads_at
  call void @GOMP_parallel(ptr @team, ptr %program, i32 %threads, i32 0)
  ret void
}
"""


# Around all use of LLVM, which has a lock of its own that no fork waits for.
_compiling = forks.lock()


@cache
def _driver() -> Any:
    """`run` of `DRIVER`."""
    with _compiling:
        _initialise()
        for name, function in openmp().items():
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        parsed = llvm.parse_assembly(DRIVER)
        parsed.verify()
        engine = llvm.create_mcjit_compiler(parsed, llvm.Target.from_default_triple().create_target_machine(jit=True))
        engine.finalize_object()
        run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    run.engine = engine  # type: ignore[attr-defined]  # keeps the code alive
    return run


@cache
def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def compiled(machine: Machine, name: str, parameters: Sequence[str], body: Callable[[Code], None]) -> Kernel:
    """A kernel of what `body` writes for one task.

    Args:
        parameters: names of the int64 arguments: numbers, addresses, or `float_bits`.
    """
    with _compiling:
        return _compiled(machine, name, parameters, body)


def _compiled(machine: Machine, name: str, parameters: Sequence[str], body: Callable[[Code], None]) -> Kernel:
    _initialise()
    module = ir.Module(name)
    module.triple = llvm.get_process_triple()
    worker = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
    worker.attributes.alignstack = 64  # else a vector that is kept on the stack lies in two lines of the cache
    worker.attributes.add("nounwind")  # llvmlite writes no attributes where it has only the one before
    builder = ir.IRBuilder(worker.append_basic_block("entry"))

    def field(i: int) -> Any:
        return builder.gep(worker.args[0], [ir.Constant(I64, i)], source_etype=I64)

    one = ir.Constant(I64, 1)
    number = builder.atomic_rmw("add", field(1), one, "monotonic")
    tasks = builder.load(field(2), typ=I64)
    code = Code(machine, builder, {})
    code.arguments = {parameter: builder.load(field(3 + i), typ=I64) for i, parameter in enumerate(parameters)}
    following, inside, done = (builder.append_basic_block(label) for label in ("next", "task", "end"))
    builder.branch(following)
    builder.position_at_end(following)
    task = builder.atomic_rmw("add", field(0), one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, tasks), inside, done)
    builder.position_at_end(inside)
    code.task, code.worker = Value(code, task), Value(code, number)
    body(code)
    builder.branch(following)
    builder.position_at_end(done)
    builder.ret_void()

    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target_machine = llvm.Target.from_triple(module.triple).create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3, jit=True
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.slp_vectorization = options.loop_vectorization = False
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(target_machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, target_machine)
    engine.finalize_object()
    return Kernel(name, engine.get_function_address(name), engine, parameters)
