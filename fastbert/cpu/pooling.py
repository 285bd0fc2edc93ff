"""pool on a CPU: one vector a sequence, its first row, or the mean or the maximum of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.cpu.code import Code
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import FLOAT32, INT32
from fastbert.cpu.program import Call, Kernel, compiled
from fastbert.cpu.row_wise import added, folded, load_states, over_columns
from fastbert.cpu.values import (
    F32,
    I32,
    Value,
    first_lanes,
    fma,
    maximum_or_nan,
    minimum,
    select,
    sqrt,
    sum_of_lanes,
    to_float,
    widened,
)
from fastbert.reference import Pooling

# Rows whose sum is made before it joins the others, so that rounding grows with the root of a long sequence at most.
CHUNK = 32

PARAMETERS = ("x", "cu_seqlens", "out")


class Steps(NamedTuple):
    """What the kernel is compiled for."""

    dtype: torch.dtype
    width: int
    how: Pooling
    normalise: bool


def pool_forward(
    machine: Machine, x: Tensor, cu_seqlens: Tensor, out: Tensor, *, how: Pooling, normalise: bool
) -> Call:
    """See `ops.pooling.pool`.

    Args:
        x: contiguous `[rows, width]`, of a dtype of `machine.dtypes`.
        cu_seqlens: int32 `[batch + 1]`.
        out: contiguous float32 `[batch, width]` <- the result.
    """
    batch = len(cu_seqlens) - 1
    return _kernel(machine, Steps(x.dtype, x.shape[1], how, normalise))(
        batch,
        x=(x, machine.dtypes, x.numel()),
        cu_seqlens=(cu_seqlens, INT32, batch + 1),
        out=(out, FLOAT32, batch * x.shape[1]),
    )


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "pool_forward", PARAMETERS, partial(_pool, steps=steps))


def _pool(code: Code, steps: Steps) -> None:
    width = steps.width
    first, end = (widened(code.load(code["cu_seqlens"] + (code.task + i) * 4, I32)) for i in range(2))
    length = end - first
    out = code["out"] + code.task * (width * 4)

    def total(column: Value, count: int, end: Value) -> Value:
        def add(row: Value, total: Value) -> Sequence[Value]:
            return [total + load_states(code, "x", steps.dtype, row * width + column, count)]

        def add_chunk(begin: Value, total: Value) -> Sequence[Value]:
            return [total + code.loop(begin, minimum(begin + CHUNK, end), 1, add, code.vector())[0]]

        return code.loop(first, end, CHUNK, add_chunk, code.vector())[0]

    def greatest(column: Value, count: int) -> Value:
        def compare(row: Value, greatest: Value) -> Sequence[Value]:
            return [maximum_or_nan(greatest, load_states(code, "x", steps.dtype, row * width + column, count))]

        vector = code.loop(first, end, 1, compare, code.vector(-math.inf))[0]
        return first_lanes(select(length < 1, 0.0, vector), count)

    def pooled(column: Value, count: int, squares: Value) -> Sequence[Value]:
        match steps.how:
            case "cls":
                vector = total(column, count, first + minimum(length, 1))
            case "mean":
                vector = total(column, count, end) / code.splat(to_float(select(length < 1, 1, length)))
            case "max":
                vector = greatest(column, count)
        code.store(vector, out + column * 4, count)
        return [fma(vector, vector, squares)]

    [squares] = folded(code, width, pooled, [code.vector()], [added])
    if steps.normalise:
        norm = maximum_or_nan(sqrt(sum_of_lanes(squares)), 1e-12)
        divisor = code.splat(norm)

        def divide(column: Value, count: int) -> None:
            vector = code.load_first(out + column * 4, F32, count, code.lanes)
            code.store(vector / divisor, out + column * 4, count)

        over_columns(code, width, divide)
