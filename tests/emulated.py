"""A machine with vectors of AVX-512 and products of bfloat16 and int8, of instructions that every CPU with AVX2 has.

LLVM makes two of them for one of a wider vector. So the kernels' code for such vectors and dtypes runs where no CPU has
them; what this does not show is whether the instructions that they stand in for are the right ones.
"""

from __future__ import annotations

from dataclasses import replace

import llvmlite.binding as llvm
from llvmlite import ir

from fastbert.cpu.instructions import AVX2, AVX512, Bfloat16, Int8
from fastbert.cpu.machine import Machine
from fastbert.cpu.program import _initialise
from fastbert.cpu.values import F32, Value, bitcast, fma


def _bfloat16_dot(total: Value, a: Value, b: Value) -> Value:
    for half in range(2):
        first, second = (_float_half(x, half) for x in (a, b))
        total = fma(first, second, total)
    return total


def _float_half(words: Value, half: int) -> Value:
    """The first or second bfloat16 of each word."""
    bits = words << 16 if half == 0 else Value(words.builder, words.builder.and_(words.raw, words.like(-65536).raw))
    return bitcast(bits, ir.VectorType(F32, words.type.count))


def _int8_dot(total: Value, a: Value, b: Value) -> Value:
    for byte in range(4):
        unsigned, signed = (x << (24 - 8 * byte) for x in (a, b))
        builder = total.builder
        first = Value(builder, builder.lshr(unsigned.raw, a.like(24).raw))
        second = Value(builder, builder.ashr(signed.raw, b.like(24).raw))
        total = total + first * second
    return total


# What LLVM calls where no instruction rounds to bfloat16: to nearest, ties to even, and NaN stays.
ROUND = """
define bfloat @__truncsfbf2(float %x) {
  %bits = bitcast float %x to i32
  %above = lshr i32 %bits, 16
  %odd = and i32 %above, 1
  %half = add i32 %odd, 32767
  %sum = add i32 %bits, %half
  %nan = fcmp uno float %x, %x
  %quiet = or i32 %bits, 4194304
  %chosen = select i1 %nan, i32 %quiet, i32 %sum
  %shifted = lshr i32 %chosen, 16
  %short = trunc i32 %shifted to i16
  %made = bitcast i16 %short to bfloat
  ret bfloat %made
}
"""


def _engine() -> object:
    _initialise()
    target = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(ROUND), target)
    engine.finalize_object()
    llvm.add_symbol("__truncsfbf2", engine.get_function_address("__truncsfbf2"))
    return engine  # keeps the code alive


_ENGINE = _engine()

WIDE = Machine(
    "x86-64-v3",
    "",
    replace(AVX2, lanes=AVX512.lanes, registers=AVX512.registers, rows=AVX512.rows),
    Bfloat16(AVX2.needs, _bfloat16_dot),
    Int8(AVX2.needs, _int8_dot, rows=12),
)
