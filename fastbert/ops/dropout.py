"""Dropout of a hidden state, by the mask of `reference.keep_mask`: by a kernel of this CPU, or in plain torch, made in
place and a piece at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import as_kernels_read, room
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.ops.common import native_machine, observed, torch_differentiates
from fastbert.ops.fastest import FEW
from fastbert.reference import FOLD_M, LOW, Dropout

PAIRS_AT_ONCE = 2**16  # words of two columns, that caches hold; 2**15 to 2**17 are as fast


def drop(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Dropout of a `[rows, hidden]` state by the same mask as the kernels'."""
    rows, hidden = x.shape
    if torch.compiler.is_compiling():
        return x * reference.hidden_keep_mask(seed, rows, hidden, dropout) * drop_scale(dropout)
    machine = native_machine(x, seed) if rows > FEW else None
    if machine is not None:
        return _NativeDropped.apply(machine, x, Dropout(int(seed), dropout))  # type: ignore[no-untyped-call]
    row = torch.arange(rows, device=x.device)
    keep = keep_lines(seed, row, row.new_zeros(()), row.new_zeros(()), hidden, dropout)
    return _Dropped.apply(x, keep, drop_scale(dropout))  # type: ignore[no-untyped-call]


class _NativeDropped(torch.autograd.Function):
    """By a kernel of this CPU, which makes the mask again for the gradient."""

    @staticmethod
    def forward(ctx: Any, machine: Machine, x: Tensor, dropout: Dropout) -> Tensor:
        ctx.options = machine, dropout
        return _by_kernel(machine, x, dropout)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor, None]:
        machine, dropout = ctx.options
        if torch_differentiates(dout) or observed():
            seed = torch.tensor([dropout.seed], dtype=torch.int64, device=dout.device)
            rows, hidden = dout.shape
            keep = reference.hidden_keep_mask(seed, rows, hidden, dropout.probability).to(dout.dtype)
            return None, dout * (keep * drop_scale(dropout.probability)), None
        return None, _by_kernel(machine, dout, dropout), None


def _by_kernel(machine: Machine, x: Tensor, dropout: Dropout) -> Tensor:
    from fastbert.cpu.row_wise import row_wise

    out = room(x.shape, x.dtype)
    row_wise(machine, as_kernels_read(x), dropout=dropout, out=out).run()
    return out


class _Dropped(torch.autograd.Function):
    """x * keep * scale, that saves the mask a byte an element, though torch multiplies fast by its own dtype alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return keep.to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return dout * keep.to(dout.dtype).mul_(ctx.scale), None, None


def keep_lines(seed: Tensor, row: Tensor, head: Tensor, sequence: Tensor, columns: int, dropout: float) -> Tensor:
    """`reference.keep_mask` of whole lines: int8 `[lines, columns]`, as torch multiplies slowly by bool on a CPU.

    Args:
        seed: int64, one element.
        row, head, sequence: int64, of shapes that broadcast to `[lines]`.
    """
    row, head, sequence = torch.broadcast_tensors(row, head, sequence)
    pairs = -(-columns // 2)
    pair = torch.arange(pairs, device=row.device)
    kept = torch.empty(len(row), pairs * 2, dtype=torch.int8, device=row.device)
    threshold = drop_threshold(dropout) - 2**15
    lines = max(1, PAIRS_AT_ONCE // max(pairs, 1))
    x, key = reference.row_words(seed, row, head, sequence)
    for start in range(0, len(row), lines):
        part = slice(start, start + lines)
        word = x[part, None] ^ pair
        spare = torch.empty_like(word)
        _multiply(word, spare).bitwise_xor_(key[part, None]).bitwise_and_(LOW)
        draws = _multiply(word, spare).to(torch.int32).view(torch.int16).bitwise_xor_(-(2**15))  # it has no unsigned >=
        kept[part] = torch.ge(draws, threshold, out=draws)  # into its own dtype: torch is slow at any other
    return kept[:, :columns]


def _multiply(word: Tensor, spare: Tensor) -> Tensor:
    """One product of `reference._fold`, in place: int64, with garbage above the low 32 bits."""
    torch.bitwise_right_shift(word.mul_(FOLD_M), 32, out=spare)
    return word.bitwise_xor_(spare)
