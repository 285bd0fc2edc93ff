"""linear: a product with bias, activation and residual sum, on a CPU, in float32 or bfloat16.

A task is `Vectors.columns` outputs of a group of rows: as many as half of a second cache holds, so that the tasks of a
group find them there. The weights of a task lie together and meet up to `Vectors.rows` rows at a time; a sum stays in
its register until it is whole. bfloat16 is multiplied by pairs, into float32; by `amx` where the machine has tiles.
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
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import activated
from fastbert.cpu.memory import Argument, PerWorker
from fastbert.cpu.program import Call, Kernel, compiled
from fastbert.cpu.row_wise import load_states
from fastbert.cpu.values import F32, I32, Value, minimum, select, to_bfloat16

# Words whose products are summed before that sum joins the others, so that rounding grows no faster than in a BLAS.
CHUNK = 384

LINE = 64  # bytes that a cache fetches at once

PARAMETERS = ("x", "rows", "group_rows", "weight", "tasks", "threads", "bias", "residual", "out")


class Ahead(NamedTuple):
    """Weights that are fetched while rows meet those before them.

    An equal share of them is, beside each word of each block of rows, so that the memory is asked all the time: it is
    too slow to bring them while the first rows wait for them.

    Attributes:
        begin: where they are: as many words of as many outputs as one block of rows meets.
        words, word_bytes: how many, and how long each is.
        blocks: of rows that meet the weights before them.
    """

    begin: Value
    words: int
    word_bytes: int
    blocks: Value

    def beside(self, code: Code, block: Value) -> Callable[[Value], None]:
        """What is to be called with each word's number while a block of rows, of this number, is multiplied."""
        begin = self.begin + block * (self.words * self.word_bytes) // self.blocks
        share = (self.blocks + (self.word_bytes - 1)) // self.blocks  # rounded up

        def fetch(k: Value) -> None:
            for line in range(0, self.word_bytes, LINE):
                code.prefetch(begin + k * share + line)

        return fetch


class Steps(NamedTuple):
    """What the kernel is compiled for: its shapes and the steps it has."""

    dtype: torch.dtype
    words: int
    width: int
    rows: int
    activation: Activation | None
    residual: bool

    def block(self, machine: Machine) -> amx.Block | None:
        """What is made at a time by tiles; None where it is by vectors."""
        tiles = machine.tiles(self.dtype)
        return None if tiles is None else amx.Block.of(tiles, self.rows, self.words, CHUNK)


def linear(
    machine: Machine,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Call:
    """`x @ weight^T + bias`, then activation and + residual, those that are asked for.

    Args:
        x: contiguous `[rows, in]`, of a dtype of `machine.dtypes`; a row is whole words.
        weight: `layout.in_blocks` of `Vectors.columns`, in the dtype of x.
        bias: contiguous `[out]`, in the dtype of x.
        out: contiguous `[rows, out]`, in the dtype of x <- the result; not the residual itself.
        residual: contiguous `[rows, out]`, in the dtype of x.
    """
    (rows, width), (blocks, words, *_) = out.shape, weight.shape
    vectors, dtypes = machine.vectors, (x.dtype,)
    most = (machine.tiles(x.dtype) or vectors).rows
    at_once = most if rows >= most else 1 << (max(rows, 1).bit_length() - 1)
    group_rows = max(vectors.group_bytes // (4 * words * at_once), 1) * at_once
    steps = Steps(x.dtype, words, width, at_once, activation, residual is not None)
    block = steps.block(machine)
    sums: dict[str, Argument] = {} if block is None else {"sums": PerWorker(block.bytes)}
    tasks = -(-rows // group_rows) * blocks
    return _kernel(machine, steps)(
        tasks,
        x=(x, machine.dtypes, rows * words * 4 // x.itemsize),
        rows=rows,
        group_rows=group_rows,
        weight=(weight, dtypes, -(-width // vectors.columns) * words * vectors.columns * 4 // x.itemsize),
        tasks=tasks,
        threads=torch.get_num_threads(),
        bias=(bias, dtypes, width),
        residual=(residual, dtypes, rows * width),
        out=(out, dtypes, rows * width),
        **sums,
    )


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    parameters = PARAMETERS if steps.block(machine) is None else (*PARAMETERS, "sums")
    return compiled(machine, "linear", parameters, partial(_product, steps=steps))


def _product(code: Code, steps: Steps) -> None:
    lanes, columns, words, width = code.lanes, code.machine.vectors.columns, steps.words, steps.width
    bfloat16, tiles = steps.dtype == torch.bfloat16, steps.block(code.machine)
    blocks = -(-width // columns)
    block = code.task % blocks
    column = block * columns
    weight = code["weight"] + block * (words * 4 * columns)
    first = (code.task // blocks) * code["group_rows"]
    last = minimum(first + code["group_rows"], code["rows"])
    # What is fetched is for this thread's next task; past the last one it is of the matrix that lies behind this one.
    following = code.task + code["threads"]
    next_block = select(following < code["tasks"], following % blocks, block + code["threads"])
    row_blocks = (last - first + (steps.rows - 1)) // steps.rows
    ahead = Ahead(code["weight"] + next_block * (words * 4 * columns), words, 4 * columns, row_blocks)

    def column_block(counts: Sequence[int]) -> None:
        def row_block(begin: Value) -> None:
            row = minimum(begin, code["rows"] - steps.rows)  # the last block goes over some rows again
            x = code["x"] + row * (words * 4)
            if steps.residual:
                for r in range(steps.rows):
                    for line in range(0, steps.dtype.itemsize * sum(counts), LINE):
                        code.prefetch(code["residual"] + ((row + r) * width + column) * steps.dtype.itemsize + line)

            if tiles is None:
                fetch = ahead.beside(code, (begin - first) // steps.rows)
                sums = _sums(code, steps, x, weight, len(counts), fetch)
            else:
                sums = amx.sums(code, tiles, x, words * 4, weight, len(counts), F32)
            for n in range(len(counts)):
                follow(sums, n, row)

        def follow(sums: Sums, n: int, row: Value) -> None:
            bias = load_states(code, "bias", steps.dtype, column + n * lanes, counts[n])

            def write(r: Value | int, total: Value) -> None:
                place = (row + r) * width + column + n * lanes
                total = total + bias
                if steps.activation is not None:
                    total = activated(code, total, steps.activation, coarse=bfloat16)
                if steps.residual:
                    total = total + load_states(code, "residual", steps.dtype, place, counts[n])
                total = to_bfloat16(total) if bfloat16 else total
                code.store(total, code["out"] + place * steps.dtype.itemsize, counts[n])

            sums(n, write)

        code.loop(first, last, steps.rows, row_block)

    def task() -> None:
        in_columns(code, block, columns, width, column_block)

    task() if tiles is None else amx.task(code, tiles, task)


def _sums(code: Code, steps: Steps, x: Value, weight: Value, count: int, fetch: Callable[[Value], None]) -> Sums:
    """In registers: of `steps.rows` rows from `x` on and so many vectors of outputs, their weights from `weight` on."""
    lanes, columns, dot = code.lanes, code.machine.vectors.columns, code.dot(steps.dtype)
    word = I32 if steps.dtype == torch.bfloat16 else F32

    def multiply(k: Value, *totals: Value) -> Sequence[Value]:
        line = weight + k * (4 * columns)
        vectors = [code.load(line + 4 * lanes * n, word, lanes) for n in range(count)]  # [lanes] words
        fetch(k)
        made = []
        for r in range(steps.rows):
            value = code.splat(code.load(x + k * 4 + r * (steps.words * 4), word))
            made += [dot(totals[r * count + n], value, vector) for n, vector in enumerate(vectors)]
        return made

    zeros = [code.vector()] * (steps.rows * count)

    def add_chunk(begin: Value, *totals: Value) -> Sequence[Value]:
        parts = code.loop(begin, minimum(begin + CHUNK, steps.words), 1, multiply, *zeros)
        return [total + part for total, part in zip(totals, parts, strict=True)]

    return in_registers(steps.rows, count, code.loop(0, steps.words, CHUNK, add_chunk, *zeros))


def in_registers(rows: int, count: int, totals: Sequence[Value]) -> Sums:
    """Sums of rows that have `count` vectors each, row after row."""

    def over_rows(n: int, body: Callable[[Value | int, Value], None]) -> None:
        for r in range(rows):
            body(r, totals[r * count + n])

    return over_rows


def in_columns(code: Code, block: Value, columns: int, width: int, body: Callable[[Sequence[int]], None]) -> None:
    """`body(counts)` for a block of `columns` of `width` outputs; the last block may have less."""
    whole, rest = divmod(width, columns)
    code.when(block < whole, lambda: body(column_counts(columns, code.lanes)))
    if rest:
        code.when(code.number(whole - 1) < block, lambda: body(column_counts(rest, code.lanes)))


def column_counts(width: int, lanes: int) -> list[int]:
    """How many numbers there are in each vector of so many outputs."""
    return [min(lanes, width - n) for n in range(0, width, lanes)]
