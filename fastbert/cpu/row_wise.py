"""row_wise: all that happens to a row in one pass over it, on a CPU.

    x -> + bias -> activation -> times a gate -> dropout -> + residual -> LayerNorm -> as floats, as int8, or as both

Each step is there or not. A gate is the second half of x, which is twice as wide where there is one. A row is read once
and kept as float32 in the nearest cache until it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import Activation
from fastbert.cpu.code import Code
from fastbert.cpu.dropout import PARAMETERS as DROPOUT_PARAMETERS
from fastbert.cpu.dropout import Draws, drop_arguments
from fastbert.cpu.instructions import MOST_LANES
from fastbert.cpu.int8 import Int8Rows
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import activated
from fastbert.cpu.memory import FLOAT32, Argument, PerWorker
from fastbert.cpu.program import Call, Kernel, compiled, float_bits
from fastbert.cpu.values import (
    F32,
    I16,
    Value,
    first_lanes,
    fma,
    from_bfloat16,
    greatest_lane,
    least_lane,
    maximum,
    maximum_or_nan,
    minimum,
    nearest,
    select,
    sqrt,
    sum_of_lanes,
    to_bfloat16,
    to_int8,
)
from fastbert.reference import Dropout

# Rows of a task: few enough to share out, enough to be worth the asking for the next.
ROWS = 16

# Vectors of a row that are worked on at once, with sums of their own, so that none waits for another; a power of 2.
CHAINS = 4

# Of a column and how many numbers a vector has there: the vector.
Reader = Callable[[Value, int], Value]

PARAMETERS = (
    "x", "rows", "bias", "residual", "norm_weight", "norm_bias", "eps", "scratch", "out", "out_values", "out_scale",
    "out_zero",
)  # fmt: skip


def filled_up(width: int) -> int:
    """A row's numbers and as many more as make whole vectors."""
    return -(-width // MOST_LANES) * MOST_LANES


class Finish(NamedTuple):
    """What comes of a row of float32: LayerNorm or not, and in what it is written, floats or int8 or both."""

    width: int
    norm: bool
    out: torch.dtype | None
    int8: bool

    @property
    def scratch_width(self) -> int:
        """float32 of a row, filled up to whole vectors."""
        return filled_up(self.width)

    def arguments(
        self, rows: int, norm: tuple[Tensor, Tensor, float] | None, out: Tensor | None
    ) -> dict[str, Argument]:
        """What `finish` reads, and what it writes in floats."""
        weight, bias, eps = norm or (None, None, 0.0)
        return {
            "norm_weight": (weight, FLOAT32, self.width),
            "norm_bias": (bias, FLOAT32, self.width),
            "eps": float_bits(eps),
            "out": (out, () if self.out is None else (self.out,), rows * self.width),
        }

    def int8_arguments(self, rows: int, out: Int8Rows | None) -> dict[str, Argument]:
        """What `finish` writes in int8."""
        if out is None:
            return {"out_values": None, "out_scale": None, "out_zero": None}
        return out.arguments("out", rows, self.width)


class Steps(NamedTuple):
    """What the kernel is compiled for: the steps it has."""

    x: torch.dtype
    bias: bool
    activation: Activation | None
    gated: bool
    dropout: bool
    residual: torch.dtype | None
    finish: Finish


def row_wise(
    machine: Machine,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    out_int8: Int8Rows | None = None,
) -> Call:
    """The steps that are asked for, row by row.

    Args:
        x: contiguous `[rows, width]`, where `gated` `[rows, 2 * width]`, of a dtype of `machine.dtypes`.
        bias: float32, as wide as x.
        activation, gated: of x, or of its first half, which is multiplied by the second.
        dropout: of a hidden state.
        residual: contiguous `[rows, width]`, of a dtype of `machine.dtypes`.
        norm: LayerNorm's weight and bias, float32 `[width]`, and its eps.
        out: contiguous `[rows, width]` <- the result, if it is wanted; may be `residual` itself, and `x` if not gated.
        out_int8: `[rows, width]` <- the result in 255 steps that span each row and 0, quantized before it is rounded.
    """
    rows, halves = len(x), 2 if gated else 1
    width = x.shape[1] // halves
    parts = Finish(width, norm is not None, None if out is None else out.dtype, out_int8 is not None)
    added = None if residual is None else residual.dtype
    steps = Steps(x.dtype, bias is not None, activation, gated, dropout is not None, added, parts)
    return _kernel(machine, steps)(
        -(-rows // ROWS),
        x=(x, machine.dtypes, rows * halves * width),
        rows=rows,
        bias=(bias, FLOAT32, halves * width),
        residual=(residual, machine.dtypes, rows * width),
        scratch=PerWorker(parts.scratch_width * 4),
        **parts.arguments(rows, norm, out),
        **parts.int8_arguments(rows, out_int8),
        **drop_arguments(dropout),
    )


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    parameters = PARAMETERS + DROPOUT_PARAMETERS if steps.dropout else PARAMETERS
    return compiled(machine, "row_wise", parameters, partial(_rows, steps=steps))


def _rows(code: Code, steps: Steps) -> None:
    width = steps.finish.width
    hidden = Draws(code, code.number(0), code.number(0)) if steps.dropout else None

    def read_x(row: Value, column: Value, count: int) -> Value:
        x = load_states(code, "x", steps.x, row * (2 * width if steps.gated else width) + column, count)
        return x + code.load_first(code["bias"] + column * 4, F32, count, code.lanes) if steps.bias else x

    def reader(row: Value) -> Reader:
        draws = None if hidden is None else hidden.of(row)

        def read(column: Value, count: int) -> Value:
            x = read_x(row, column, count)
            if steps.activation is not None:
                x = activated(code, x, steps.activation)
            if steps.gated:
                x = x * read_x(row, column + width, count)
            if draws is not None:
                x = draws.kept(x, column)
            if steps.residual is not None:
                x = x + load_states(code, "residual", steps.residual, row * width + column, count)
            return x

        return read

    over_rows(code, steps.finish, reader)


def over_rows(code: Code, steps: Finish, reader: Callable[[Value], Reader]) -> None:
    """A task of `ROWS` rows: what `reader(row)` gives of each goes into "scratch" of this worker, and is finished."""
    first = code.task * ROWS
    scratch = code["scratch"] + code.worker * (steps.scratch_width * 4)

    def row_of(row: Value) -> None:
        total = keep(code, steps.width, reader(row), scratch)
        finish(code, row, scratch, steps, total)

    code.loop(first, minimum(first + ROWS, code["rows"]), 1, row_of)


def keep(code: Code, width: int, read: Reader, scratch: Value) -> Value:
    """Put what is read into float32 `[width]` at `scratch`; a vector whose lanes sum up to what the row does."""

    def one(column: Value, count: int, total: Value) -> Sequence[Value]:
        x = read(column, count)
        code.store(x, scratch + column * 4)
        return [total + first_lanes(x, count)]

    return folded(code, width, one, [code.vector()], [added])[0]


def over_columns(code: Code, width: int, body: Callable[[Value, int], None]) -> None:
    """`body(column, count)` for each vector of columns; only the last may have less than `lanes`."""

    def and_carry_nothing(column: Value, count: int) -> Sequence[Value]:
        body(column, count)
        return ()

    folded(code, width, and_carry_nothing, [], [])


def load_states(code: Code, name: str, dtype: torch.dtype, place: Value, count: int) -> Value:
    """float32 of the first `count` elements from number `place` on of an argument, the other lanes 0."""
    start = code[name] + place * dtype.itemsize
    if dtype == torch.bfloat16:
        return from_bfloat16(code.load_first(start, I16, count, code.lanes))
    return code.load_first(start, F32, count, code.lanes)


def store_states(code: Code, x: Value, name: str, dtype: torch.dtype, place: Value, count: int) -> None:
    """Write the first `count` of float32 to an argument, from its element number `place` on, rounded to its dtype."""
    rounded = to_bfloat16(x) if dtype == torch.bfloat16 else x
    code.store(rounded, code[name] + place * dtype.itemsize, count)


def finish(code: Code, row: Value, scratch: Value, steps: Finish, total: Value | None = None) -> None:
    """From the float32 `[width]` at `scratch`: reads norm_weight, norm_bias and eps, writes out, and those of int8.

    Args:
        total: what `keep` gave, where that put them there.
    """
    width, read = steps.width, kept_at(code, scratch)
    if steps.norm:
        read = _normed(code, scratch, width, total)
    if steps.out is not None:
        out = steps.out

        def write(column: Value, count: int) -> None:
            x = read(column, count)
            if steps.int8:
                code.store(x, scratch + column * 4)
            store_states(code, x, "out", out, row * width + column, count)

        over_columns(code, width, write)
        read = kept_at(code, scratch)
    if steps.int8:
        _quantize(code, row, width, read, scratch)


def kept_at(code: Code, scratch: Value) -> Reader:
    """Reads the float32 of a row at `scratch`; lanes past those that are asked for are 0."""
    return lambda column, count: first_lanes(code.load(scratch + column * 4, F32, code.lanes), count)


def centre(code: Code, scratch: Value, width: int, total: Value | None = None) -> tuple[Reader, Value]:
    """Of the float32 `[width]` at `scratch`: what reads them less their mean, and a vector of rstd; reads eps.

    Args:
        total: as in `finish`.
    """
    kept = kept_at(code, scratch)

    def mean_of(total: Value) -> Value:
        return code.splat(sum_of_lanes(total) / width)

    def add(column: Value, count: int, total: Value) -> Sequence[Value]:
        return [total + kept(column, count)]

    [total] = folded(code, width, add, [code.vector()], [added]) if total is None else [total]
    mean = mean_of(total)

    def add_with_squares(column: Value, count: int, total: Value, squares: Value) -> Sequence[Value]:
        x = first_lanes(kept(column, code.lanes) - mean, count)
        return [total + x, fma(x, x, squares)]

    # The mean again of what is left: a row of one value leaves a few of its ulps, all the same, which then go exactly.
    # An eps of 1e-12 would make them 0.1 and more.
    rest, squares = map(mean_of, folded(code, width, add_with_squares, [code.vector()] * 2, [added] * 2))
    variance = maximum_or_nan(fma(-rest, rest, squares), 0.0)
    rstd = code.vector(1.0) / sqrt(variance + code.splat(code.float_of("eps")))
    return lambda column, count: first_lanes(kept(column, code.lanes) - mean - rest, count), rstd


def _normed(code: Code, scratch: Value, width: int, total: Value | None) -> Reader:
    """Reads LayerNorm of the float32 `[width]` at `scratch`."""
    centred, rstd = centre(code, scratch, width, total)

    def read(column: Value, count: int) -> Value:
        weight, bias = (
            code.load_first(code[name] + column * 4, F32, count, code.lanes) for name in ("norm_weight", "norm_bias")
        )
        return fma(centred(column, count) * rstd, weight, bias)

    return read


def folded(
    code: Code,
    width: int,
    body: Callable[..., Sequence[Value]],
    starts: Sequence[Value],
    merges: Sequence[Callable[[Value, Value], Value]],
) -> list[Value]:
    """`body(column, count, *carried)`, which gives the next `carried`, for each vector of columns; the last of them.

    Only the last vector may have less than `lanes`. What is carried goes from each vector to the one `CHAINS` after it.

    Args:
        starts: what is carried, before the first vector of each chain.
        merges: of each what makes one of what two chains end with.
    """
    lanes, count = code.lanes, len(starts)
    at_once = CHAINS * lanes

    def of_chain(chain: int) -> slice:
        return slice(chain * count, (chain + 1) * count)

    def several(column: Value, *states: Value) -> Sequence[Value]:
        made: list[Value] = []
        for chain in range(CHAINS):
            made += body(column + chain * lanes, lanes, *states[of_chain(chain)])
        return made

    whole = width // at_once * at_once
    states = code.loop(0, whole, at_once, several, *[*starts] * CHAINS) if whole else [*starts] * CHAINS
    for chain, column in enumerate(range(whole, width, lanes)):
        made = body(code.number(column), min(lanes, width - column), *states[of_chain(chain)])
        states[of_chain(chain)] = made
    chains = [states[of_chain(chain)] for chain in range(CHAINS)]
    while len(chains) > 1:
        half = len(chains) // 2
        chains = [
            [merge(a, b) for merge, a, b in zip(merges, *two, strict=True)]
            for two in zip(chains[:half], chains[half:], strict=True)
        ]
    return chains[0]


def added(a: Value, b: Value) -> Value:
    """Their sum."""
    return a + b


def _quantize(code: Code, row: Value, width: int, read: Reader, scratch: Value) -> None:
    """The float32 that `read` gives, once, for each column; `scratch` may be where it reads them."""

    def span(column: Value, count: int, lowest: Value, highest: Value, nothing: Value) -> Sequence[Value]:
        x = read(column, count)
        code.store(x, scratch + column * 4)
        return [minimum(lowest, x), maximum(highest, x), fma(x, 0.0, nothing)]

    merges = minimum, maximum, added
    # from 0 on: each row can hold it
    lowest, highest, nothing = folded(code, width, span, [code.vector()] * 3, merges)
    low, high = least_lane(lowest), greatest_lane(highest)
    step = (high - low) / 255.0
    # `nothing` is NaN where the row has one, or an infinity: the least and the greatest pass over NaN.
    step = select(step < 1e-30, code.scalar(1.0), step) + sum_of_lanes(nothing)
    zero = nearest(-low / step)
    code.store(step, code["out_scale"] + row * 4)
    code.store(zero, code["out_zero"] + row * 4)
    inverse, shift = code.splat(code.scalar(1.0) / step), code.splat(zero)
    kept = kept_at(code, scratch)

    def write(column: Value, count: int) -> None:
        whole = nearest(fma(kept(column, code.lanes), inverse, shift))
        whole = maximum(minimum(whole, 255.0), 0.0)
        code.store(to_int8(whole), code["out_values"] + row * width + column, count)

    over_columns(code, width, write)
