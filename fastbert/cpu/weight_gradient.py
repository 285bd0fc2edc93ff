"""weight_gradient: what a linear layer's weight gets of its output's gradient, `dout^T @ x`, on a CPU, in float32.

A task is `TASK_INPUTS` inputs and `TASK_OUTPUTS` times `Vectors.rows` outputs. Of `CHUNK` rows after `CHUNK` it copies
its part together, since whole rows lie so far apart that they would share a few lines of a cache; then
`Vectors.columns` inputs of them meet `Vectors.rows` outputs after as many, whose sums over the chunk stay in registers.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from fastbert.cpu.code import Code
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import FLOAT32, PerWorker
from fastbert.cpu.program import Call, Kernel, compiled
from fastbert.cpu.values import F32, Value, fma, minimum

# Inputs of a task, a multiple of `Vectors.columns`, and how often it has `Vectors.rows` outputs: enough that copying is
# little beside the products, few enough to share out and to stay in a second cache.
TASK_INPUTS, TASK_OUTPUTS = 128, 8
# Rows whose products are summed before that sum joins the others, so that rounding grows no faster than in a BLAS.
CHUNK = 128

PARAMETERS = ("x", "dout", "rows", "scratch", "dweight")


class Steps(NamedTuple):
    """What the kernel is compiled for."""

    inputs: int
    outputs: int


def weight_gradient(machine: Machine, x: Tensor, dout: Tensor, dweight: Tensor) -> Call:
    """`dout^T @ x`.

    Args:
        x: contiguous float32 `[rows, in]`.
        dout: contiguous float32 `[rows, out]`.
        dweight: contiguous float32 `[out, in]`, to which it is added.
    """
    outputs, inputs = dweight.shape
    task_outputs = TASK_OUTPUTS * machine.vectors.rows
    tasks = -(-inputs // TASK_INPUTS) * -(-outputs // task_outputs)
    rows = len(x)
    return _kernel(machine, Steps(inputs, outputs))(
        tasks,
        x=(x, FLOAT32, rows * inputs),
        dout=(dout, FLOAT32, rows * outputs),
        rows=rows,
        scratch=PerWorker(4 * CHUNK * (TASK_INPUTS + task_outputs)),
        dweight=(dweight, FLOAT32, outputs * inputs),
    )


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "weight_gradient", PARAMETERS, partial(_product, steps=steps))


def _product(code: Code, steps: Steps) -> None:
    lanes, inputs, outputs = code.lanes, steps.inputs, steps.outputs
    block, most = code.machine.vectors.columns, code.machine.vectors.rows
    task_outputs = TASK_OUTPUTS * most
    groups = -(-inputs // TASK_INPUTS)
    input_, output = code.task % groups * TASK_INPUTS, code.task // groups * task_outputs
    x = code["scratch"] + code.worker * (4 * CHUNK * (TASK_INPUTS + task_outputs))  # [blocks, CHUNK, block]
    dout = x + 4 * CHUNK * TASK_INPUTS  # [CHUNK, task_outputs]

    def task(some_inputs: int, some_outputs: int) -> None:
        def add_chunk(begin: Value) -> None:
            rows = minimum(code["rows"] - begin, CHUNK)

            def copy(row: Value) -> None:
                from_x = code["x"] + ((begin + row) * inputs + input_) * 4
                for n in range(0, some_inputs, lanes):
                    vector = code.load_first(from_x + 4 * n, F32, min(lanes, some_inputs - n), lanes)
                    code.store(vector, x + (n // block * CHUNK * block + n % block) * 4 + row * (4 * block))
                from_dout = code["dout"] + ((begin + row) * outputs + output) * 4
                for n in range(0, some_outputs, lanes):
                    vector = code.load_first(from_dout + 4 * n, F32, min(lanes, some_outputs - n), lanes)
                    code.store(vector, dout + row * (4 * task_outputs) + 4 * n)

            def add_tile(i: Value, o: Value, columns: int = block, at_once: int = most) -> None:
                vectors = range(0, columns, lanes)

                def multiply(row: Value, *totals: Value) -> list[Value]:
                    line = x + (i * CHUNK + row * block) * 4
                    values = [code.load(line + 4 * n, F32, lanes) for n in vectors]  # [lanes] inputs
                    made = []
                    for r in range(at_once):
                        scalar = code.splat(code.load(dout + (row * task_outputs + o + r) * 4, F32))
                        made += [fma(scalar, v, totals[r * len(vectors) + n]) for n, v in enumerate(values)]
                    return made

                sums = code.loop(0, rows, 1, multiply, *[code.vector()] * (at_once * len(vectors)))
                for r in range(at_once):
                    for number, n in enumerate(vectors):
                        place = code["dweight"] + ((output + o + r) * inputs + input_ + i + n) * 4
                        count = min(lanes, columns - n)
                        total = code.load_first(place, F32, count, lanes) + sums[r * len(vectors) + number]
                        code.store(total, place, count)

            def add_columns(i: Value, columns: int = block) -> None:
                whole = some_outputs // most * most
                code.loop(0, whole, most, lambda o: add_tile(i, o, columns))
                if whole < some_outputs:
                    add_tile(i, code.number(whole), columns, some_outputs - whole)

            code.loop(0, rows, 1, copy)
            whole = some_inputs // block * block
            code.loop(0, whole, block, add_columns)
            if whole < some_inputs:
                add_columns(code.number(whole), some_inputs - whole)

        code.loop(0, code["rows"], CHUNK, add_chunk)

    def with_outputs(some_inputs: int) -> None:
        whole, rest = divmod(outputs, task_outputs)
        code.when(output < whole * task_outputs, lambda: task(some_inputs, task_outputs))
        if rest:
            code.when(code.number(whole * task_outputs - 1) < output, lambda: task(some_inputs, rest))

    whole, rest = divmod(inputs, TASK_INPUTS)
    code.when(input_ < whole * TASK_INPUTS, lambda: with_outputs(TASK_INPUTS))
    if rest:
        code.when(code.number(whole * TASK_INPUTS - 1) < input_, lambda: with_outputs(rest))
