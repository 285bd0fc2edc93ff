"""linear_int8: a product of int8 rows and an int8 weight, and all that happens to its rows, on a CPU.

A task is up to `TASK_ROWS` rows of the product. They are copied side by side; then for `Vectors.columns` outputs at a
time their weights, of a block of `COLUMNS` or a part of it, meet `Int8.rows` rows after as many. A sum stays in its
int32 register until it is whole, or is made by `amx` where the machine has tiles; then it is scaled, and goes through
bias, activation and residual sum into the nearest cache as float32. LayerNorm and the writing follow there, see
`row_wise`.

Few rows are not enough tasks, and each thread would read all weights: there a task is `Vectors.columns` outputs of all
rows, and `row_wise` follows as a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import Activation
from fastbert.cpu import amx
from fastbert.cpu.code import Code, Sums
from fastbert.cpu.instructions import Int8
from fastbert.cpu.int8 import COLUMNS, Int8Matrix, Int8Rows
from fastbert.cpu.linear import Ahead, column_counts, in_columns, in_registers
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import activated
from fastbert.cpu.memory import FLOAT32, Argument, PerWorker, room
from fastbert.cpu.program import Call, Kernel, compiled
from fastbert.cpu.row_wise import Finish, finish, load_states, row_wise
from fastbert.cpu.values import F32, I32, Value, fma, minimum, select, to_float

# Most rows of a task: a weight is read from the caches far away once for so many. A multiple of `Int8.rows`, and filled
# up to one of `Tiles.rows`.
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
    "threads",
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
    made_by = machine.int8.tiles or machine.int8
    read: dict[str, Argument] = {
        **x.arguments("x", rows, 4 * words),
        "rows": rows,
        **weight.arguments(words, width),
        "bias": (bias, FLOAT32, width),
        "residual": (residual, machine.dtypes, rows * width),
    }
    if 0 < rows <= FEW_ROWS * threads:
        product = room((rows, width), torch.float32)
        few = FewSteps(words, width, made_by.rows_at_once(rows), activation, residual_dtype)
        return [
            _few_kernel(machine, few)(
                -(-width // machine.vectors.columns),
                **read,
                threads=threads,
                out=(product, FLOAT32, rows * width),
                **_sums_memory(machine, few.rows, words),
            ),
            row_wise(machine, product, norm=norm, out=out, out_int8=out_int8),
        ]
    parts = Finish(width, norm is not None, None if out is None else out.dtype, out_int8 is not None)
    tasks = -(-max(rows, 1) // (TASK_ROWS * threads)) * threads  # as many for each thread
    task_rows = -(-max(rows, 1) // (tasks * made_by.rows)) * made_by.rows
    most = _most_rows(machine.int8)
    call = _kernel(machine, Steps(words, activation, residual_dtype, parts))(
        -(-rows // task_rows),
        **read,
        task_rows=task_rows,
        copy=PerWorker(most * (words + GAP) * 4),
        scratch=PerWorker(most * parts.scratch_width * 4),
        **parts.arguments(rows, norm, out),
        **parts.int8_arguments(rows, out_int8),
        **_sums_memory(machine, made_by.rows, words),
    )
    return [call]


def _most_rows(int8: Int8) -> int:
    """`TASK_ROWS`, filled up to whole blocks."""
    rows = (int8.tiles or int8).rows
    return -(-TASK_ROWS // rows) * rows


def _block(machine: Machine, rows: int, words: int) -> amx.Block | None:
    """What is made at a time by tiles; None where it is by vectors."""
    tiles = machine.tiles(torch.int8)
    return None if tiles is None else amx.Block.of(tiles, rows, words, max(words // amx.WORDS, 1) * amx.WORDS)


def _sums_memory(machine: Machine, rows: int, words: int) -> dict[str, Argument]:
    block = _block(machine, rows, words)
    return {} if block is None else {"sums": PerWorker(block.bytes)}


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    parameters = PARAMETERS if machine.tiles(torch.int8) is None else (*PARAMETERS, "sums")
    return compiled(machine, "linear_int8", parameters, partial(_product, steps=steps))


@cache
def _few_kernel(machine: Machine, steps: FewSteps) -> Kernel:
    parameters = FEW_PARAMETERS if machine.tiles(torch.int8) is None else (*FEW_PARAMETERS, "sums")
    return compiled(machine, "linear_int8_few", parameters, partial(_product_of_few, steps=steps))


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
    fetch: Callable[[Value], None],
) -> None:
    """A tile of the product and what is done to each of its numbers, into float32 at `out`.

    Args:
        column, counts: the first output, and how many there are in each vector.
        first, rows: the first row and how many there are; past the last one it is done again.
        values, out: where the first row's words and results are; values_bytes, out_bytes: from one row to the next.
        fetch: see `linear.Ahead`.
    """
    lanes, last, tiles = code.lanes, code["rows"] - 1, _block(code.machine, rows, steps.words)
    weight = code["weight"] + (column // COLUMNS * (steps.words * COLUMNS) + column % COLUMNS) * 4
    if tiles is None:
        sums = _sums(code, values, values_bytes, weight, steps.words, rows, len(counts), fetch)
    else:
        sums = amx.sums(code, tiles, values, values_bytes, weight, len(counts), I32)

    def follow(n: int, count: int) -> None:
        place = column + n * lanes
        bias, scale, total = (
            code.load_first(code[name] + place * 4, F32, count, lanes)
            for name in ("bias", "weight_scale", "weight_sum")
        )

        def write(r: Value | int, whole: Value) -> None:
            there = minimum(first + r, last)
            x_scale, x_zero = (code.splat(code.load(code[name] + there * 4, F32)) for name in ("x_scale", "x_zero"))
            x = to_float(whole) * scale - x_zero * total
            x = fma(x, x_scale, bias)
            if steps.activation is not None:
                x = activated(code, x, steps.activation)
            if steps.residual is not None:
                x = x + load_states(code, "residual", steps.residual, there * width + place, count)
            code.store(x, out + r * out_bytes + place * 4, count)

        sums(n, write)

    for n, count in enumerate(counts):
        follow(n, count)


def _sums(
    code: Code,
    values: Value,
    values_bytes: int,
    weight: Value,
    words: int,
    rows: int,
    count: int,
    fetch: Callable[[Value], None],
) -> Sums:
    """In registers: of so many rows from `values` on and `count` vectors of outputs, their weights from `weight` on."""
    assert code.machine.int8 is not None
    lanes, dot = code.lanes, code.machine.int8.dot

    def multiply(k: Value, *totals: Value) -> Sequence[Value]:
        line = weight + k * (4 * COLUMNS)
        vectors = [code.load(line + 4 * lanes * n, I32, lanes) for n in range(count)]  # [lanes] words
        fetch(k)
        made = []
        for r in range(rows):
            x = code.splat(code.load(values + k * 4 + r * values_bytes, I32))
            made += [dot(totals[r * count + n], x, w) for n, w in enumerate(vectors)]
        return made

    return in_registers(rows, count, code.loop(0, words, 1, multiply, *[code.vector(0, I32)] * (rows * count)))


def _ahead(code: Code, column: Value, words: int, row_blocks: Value) -> Ahead:
    """What is fetched while so many blocks of rows are multiplied, for those outputs from `column` on that come next.

    Where a block of outputs is the work of several tasks, it is the same bytes that these fetch together.
    """
    return Ahead(code["weight"] + column * (4 * words), words, 4 * code.machine.vectors.columns, row_blocks)


def _product_of_few(code: Code, steps: FewSteps) -> None:
    columns, tiles = code.machine.vectors.columns, _block(code.machine, steps.rows, steps.words)
    row_blocks = (code["rows"] + (steps.rows - 1)) // steps.rows
    ahead = _ahead(code, (code.task + code["threads"]) * columns, steps.words, row_blocks)

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
                fetch=ahead.beside(code, begin // steps.rows),
            )

        code.loop(0, code["rows"], steps.rows, row_block)

    def task() -> None:
        in_columns(code, code.task, columns, steps.width, column_block)

    task() if tiles is None else amx.task(code, tiles, task)


def _product(code: Code, steps: Steps) -> None:
    lanes, words, width = code.lanes, steps.words, steps.finish.width
    assert code.machine.int8 is not None
    columns = code.machine.vectors.columns
    task_rows, tile_rows = code["task_rows"], (code.machine.int8.tiles or code.machine.int8).rows
    tiles, most = _block(code.machine, tile_rows, words), _most_rows(code.machine.int8)
    first = code.task * task_rows
    last = code["rows"] - 1
    copy_bytes = (words + GAP) * 4
    copy = code["copy"] + code.worker * (most * copy_bytes)
    scratch_bytes = steps.finish.scratch_width * 4
    scratch = code["scratch"] + code.worker * (most * scratch_bytes)

    def copy_row(local: Value) -> None:
        source, place = code["x_values"] + minimum(first + local, last) * (words * 4), copy + local * copy_bytes
        whole = words // lanes * lanes
        code.loop(0, whole, lanes, lambda k: code.store(code.load(source + k * 4, I32, lanes), place + k * 4))
        if whole < words:
            rest = words - whole
            code.store(code.load_first(source + whole * 4, I32, rest, lanes), place + whole * 4, rest)

    code.loop(0, task_rows, 1, copy_row)

    def column_block(column: Value, counts: Sequence[int]) -> None:
        following = column + columns
        following = select(following < width, following, code.number(0))  # of the next task
        ahead = _ahead(code, following, words, task_rows // tile_rows)

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
                fetch=ahead.beside(code, local // tile_rows),
            )

        code.loop(0, task_rows, tile_rows, row_block)

    def all_columns() -> None:
        whole = width // columns * columns
        code.loop(0, whole, columns, lambda column: column_block(column, column_counts(columns, lanes)))
        if whole < width:
            column_block(code.number(whole), column_counts(width - whole, lanes))

    all_columns() if tiles is None else amx.task(code, tiles, all_columns)

    def finish_row(local: Value) -> None:
        finish(code, first + local, scratch + local * scratch_bytes, steps.finish)

    code.loop(0, minimum(code["rows"] - first, task_rows), 1, finish_row)
