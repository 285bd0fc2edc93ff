"""The gradients of what `row_wise` makes of rows, on a CPU: of GELU, and of LayerNorm after a residual sum.

    layer_norm_backward    x + bias + residual  ->  statistics, as the forward made them  ->  dx, and sums over rows
    bias_gelu_backward     x + bias             ->  dout times GELU's slope               ->  dx, and sums over rows

A row is read once. Sums over rows are made for each task and added up after the last, so that their bits do not depend
on which thread took which task.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import Activation
from fastbert.cpu.code import Code
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import activated, gelu_slope
from fastbert.cpu.memory import FLOAT32, PerWorker, room
from fastbert.cpu.program import Kernel, compiled, float_bits
from fastbert.cpu.row_wise import (
    added,
    centre,
    filled_up,
    folded,
    keep,
    kept_at,
    load_states,
    over_columns,
    store_states,
)
from fastbert.cpu.values import F32, Value, first_lanes, fma, minimum, sum_of_lanes
from fastbert.reference import Approximate

# Rows of a task: what it writes of its sums is little beside them.
ROWS = 64

LAYER_NORM_PARAMETERS = (
    "x", "rows", "bias", "residual", "norm_weight", "eps", "dout", "scratch", "dx", "sums",
)  # fmt: skip
BIAS_GELU_PARAMETERS = ("x", "rows", "bias", "dout", "dx", "sums")


class LayerNormSteps(NamedTuple):
    """What the kernel is compiled for: dtypes of x, the residual and the gradients."""

    width: int
    x: torch.dtype
    residual: torch.dtype | None
    dout: torch.dtype
    bias: bool


def layer_norm_backward(
    machine: Machine,
    x: Tensor,
    dout: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `row_wise` with `bias`, `residual` and `norm` and nothing else.

    Args:
        x, residual: contiguous `[rows, width]`, of dtypes of `machine.dtypes`.
        dout: contiguous `[rows, width]`, of a dtype of `machine.dtypes`.
        weight, bias: float32 `[width]`; weight is LayerNorm's.

    Returns:
        dx, in the dtype of dout, which is the residual's too; and float32 `[3, width]`: dweight, LayerNorm's dbias, and
        the gradient of `bias`.
    """
    rows, width = x.shape
    tasks, filled = -(-rows // ROWS), filled_up(width)
    dx, sums = room(x.shape, dout.dtype), room((tasks, 3, filled), torch.float32)
    steps = LayerNormSteps(width, x.dtype, None if residual is None else residual.dtype, dout.dtype, bias is not None)
    _layer_norm_kernel(machine, steps)(
        tasks,
        x=(x, machine.dtypes, rows * width),
        rows=rows,
        bias=(bias, FLOAT32, width),
        residual=(residual, machine.dtypes, rows * width),
        norm_weight=(weight, FLOAT32, width),
        eps=float_bits(eps),
        dout=(dout, machine.dtypes, rows * width),
        scratch=PerWorker(8 * filled),
        dx=(dx, (dout.dtype,), rows * width),
        sums=(sums, FLOAT32, tasks * 3 * filled),
    ).run()
    return dx, sums.sum(0)[:, :width]


@cache
def _layer_norm_kernel(machine: Machine, steps: LayerNormSteps) -> Kernel:
    return compiled(machine, "layer_norm_backward", LAYER_NORM_PARAMETERS, partial(_layer_norm_rows, steps=steps))


def _layer_norm_rows(code: Code, steps: LayerNormSteps) -> None:
    width, lanes = steps.width, code.lanes
    filled = filled_up(width)
    total = code["scratch"] + code.worker * (8 * filled)
    scaled = total + 4 * filled  # dout times LayerNorm's weight
    sums = code["sums"] + code.task * (12 * filled)

    def clear(column: Value) -> None:
        code.store(code.vector(), sums + column * 4)

    def of_row(row: Value) -> None:
        def read(column: Value, count: int) -> Value:
            x = load_states(code, "x", steps.x, row * width + column, count)
            if steps.bias:
                x = x + load_states(code, "bias", torch.float32, column, count)
            if steps.residual is not None:
                x = x + load_states(code, "residual", steps.residual, row * width + column, count)
            return x

        centred, rstd = centre(code, total, width, keep(code, width, read, total))

        def weigh(column: Value, count: int, sum_: Value, product: Value) -> list[Value]:
            dout = load_states(code, "dout", steps.dout, row * width + column, count)
            of_norm = dout * load_states(code, "norm_weight", torch.float32, column, count)
            normed = centred(column, count) * rstd
            code.store(of_norm, scaled + column * 4)
            code.store(normed, total + column * 4)
            _add(code, sums, column, dout * normed)
            _add(code, sums + 4 * filled, column, dout)
            return [sum_ + of_norm, fma(of_norm, normed, product)]

        made = folded(code, width, weigh, [code.vector()] * 2, [added] * 2)
        mean, product = (code.splat(sum_of_lanes(one) / width) for one in made)

        def write(column: Value, count: int) -> None:
            normed, of_norm = (kept_at(code, place)(column, lanes) for place in (total, scaled))
            dx = first_lanes((of_norm - mean - normed * product) * rstd, count)
            _add(code, sums + 8 * filled, column, dx)
            store_states(code, dx, "dx", steps.dout, row * width + column, count)

        over_columns(code, width, write)

    code.loop(0, 3 * filled, lanes, clear)
    first = code.task * ROWS
    code.loop(first, minimum(first + ROWS, code["rows"]), 1, of_row)


class BiasGeluSteps(NamedTuple):
    """What the kernel is compiled for."""

    width: int
    x: torch.dtype
    dout: torch.dtype
    bias: bool
    approximate: Approximate
    gated: bool

    @property
    def activation(self) -> Activation:
        """GELU in this form."""
        return "gelu" if self.approximate == "none" else "gelu_tanh"


def bias_gelu_backward(
    machine: Machine,
    x: Tensor,
    dout: Tensor,
    bias: Tensor | None,
    approximate: Approximate,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of GELU(x + bias), where `gated` of the GELU of its first half times the second.

    Args:
        x: contiguous `[rows, width]`, of a dtype of `machine.dtypes`.
        dout: contiguous, as wide or half as wide, of such a dtype.
        bias: float32 `[width]`.

    Returns:
        dx in the dtype of dout; and float32 `[width]`, the gradient of `bias` where there is one.
    """
    rows, width = x.shape
    tasks, filled = -(-rows // ROWS), filled_up(width)
    dx = room(x.shape, dout.dtype)
    sums = None if bias is None else room((tasks, filled), torch.float32)
    _bias_gelu_kernel(machine, BiasGeluSteps(width, x.dtype, dout.dtype, bias is not None, approximate, gated))(
        tasks,
        x=(x, machine.dtypes, rows * width),
        rows=rows,
        bias=(bias, FLOAT32, width),
        dout=(dout, machine.dtypes, dout.numel()),
        dx=(dx, (dout.dtype,), rows * width),
        sums=(sums, FLOAT32, tasks * filled),
    ).run()
    return dx, None if sums is None else sums.sum(0)[:width]


@cache
def _bias_gelu_kernel(machine: Machine, steps: BiasGeluSteps) -> Kernel:
    return compiled(machine, "bias_gelu_backward", BIAS_GELU_PARAMETERS, partial(_bias_gelu_rows, steps=steps))


def _bias_gelu_rows(code: Code, steps: BiasGeluSteps) -> None:
    width = steps.width
    filled = filled_up(width)
    sums = code["sums"] + code.task * (4 * filled)

    made = width // 2 if steps.gated else width  # columns of dout

    def of_row(row: Value) -> None:
        def read(column: Value, count: int) -> Value:
            x = load_states(code, "x", steps.x, row * width + column, count)
            return x + load_states(code, "bias", torch.float32, column, count) if steps.bias else x

        def write(column: Value, count: int, dx: Value) -> None:
            if steps.bias:
                place = sums + column * 4
                code.store(code.load_first(place, F32, count, code.lanes) + dx, place, count)
            store_states(code, dx, "dx", steps.dout, row * width + column, count)

        def differentiate(column: Value, count: int) -> None:
            x = read(column, count)
            dout = load_states(code, "dout", steps.dout, row * made + column, count)
            slope = gelu_slope(code, x, steps.approximate)
            if not steps.gated:
                write(column, count, dout * slope)
                return
            gate = read(column + made, count)
            write(column, count, dout * gate * slope)
            write(column + made, count, dout * activated(code, x, steps.activation))

        over_columns(code, made, differentiate)

    if steps.bias:
        code.loop(0, filled, code.lanes, lambda column: code.store(code.vector(), sums + column * 4))
    first = code.task * ROWS
    code.loop(first, minimum(first + ROWS, code["rows"]), 1, of_row)


def _add(code: Code, sums: Value, column: Value, x: Value) -> None:
    """Add a vector to what is at `column` of float32 sums; there is room for whole vectors."""
    place = sums + column * 4
    code.store(code.load(place, F32, code.lanes) + x, place)
