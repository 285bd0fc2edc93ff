"""embedding on a CPU: the sum of three tables' rows and its LayerNorm, forward, without dropout."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.cpu.code import Code
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import INT64, PerWorker
from fastbert.cpu.program import Call, Kernel, compiled
from fastbert.cpu.row_wise import ROWS, Finish, Reader, load_states, over_rows
from fastbert.cpu.values import I64, Value, minimum

PARAMETERS = (
    "input_ids", "position_ids", "token_type_ids", "rows", "word", "position", "token_type", "norm_weight", "norm_bias",
    "eps", "scratch", "out",
)  # fmt: skip

# Rows ahead of the one at hand whose words are fetched: no cache guesses which come.
AHEAD = 2


class Steps(NamedTuple):
    """What the kernel is compiled for: dtypes of the tables, and whether there are token types."""

    word: torch.dtype
    position: torch.dtype
    token_type: torch.dtype
    types: bool
    finish: Finish


def embedding(
    machine: Machine,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm: tuple[Tensor, Tensor, float],
    out: Tensor,
) -> Call:
    """LN(word[input_ids] + position[position_ids] + token_type[token_type_ids]), rounded once.

    Args:
        input_ids, position_ids, token_type_ids: contiguous int64 `[rows]`, inside their tables, which is not looked at;
            no token types are type 0.
        word, position, token_type: contiguous `[entries, width]`, of dtypes of `machine.dtypes`.
        norm: LayerNorm's weight and bias, float32 `[width]`, and its eps.
        out: contiguous `[rows, width]`, in the dtype of `word` <- the result.
    """
    rows, width = out.shape
    steps = Steps(
        word.dtype,
        position.dtype,
        token_type.dtype,
        token_type_ids is not None,
        Finish(width, norm=True, out=out.dtype, int8=False),
    )
    return _kernel(machine, steps)(
        -(-rows // ROWS),
        input_ids=(input_ids, INT64, rows),
        position_ids=(position_ids, INT64, rows),
        token_type_ids=(token_type_ids, INT64, rows),
        rows=rows,
        word=(word, machine.dtypes, len(word) * width),
        position=(position, machine.dtypes, len(position) * width),
        token_type=(token_type, machine.dtypes, len(token_type) * width),
        scratch=PerWorker(steps.finish.scratch_width * 4),
        **steps.finish.arguments(rows, norm, out),
    )


@cache
def _kernel(machine: Machine, steps: Steps) -> Kernel:
    return compiled(machine, "embedding", PARAMETERS, partial(_rows, steps=steps))


def _rows(code: Code, steps: Steps) -> None:
    width = steps.finish.width

    def reader(row: Value) -> Reader:
        word, position = (code.load(code[ids] + row * 8, I64) * width for ids in ("input_ids", "position_ids"))
        type_ = code.load(code["token_type_ids"] + row * 8, I64) * width if steps.types else code.number(0)
        next_row = minimum(row + AHEAD, code["rows"] - 1)
        next_word = code["word"] + code.load(code["input_ids"] + next_row * 8, I64) * (width * steps.word.itemsize)

        def read(column: Value, count: int) -> Value:
            code.prefetch(next_word + column * steps.word.itemsize)
            total = load_states(code, "word", steps.word, word + column, count)
            total = total + load_states(code, "position", steps.position, position + column, count)
            return total + load_states(code, "token_type", steps.token_type, type_ + column, count)

        return read

    over_rows(code, steps.finish, reader)
