"""linear_int8: a product of int8 rows and an int8 weight, and all that happens to its rows, on a CPU.

A task is up to `TASK_ROWS` rows of the product. They are copied side by side; then for `COLUMNS` outputs at a time
their weights, which lie together, meet `ROWS` rows after `ROWS`. A sum stays in its int32 register until it is whole;
then it is scaled, and goes through bias, activation and residual sum into the nearest cache as float32. LayerNorm and
the writing follow there, see `row_wise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from fastbert.config import Activation
from fastbert.native.code import F32, I32, Code, Kernel, Launch, Value, compiled, float_bits
from fastbert.native.int8 import NO_ROWS, Int8Matrix, Int8Rows
from fastbert.native.layout import COLUMNS
from fastbert.native.machine import Machine
from fastbert.native.row_wise import Finish, activated, finish, load_states

# Rows at a time: with two vectors of outputs they are 24 sums of 32 registers.
ROWS = 12
# Most rows of a task: a weight is read from the caches far away once for so many. A multiple of `ROWS`.
TASK_ROWS = 48
# Words between two rows that are copied, beyond a row: rows of 1024 words would share one set of the nearest cache.
GAP = 16

PARAMETERS = (
    "x", "x_scale", "x_zero", "rows", "task_rows", "weight", "weight_scale", "weight_sum", "bias", "residual",
    "norm_weight", "norm_bias", "eps", "copy", "scratch", "out", "out_values", "out_scale", "out_zero",
)  # fmt: skip


class Steps(NamedTuple):
    """What the kernel is compiled for: its shapes and the steps it has."""

    words: int
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
    out_int8: Int8Rows | None = None,
) -> Launch:
    """`x @ weight + bias`, then activation, + residual and LayerNorm, those that are asked for.

    Args:
        x: its width a multiple of 4.
        bias: float32 `[out]`.
        residual: contiguous `[rows, out]`, of a dtype of `machine.dtypes`.
        norm: LayerNorm's weight and bias, float32 `[out]`, and its eps.
        out: contiguous `[rows, out]` <- the result, if it is wanted; may be `residual` itself.
        out_int8: `[rows, out]` <- the result, quantized before it is rounded.
    """
    rows, width = x.values.shape[0], weight.scale.shape[0]
    parts = Finish(width, norm is not None, None if out is None else out.dtype, out_int8 is not None)
    words = weight.values.shape[1]
    steps = Steps(words, activation, None if residual is None else residual.dtype, parts)
    threads = torch.get_num_threads()
    tasks = -(-max(rows, 1) // (TASK_ROWS * threads)) * threads  # as many for each thread
    task_rows = -(-max(rows, 1) // (tasks * ROWS)) * ROWS
    copy = torch.empty(threads, TASK_ROWS, words + GAP)
    scratch = torch.empty(threads, TASK_ROWS, parts.scratch_width)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    return _kernel(machine, steps)(
        -(-rows // task_rows),
        *x.parts,
        rows,
        task_rows,
        weight.values,
        weight.scale,
        weight.sum,
        bias,
        residual,
        norm_weight,
        norm_bias,
        float_bits(eps),
        copy,
        scratch,
        out,
        *(NO_ROWS if out_int8 is None else out_int8.parts),
    )


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "linear_int8", PARAMETERS, partial(_product, steps=steps))


def _product(code: Code, steps: Steps) -> None:
    lanes, words, width = code.lanes, steps.words, steps.finish.width
    task_rows = code["task_rows"]
    first = code.task * task_rows
    last = code["rows"] - 1
    copy_bytes = (words + GAP) * 4
    copy = code["copy"] + code.worker * (TASK_ROWS * copy_bytes)
    scratch_bytes = steps.finish.scratch_width * 4
    scratch = code["scratch"] + code.worker * (TASK_ROWS * scratch_bytes)

    def copy_row(local: Value) -> None:
        source, place = code["x"] + code.minimum(first + local, last) * (words * 4), copy + local * copy_bytes
        whole = words // lanes * lanes
        code.loop(0, whole, lanes, lambda k: code.store(code.load(source + k * 4, I32, lanes), place + k * 4))
        if whole < words:
            rest = words - whole
            code.store(code.load_first(source + whole * 4, I32, rest, lanes), place + whole * 4, rest)

    code.loop(0, task_rows, 1, copy_row)

    def column_block(column: Value, counts: Sequence[int]) -> None:
        weight = code["weight"] + column * (words * 4)

        def row_block(local: Value) -> None:
            values = copy + local * copy_bytes

            def multiply(k: Value, *totals: Value) -> Sequence[Value]:
                line = weight + k * (4 * COLUMNS)
                vectors = [code.load(line + 4 * lanes * n, I32, lanes) for n in range(len(counts))]  # [lanes] words
                made = []
                for r in range(ROWS):
                    x = code.splat(code.load(values + k * 4 + r * copy_bytes, I32))
                    made += [code.dot_int8(totals[r * len(counts) + n], x, w) for n, w in enumerate(vectors)]
                return made

            zero = code.constant(ir.VectorType(I32, lanes), 0)
            totals = code.loop(0, words, 1, multiply, *[zero] * (ROWS * len(counts)))
            for n, count in enumerate(counts):
                place = column + n * lanes
                bias, scale, total = (
                    code.load_first(code[name] + place * 4, F32, count, lanes)
                    for name in ("bias", "weight_scale", "weight_sum")
                )
                for r in range(ROWS):
                    there = code.minimum(first + local + r, last)
                    x_scale, x_zero = (
                        code.splat(code.load(code[name] + there * 4, F32)) for name in ("x_scale", "x_zero")
                    )
                    x = code.to_float(totals[r * len(counts) + n]) * scale - x_zero * total
                    x = code.fma(x, x_scale, bias)
                    if steps.activation is not None:
                        x = activated(code, x, steps.activation)
                    if steps.residual is not None:
                        x = x + load_states(code, "residual", steps.residual, there * width + place, count)
                    code.store(x, scratch + (local + r) * scratch_bytes + place * 4)

        code.loop(0, task_rows, ROWS, row_block)

    whole = width // COLUMNS * COLUMNS
    code.loop(0, whole, COLUMNS, lambda column: column_block(column, [lanes] * (COLUMNS // lanes)))
    if whole < width:
        column_block(code.number(whole), [min(lanes, width - begin) for begin in range(whole, width, lanes)])

    def finish_row(local: Value) -> None:
        finish(code, first + local, scratch + local * scratch_bytes, steps.finish)

    code.loop(0, code.minimum(code["rows"] - first, task_rows), 1, finish_row)
