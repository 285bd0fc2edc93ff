"""row_wise: all that happens to a row of a product in one pass over it, on a CPU.

    product  ->  + bias  ->  activation  ->  + residual  ->  LayerNorm  ->  as floats, as int8, or as both

Each step is there or not. A product of int8 comes as int32 and is scaled first. A row is read once and kept as float32
in the nearest cache until it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from llvmlite import ir
from torch import Tensor

from fastbert.config import Activation
from fastbert.native.code import F32, I8, I16, I32, Code, Kernel, Value, compiled, float_bits
from fastbert.native.machine import Machine
from fastbert.native.rows import Int8Matrix, Int8Rows

# Rows of a task: few enough to share out, enough to be worth the asking for the next.
ROWS = 16

PARAMETERS = (
    "x", "rows", "row_scale", "row_zero", "column_scale", "column_sum", "bias", "residual", "norm_weight", "norm_bias",
    "eps", "scratch", "out", "values", "scale", "zero",
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Which steps a kernel has; `width` is that of a row, `out` and `int8` what it writes."""

    width: int
    x: torch.dtype
    bias: bool
    activation: Activation | None
    residual: torch.dtype | None
    norm: bool
    out: torch.dtype | None
    int8: bool


def row_wise(
    machine: Machine,
    x: Tensor,
    *,
    scaled: tuple[Int8Rows, Int8Matrix] | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    int8: bool = False,
) -> Int8Rows | None:
    """The steps that are asked for, row by row.

    Args:
        x: contiguous `[rows, width]`, of a dtype of `machine.dtypes`; int32 together with `scaled`, whose product it is.
        bias: float32 `[width]`.
        residual: contiguous `[rows, width]`, of a dtype of `machine.dtypes`.
        norm: LayerNorm's weight and bias, float32 `[width]`, and its eps.
        out: contiguous `[rows, width]` <- the result, if it is wanted; may be `x` or `residual` itself.
        int8: also give it quantized, with the scale and zero point of each row that hold its range and 0.
    """
    rows, width = x.shape
    made = None
    if int8:
        values = torch.empty(rows, width, dtype=torch.int8)
        made = Int8Rows(values, *torch.empty(2, rows))
    steps = Steps(
        width,
        x.dtype,
        bias is not None,
        activation,
        None if residual is None else residual.dtype,
        norm is not None,
        None if out is None else out.dtype,
        int8,
    )
    scratch = torch.empty(torch.get_num_threads(), -(-width // 16) * 16)
    weight, norm_bias, eps = norm or (None, None, 0.0)
    by_row, by_column = scaled or (None, None)
    _kernel(machine, steps)(
        -(-rows // ROWS),
        _address(x),
        rows,
        _address(by_row and by_row.scale),
        _address(by_row and by_row.zero),
        _address(by_column and by_column.scale),
        _address(by_column and by_column.sum),
        _address(bias),
        _address(residual),
        _address(weight),
        _address(norm_bias),
        float_bits(eps),
        _address(scratch),
        _address(out),
        _address(made and made.values),
        _address(made and made.scale),
        _address(made and made.zero),
    )
    return made


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "row_wise", PARAMETERS, partial(_rows, steps=steps))


def _rows(code: Code, steps: Steps) -> None:
    first = code.task * ROWS
    code.loop(first, code.minimum(first + ROWS, code["rows"]), 1, lambda row: _row(code, row, steps))


def _row(code: Code, row: Value, steps: Steps) -> None:
    width, lanes = steps.width, code.lanes
    scratch = code["scratch"] + code.worker * (-(-width // 16) * 64)

    def columns(body: Callable[..., Sequence[Value] | None], *carried: Value) -> list[Value]:
        """`body(column, count, *carried)` for each vector of columns; only the last may have less than `lanes`."""
        whole = width // lanes * lanes
        states = code.loop(0, whole, lanes, lambda c, *states: body(c, lanes, *states), *carried)
        rest = body(code.number(whole), width - whole, *states) if whole < width else states
        return list(rest or ())

    def floats(name: str, column: Value, count: int) -> Value:
        return code.load_first(code[name] + column * 4, F32, count, lanes)

    def states(name: str, dtype: torch.dtype, column: Value, count: int) -> Value:
        place = code[name] + (row * width + column) * dtype.itemsize
        if dtype == torch.bfloat16:
            return code.from_bfloat16(code.load_first(place, I16, count, lanes))
        return code.load_first(place, I32 if dtype == torch.int32 else F32, count, lanes)

    def of_row(name: str) -> Value:
        return code.splat(code.load(code[name] + row * 4, F32))

    if steps.x == torch.int32:
        row_scale, row_zero = of_row("row_scale"), of_row("row_zero")

    def read(column: Value, count: int, total: Value) -> Sequence[Value]:
        x = states("x", steps.x, column, count)
        if steps.x == torch.int32:
            products = code.to_float(x) * floats("column_scale", column, count)
            x = row_scale * (products - row_zero * floats("column_sum", column, count))
        if steps.bias:
            x = x + floats("bias", column, count)
        if steps.activation is not None:
            x = activated(code, x, steps.activation)
        if steps.residual is not None:
            x = x + states("residual", steps.residual, column, count)
        code.store(x, scratch + column * 4)
        return [total + x]  # lanes past the width are 0 where a norm follows: see the check in `layer_norm`

    def kept(column: Value) -> Value:
        return code.load(scratch + column * 4, F32, lanes)

    [total] = columns(read, code.vector())
    if steps.norm:
        mean = code.splat(code.sum(total) / width)

        def squares(column: Value, count: int, total: Value) -> Sequence[Value]:
            centred = kept(column) - mean
            return [code.fma(centred, centred, total) if count == lanes else total + code.first(centred * centred, count)]

        variance = code.sum(columns(squares, code.vector())[0]) / width
        rstd = code.splat(code.rsqrt(variance + code.float_of("eps")))

        def normalise(column: Value, count: int) -> None:
            weight, bias = floats("norm_weight", column, count), floats("norm_bias", column, count)
            code.store(code.fma((kept(column) - mean) * rstd, weight, bias), scratch + column * 4)

        columns(normalise)
    if steps.out is not None:
        out = steps.out

        def write(column: Value, count: int) -> None:
            x = code.to_bfloat16(kept(column)) if out == torch.bfloat16 else kept(column)
            code.store(x, code["out"] + (row * width + column) * out.itemsize, count)

        columns(write)
    if steps.int8:
        _quantize(code, row, steps.width, columns, kept)


def _quantize(
    code: Code, row: Value, width: int, columns: Callable[..., list[Value]], kept: Callable[[Value], Value]
) -> None:
    def span(column: Value, count: int, lowest: Value, highest: Value) -> Sequence[Value]:
        x = code.first(kept(column), count)
        return [code.minimum_float(lowest, x), code.maximum(highest, x)]

    lowest, highest = columns(span, code.vector(), code.vector())  # from 0 on, which every row can then hold
    low, high = code.least(lowest), code.greatest(highest)
    step = (high - low) / 255.0
    step = code.select(step < 1e-30, code.constant(F32, 1.0), step)
    zero = code.nearest(code.negative(low) / step - 128.0)
    code.store(step, code["scale"] + row * 4)
    code.store(zero, code["zero"] + row * 4)
    inverse, shift = code.splat(code.constant(F32, 1.0) / step), code.splat(zero)

    def write(column: Value, count: int) -> None:
        whole = code.nearest(code.fma(kept(column), inverse, shift))
        whole = code.maximum(code.minimum_float(whole, code.vector(127.0)), code.vector(-128.0))
        code.store(code.to_int8(whole), code["values"] + row * width + column, count)

    columns(write)


def activated(code: Code, x: Value, activation: Activation) -> Value:
    """The activation of a vector."""
    match activation:
        case "gelu":
            return x * code.fma(code.erf(x * 0.7071067811865476), code.vector(0.5), code.vector(0.5))
        case "gelu_tanh":
            inner = x * code.fma(x * x, code.vector(0.7978845608028654 * 0.044715), code.vector(0.7978845608028654))
            return x * code.sigmoid(inner * 2.0)
        case "relu":
            return code.maximum(x, code.vector())
        case "silu":
            return x * code.sigmoid(x)
