"""linear_int8: a product of int8 rows and an int8 weight, and all that happens to its rows, on a CPU.

A task is up to `TASK_ROWS` rows of the product. They are copied side by side; then for `Vectors.columns` outputs at a
time their weights, of a block of `COLUMNS` or a part of it, meet `Int8.rows` rows after as many. A sum stays in its
int32 register until it is whole; then it is scaled, and goes through bias, activation and residual sum into the nearest
cache as float32. LayerNorm and the writing follow there, see `row_wise`.

Few rows are not enough tasks, and each thread would read all weights: there a task is `Vectors.columns` outputs of all
rows, and `row_wise` follows as a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import Activation
from fastbert.cpu.code import Code
from fastbert.cpu.int8 import COLUMNS, Int8Matrix, Int8Rows
from fastbert.cpu.linear import column_counts, in_columns
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import activated
from fastbert.cpu.memory import FLOAT32, Argument, PerWorker, room
from fastbert.cpu.program import Call, Kernel, compiled
from fastbert.cpu.row_wise import Finish, finish, load_states, row_wise
from fastbert.cpu.values import F32, I32, Value, fma, minimum, to_float

# Most rows of a task: a weight is read from the caches far away once for so many. A multiple of `Int8.rows`.
TASK_ROWS = 48
# Rows, a thread, up to which a task is some outputs of all rows.
FEW_ROWS = 32
# Words between two rows that are copied, beyond a row: rows of 1024 words would share one set of the nearest cache.
GAP = 16

PARAMETERS = (
    "x_values", "x_scale", "x_zero", "rows", "task_rows", "weight", "weight_scale", "weight_sum", "bias", "residual",
    "norm_weight", "norm_bias", "eps", "copy", "scratch", "out", "out_values", "out_scale", "out_zero",
)  # fmt: skip
FEW_PARAMETERS = (
    "x_values",
    "x_scale",
    "x_zero",
    "rows",
    "weight",
    "weight_scale",
    "weight_sum",
    "bias",
    "residual",
    "out",
)


class Steps(NamedTuple):
    """What the kernel is compiled for: its shapes and the steps it has."""

    words: int
    activation: Activation | None
    residual: torch.dtype | None
    finish: Finish


class FewSteps(NamedTuple):
    """The same of the kernel for few rows, and how many rows it takes at a time."""

    words: int
    width: int
    rows: int
    activation: Activation | None
    residual: torch.dtype | None


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
) -> list[Call]:
    """`x @ weight + bias`, then activation, + residual and LayerNorm, those that are asked for.

    Args:
        x: its width a multiple of 4.
        bias: float32 `[out]`.
        residual: contiguous `[rows, out]`, of a dtype of `machine.dtypes`.
        norm: LayerNorm's weight and bias, float32 `[out]`, and its eps.
        out: contiguous `[rows, out]` <- the result, if it is wanted; may be `residual` itself.
        out_int8: `[rows, out]` <- the result, quantized before it is rounded.
    """
    rows, width, words = x.values.shape[0], weight.scale.shape[0], weight.values.shape[1]
    threads = torch.get_num_threads()
    residual_dtype = None if residual is None else residual.dtype
    assert machine.int8 is not None
    read: dict[str, Argument] = {
        **x.arguments("x", rows, 4 * words),
        "rows": rows,
        **weight.arguments(words, width),
        "bias": (bias, FLOAT32, width),
        "residual": (residual, machine.dtypes, rows * width),
    }
    if 0 < rows <= FEW_ROWS * threads:
        product = room((rows, width), torch.float32)
        few = FewSteps(words, width, machine.int8.rows_at_once(rows), activation, residual_dtype)
        return [
            _few_kernel(machine, few)(
                -(-width // machine.vectors.columns), **read, out=(product, FLOAT32, rows * width)
            ),
            row_wise(machine, product, norm=norm, out=out, out_int8=out_int8),
        ]
    parts = Finish(width, norm is not None, None if out is None else out.dtype, out_int8 is not None)
    tasks = -(-max(rows, 1) // (TASK_ROWS * threads)) * threads  # as many for each thread
    task_rows = -(-max(rows, 1) // (tasks * machine.int8.rows)) * machine.int8.rows
    call = _kernel(machine, Steps(words, activation, residual_dtype, parts))(
        -(-rows // task_rows),
        **read,
        task_rows=task_rows,
        copy=PerWorker(TASK_ROWS * (words + GAP) * 4),
        scratch=PerWorker(TASK_ROWS * parts.scratch_width * 4),
        **parts.arguments(rows, norm, out),
        **parts.int8_arguments(rows, out_int8),
    )
    return [call]


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "linear_int8", PARAMETERS, partial(_product, steps=steps))


@cache
def _few_kernel(machine: Machine, steps: FewSteps) -> Kernel:
    return compiled(machine, "linear_int8_few", FEW_PARAMETERS, partial(_product_of_few, steps=steps))


def _multiply(
    code: Code,
    steps: Steps | FewSteps,
    column: Value,
    counts: Sequence[int],
    *,
    width: int,
    rows: int,
    first: Value,
    values: Value,
    values_bytes: int,
    out: Value,
    out_bytes: int,
) -> None:
    """A tile of the product and what is done to each of its numbers, into float32 at `out`.

    Args:
        column, counts: the first output, and how many there are in each vector.
        first, rows: the first row and how many there are; past the last one it is done again.
        values, out: where the first row's words and results are; values_bytes, out_bytes: from one row to the next.
    """
    assert code.machine.int8 is not None
    lanes, last, dot = code.lanes, code["rows"] - 1, code.machine.int8.dot
    weight = code["weight"] + (column // COLUMNS * (steps.words * COLUMNS) + column % COLUMNS) * 4

    def multiply(k: Value, *totals: Value) -> Sequence[Value]:
        line = weight + k * (4 * COLUMNS)
        vectors = [code.load(line + 4 * lanes * n, I32, lanes) for n in range(len(counts))]  # [lanes] words
        made = []
        for r in range(rows):
            x = code.splat(code.load(values + k * 4 + r * values_bytes, I32))
            made += [dot(totals[r * len(counts) + n], x, w) for n, w in enumerate(vectors)]
        return made

    totals = code.loop(0, steps.words, 1, multiply, *[code.vector(0, I32)] * (rows * len(counts)))
    for n, count in enumerate(counts):
        place = column + n * lanes
        bias, scale, total = (
            code.load_first(code[name] + place * 4, F32, count, lanes)
            for name in ("bias", "weight_scale", "weight_sum")
        )
        for r in range(rows):
            there = minimum(first + r, last)
            x_scale, x_zero = (code.splat(code.load(code[name] + there * 4, F32)) for name in ("x_scale", "x_zero"))
            x = to_float(totals[r * len(counts) + n]) * scale - x_zero * total
            x = fma(x, x_scale, bias)
            if steps.activation is not None:
                x = activated(code, x, steps.activation)
            if steps.residual is not None:
                x = x + load_states(code, "residual", steps.residual, there * width + place, count)
            code.store(x, out + r * out_bytes + place * 4, count)


def _product_of_few(code: Code, steps: FewSteps) -> None:
    columns = code.machine.vectors.columns

    def column_block(counts: Sequence[int]) -> None:
        def row_block(begin: Value) -> None:
            first = minimum(begin, code["rows"] - steps.rows)
            _multiply(
                code,
                steps,
                code.task * columns,
                counts,
                width=steps.width,
                rows=steps.rows,
                first=first,
                values=code["x_values"] + first * (steps.words * 4),
                values_bytes=steps.words * 4,
                out=code["out"] + first * (steps.width * 4),
                out_bytes=steps.width * 4,
            )

        code.loop(0, code["rows"], steps.rows, row_block)

    in_columns(code, code.task, columns, steps.width, column_block)


def _product(code: Code, steps: Steps) -> None:
    lanes, words, width = code.lanes, steps.words, steps.finish.width
    assert code.machine.int8 is not None
    columns = code.machine.vectors.columns
    task_rows, tile_rows = code["task_rows"], code.machine.int8.rows
    first = code.task * task_rows
    last = code["rows"] - 1
    copy_bytes = (words + GAP) * 4
    copy = code["copy"] + code.worker * (TASK_ROWS * copy_bytes)
    scratch_bytes = steps.finish.scratch_width * 4
    scratch = code["scratch"] + code.worker * (TASK_ROWS * scratch_bytes)

    def copy_row(local: Value) -> None:
        source, place = code["x_values"] + minimum(first + local, last) * (words * 4), copy + local * copy_bytes
        whole = words // lanes * lanes
        code.loop(0, whole, lanes, lambda k: code.store(code.load(source + k * 4, I32, lanes), place + k * 4))
        if whole < words:
            rest = words - whole
            code.store(code.load_first(source + whole * 4, I32, rest, lanes), place + whole * 4, rest)

    code.loop(0, task_rows, 1, copy_row)

    def column_block(column: Value, counts: Sequence[int]) -> None:
        def row_block(local: Value) -> None:
            _multiply(
                code,
                steps,
                column,
                counts,
                width=width,
                rows=tile_rows,
                first=first + local,
                values=copy + local * copy_bytes,
                values_bytes=copy_bytes,
                out=scratch + local * scratch_bytes,
                out_bytes=scratch_bytes,
            )

        code.loop(0, task_rows, tile_rows, row_block)

    whole = width // columns * columns
    code.loop(0, whole, columns, lambda column: column_block(column, column_counts(columns, lanes)))
    if whole < width:
        column_block(code.number(whole), column_counts(width - whole, lanes))

    def finish_row(local: Value) -> None:
        finish(code, first + local, scratch + local * scratch_bytes, steps.finish)

    code.loop(0, minimum(code["rows"] - first, task_rows), 1, finish_row)
