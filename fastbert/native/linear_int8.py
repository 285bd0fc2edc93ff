"""linear_int8: a product of int8 rows and an int8 weight, and all that happens to its rows, on a CPU.

A task is `TASK_ROWS` rows of the product. Its sums, in int32 registers, are scaled, and go through bias, activation and
residual sum into the nearest cache as float32; LayerNorm and the writing follow there, see `row_wise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from llvmlite import ir
from torch import Tensor

from fastbert.config import Activation
from fastbert.native.code import F32, I32, Code, Kernel, Value, compiled, float_bits
from fastbert.native.machine import Machine
from fastbert.native.row_wise import Finish, activated, address, finish, load_states
from fastbert.native.rows import COLUMNS, ROWS, TASK_ROWS, Int8Matrix, Int8Rows

PARAMETERS = (
    "values", "scale", "zero", "rows", "weight", "weight_scale", "weight_sum", "bias", "residual", "norm_weight",
    "norm_bias", "eps", "scratch", "out", "out_values", "out_scale", "out_zero",
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What the kernel is compiled for: its shapes and the steps it has."""

    depth: int
    activation: Activation | None
    residual: torch.dtype | None
    finish: Finish


def linear_int8(
    machine: Machine,
    x: Int8Rows,
    weight: Int8Matrix,
    bias: Tensor,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    int8: bool = False,
) -> Int8Rows | None:
    """`x @ weight + bias`, then activation, + residual and LayerNorm, those that are asked for.

    Args:
        x: made by `Int8Rows.empty`; its width a multiple of 4.
        bias: float32 `[out]`.
        residual: contiguous `[rows, out]`, of a dtype of `machine.dtypes`.
        norm: LayerNorm's weight and bias, float32 `[out]`, and its eps.
        out: contiguous `[rows, out]` <- the result, if it is wanted; may be `residual` itself.
        int8: also give it in int8, quantized before it is rounded.
    """
    (rows, depth), width = x.values.shape, len(weight.scale)
    made = Int8Rows.empty(rows, width) if int8 else None
    parts = Finish(width, norm is not None, None if out is None else out.dtype, int8)
    steps = Steps(depth, activation, None if residual is None else residual.dtype, parts)
    scratch = torch.empty(torch.get_num_threads(), TASK_ROWS, parts.scratch_width)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    _kernel(machine, steps)(
        -(-rows // TASK_ROWS),
        *(address(part) for part in (x.values, x.scale, x.zero)),
        rows,
        *(address(part) for part in (weight.values, weight.scale, weight.sum, bias, residual, norm_weight, norm_bias)),
        float_bits(eps),
        *(address(part) for part in (scratch, out)),
        *(address(made and part) for part in (made and made.values, made and made.scale, made and made.zero)),
    )
    return made


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "linear_int8", PARAMETERS, partial(_product, steps=steps))


def _product(code: Code, steps: Steps) -> None:
    lanes, depth, width = code.lanes, steps.depth, steps.finish.width
    first = code.task * TASK_ROWS
    scratch = code["scratch"] + code.worker * (TASK_ROWS * steps.finish.scratch_width * 4)

    def column_block(column: Value, counts: Sequence[int]) -> None:
        weight = code["weight"] + column * depth

        def row_block(local: Value) -> None:
            row = first + local
            values = code["values"] + row * depth

            def multiply(k: Value, *totals: Value) -> Sequence[Value]:
                fours = weight + k * (4 * COLUMNS)
                vectors = [code.load(fours + 4 * lanes * n, I32, lanes) for n in range(len(counts))]  # [lanes, 4]
                made = []
                for r in range(ROWS):
                    four = code.splat(code.load(values + k * 4 + r * depth, I32))
                    made += [code.dot_int8(totals[r * len(counts) + n], four, w) for n, w in enumerate(vectors)]
                return made

            zero = code.constant(ir.VectorType(I32, lanes), 0)
            totals = code.loop(0, depth // 4, 1, multiply, *[zero] * (ROWS * len(counts)))
            for n, count in enumerate(counts):
                place = column + n * lanes
                scale, total, bias = (
                    code.load_first(code[name] + place * 4, F32, count, lanes)
                    for name in ("weight_scale", "weight_sum", "bias")
                )
                for r in range(ROWS):
                    row_scale, row_zero = (code.splat(code.load(code[name] + (row + r) * 4, F32)) for name in ("scale", "zero"))
                    x = code.to_float(totals[r * len(counts) + n]) * scale - row_zero * total
                    x = code.fma(x, row_scale, bias)
                    if steps.activation is not None:
                        x = activated(code, x, steps.activation)
                    if steps.residual is not None:
                        there = code.minimum(row + r, code["rows"] - 1)
                        x = x + load_states(code, "residual", steps.residual, there * width + place, count)
                    code.store(x, scratch + ((local + r) * steps.finish.scratch_width + place) * 4)

        code.loop(0, TASK_ROWS, ROWS, row_block)

    whole = width // COLUMNS * COLUMNS
    code.loop(0, whole, COLUMNS, lambda column: column_block(column, [lanes] * (COLUMNS // lanes)))
    if whole < width:
        rest = [min(lanes, width - begin) for begin in range(whole, width, lanes)]
        column_block(code.number(whole), rest)
    count = code.minimum(code["rows"] - first, TASK_ROWS)

    def finish_row(local: Value) -> None:
        finish(code, first + local, scratch + local * (steps.finish.scratch_width * 4), steps.finish)

    code.loop(0, count, 1, finish_row)
