"""Instruction sets: what one has for the kernels, and how a product is cut to fit its registers.

A new one is an entry in `VECTORS`, `BFLOAT16` or `INT8`, and what an entry needs are LLVM's names of features.
`machine.host` takes the first of each kind that the CPU has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from fastbert.cpu.values import (
    I8,
    I16,
    I32,
    BFloatType,
    Value,
    bitcast,
    constant,
    exclusive_or,
    fma,
    intrinsic,
    nearest,
    select,
    to_int32,
)  # fmt: skip

# Of (total, a, b): total + the products of what lies in each 32-bit word of a and b.
Dot = Callable[[Value, Value, Value], Value]


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of float32, as any CPU has them whose multiply-adds are fused.

    Attributes:
        lanes: float32 in a vector.
        registers: vector registers.
        rows: of a product of floats that are made together: their sums leave room for operands, and for renaming.
        group_bytes: of rows that all outputs are made of before the next.
        flags: what LLVM is told beside the features of the CPU.
    """

    needs: frozenset[str]
    lanes: int
    registers: int
    rows: int
    group_bytes: int
    flags: str = ""

    @property
    def columns(self) -> int:
        """Outputs of a product that are made together: two vectors of sums for each row."""
        return 2 * self.lanes

    @property
    def queries(self) -> int:
        """Of attention, made together: with two vectors of keys they fill half of the registers."""
        return self.registers // 4

    def reciprocal(self, x: Value) -> Value:
        """1 / x of a vector, to an ulp or two, for x from 2^-125 to 2^126; NaN stays."""
        return x.like(1.0) / x

    def exp2(self, x: Value, of_fraction: Callable[[Value], Value]) -> Value:
        """2^x of a vector; at most 2^-126 for anything lower, and NaN stays. x is at most 127.

        Args:
            of_fraction: gives 2^f for |f| <= 1/2.
        """
        x = select(x < -126.0, -126.0, x)
        whole = nearest(x)
        power = of_fraction(x - whole)
        exponent = to_int32(whole) << 23
        return bitcast(bitcast(power, exponent.type) + exponent, x.type)


class Avx512(Vectors):
    """Vectors of 16, with instructions for a reciprocal's estimate and for either end of 2^x."""

    def reciprocal(self, x: Value) -> Value:
        """See `Vectors.reciprocal`."""
        # On Zen 4 a division takes the time of a dozen products. The estimate's error of 2^-14 becomes its square.
        estimate = intrinsic("llvm.x86.avx512.rcp14.ps.512", x.type, x, x.like(0.0), constant(I16, -1), suffix="")
        return fma(estimate, fma(-x, estimate, 1.0), estimate)

    def exp2(self, x: Value, of_fraction: Callable[[Value], Value]) -> Value:
        """See `Vectors.exp2`."""
        every, to_nearest, as_it_is = constant(I16, -1), constant(I32, 8), constant(I32, 4)
        reduce, scale = (f"llvm.x86.avx512.mask.{name}.ps.512" for name in ("reduce", "scalef"))
        fraction = intrinsic(reduce, x.type, x, to_nearest, x, every, as_it_is, suffix="")
        power = of_fraction(fraction)
        return intrinsic(scale, x.type, power, x - fraction, power, every, as_it_is, suffix="")


@dataclass(frozen=True, eq=False)
class Tiles:
    """Registers of 16 rows of 16 words beside those of vectors, and products of them; see `amx`.

    Attributes:
        product: the instruction that adds the products of two tiles to a third.
        prefix: what LLVM puts before an instruction's name. The tests put another there, of functions that do the same.
    """

    product: str
    prefix: str = "llvm.x86."

    @property
    def rows(self) -> int:
        """Most rows of a product that are made together: two tiles of them, so that four tiles of sums take turns."""
        return 32

    def rows_at_once(self, rows: int) -> int:
        """Of so many. The last block begins where it ends with the last row."""
        return min(self.rows, 1 << (max(rows, 1).bit_length() - 1))


@dataclass(frozen=True, eq=False)
class Bfloat16:
    """Products of bfloat16: the dot is of pairs, words are int32 `[lanes]`, and the total float32.

    Attributes:
        tiles: what products with weights are made with, where there are any.
    """

    needs: frozenset[str]
    dot: Dot
    tiles: Tiles | None = None


@dataclass(frozen=True, eq=False)
class Int8:
    """Products of 8 bits: the dot is of fours, uint8 in a and int8 in b; words and the total are int32 `[lanes]`.

    Attributes:
        rows: most that are made together, with `Vectors.columns` outputs; a divisor of `linear_int8.TASK_ROWS`.
        tiles: what products are made with instead, where there are any.
    """

    needs: frozenset[str]
    dot: Dot
    rows: int
    tiles: Tiles | None = None

    def rows_at_once(self, rows: int) -> int:
        """The fastest way through so many: n rows take n cycles a word, 4 at least, since sums wait for sums.

        The last block begins where it ends with the last row.
        """
        sizes = (n for n in (self.rows, 8, 4, 2, 1) if n <= min(rows, self.rows))
        return min(sizes, key=lambda n: -(-rows // n) * max(n, 4))


def float32_dot(total: Value, a: Value, b: Value) -> Value:
    """The `Dot` of words that are a float32 each."""
    return fma(a, b, total)


def _dpbf16ps(total: Value, a: Value, b: Value) -> Value:
    a, b = (bitcast(x, ir.VectorType(BFloatType(), 32)) for x in (a, b))
    return intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, a, b, suffix="")


def _vpdpbusd(total: Value, a: Value, b: Value) -> Value:
    lanes = total.type.count
    a, b = (bitcast(x, ir.VectorType(I8, 4 * lanes)) for x in (a, b))
    return intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, total, a, b, suffix="")


def _vpmaddubsw(total: Value, a: Value, b: Value) -> Value:
    # It sums two products in int16, and would saturate; `int8.PAIR` keeps them from that.
    lanes = total.type.count
    names = {8: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd"), 16: ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512")}
    narrow, wide = names[lanes]
    halves = ir.VectorType(I16, 2 * lanes)
    a, b = (bitcast(x, ir.VectorType(I8, 4 * lanes)) for x in (a, b))
    pairs = intrinsic(f"llvm.x86.{narrow}", halves, a, b, suffix="")
    return total + intrinsic(f"llvm.x86.{wide}", total.type, pairs, pairs.like(1), suffix="")


def _bfdot(total: Value, a: Value, b: Value) -> Value:
    a, b = (bitcast(x, ir.VectorType(BFloatType(), 8)) for x in (a, b))
    return intrinsic("llvm.aarch64.neon.bfdot.v4f32.v8bf16", total.type, total, a, b, suffix="")


def _neon_int8(name: str, total: Value, a: Value, b: Value) -> Value:
    a, b = (bitcast(x, ir.VectorType(I8, 16)) for x in (a, b))
    return intrinsic(f"llvm.aarch64.neon.{name}.v4i32.v16i8", total.type, total, a, b, suffix="")


def _usdot(total: Value, a: Value, b: Value) -> Value:
    return _neon_int8("usdot", total, a, b)


def _sdot(total: Value, a: Value, b: Value) -> Value:
    # Both are int8 to it, so that it is given a - 128. What that takes off is the same for all rows that meet b, and
    # LLVM computes it once for them.
    sign = a.like(0x80808080 - 2**32)
    return _neon_int8("sdot", total, exclusive_or(a, sign), b) - _neon_int8("sdot", total.like(0), sign, b)


# group_bytes are half of the second cache of a Zen 3 and of a Zen 4.
AVX2 = Vectors(frozenset({"avx2", "fma"}), lanes=8, registers=16, rows=6, group_bytes=2**18)
AVX512 = Avx512(
    AVX2.needs | {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    lanes=16,
    registers=32,
    rows=8,
    group_bytes=2**19,
    flags=",-prefer-256-bit",  # which LLVM does on many CPUs with AVX-512
)
AVX512_BF16 = Bfloat16(AVX512.needs | {"avx512bf16"}, _dpbf16ps)
# With two vectors of outputs 12 rows are 24 sums of 32 registers, and 6 are 12 of 16.
AVX512_VNNI = Int8(AVX512.needs | {"avx512vnni"}, _vpdpbusd, rows=12)
AVX512_INT8 = Int8(AVX512.needs, _vpmaddubsw, rows=12)
AVX_VNNI = Int8(AVX2.needs | {"avxvnni"}, _vpdpbusd, rows=6)
AVX2_INT8 = Int8(AVX2.needs, _vpmaddubsw, rows=6)
# `machine.host` sees a CPU's AMX only where FASTBERT_AMX=1 asks for it.
AMX_BF16 = Bfloat16(AVX512_BF16.needs | {"amx-tile", "amx-bf16"}, _dpbf16ps, Tiles("tdpbf16ps"))
AMX_INT8 = Int8(AVX512_VNNI.needs | {"amx-tile", "amx-int8"}, _vpdpbusd, rows=12, tiles=Tiles("tdpbusd"))

# 12 rows are 24 sums of 32 registers. group_bytes are half of the second cache of a Neoverse N1.
NEON = Vectors(
    frozenset({"neon"}),
    lanes=4,
    registers=32,
    rows=12,
    group_bytes=2**19,
    flags=",-sve",  # else LLVM mixes some of it in, which the emulated CPUs of our tests do not have
)
NEON_BF16 = Bfloat16(NEON.needs | {"bf16"}, _bfdot)
NEON_I8MM = Int8(NEON.needs | {"i8mm"}, _usdot, rows=12)
NEON_DOTPROD = Int8(NEON.needs | {"dotprod"}, _sdot, rows=12)

# Of each kind, the best first.
VECTORS = (AVX512, AVX2, NEON)
BFLOAT16 = (AMX_BF16, AVX512_BF16, NEON_BF16)
INT8 = (AMX_INT8, AVX512_VNNI, AVX512_INT8, AVX_VNNI, AVX2_INT8, NEON_I8MM, NEON_DOTPROD)

# float32 in the widest vector: scratch whose rows are whole vectors of so many serves every set.
MOST_LANES = max(vectors.lanes for vectors in VECTORS)
