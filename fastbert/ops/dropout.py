"""Dropout of plain torch: the mask of `reference.keep_mask`, made in place and a piece at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.kernels import launch
from fastbert.reference import LOW, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

GROUPS_AT_ONCE = 2**16  # draws of eight columns: the fastest on a 2-core CPU, by its caches


def drop(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Dropout of a `[rows, hidden]` state by the same mask as the kernels'."""
    rows, hidden = x.shape
    if torch.compiler.is_compiling():
        return x * reference.hidden_keep_mask(seed, rows, hidden, dropout) * launch.drop_scale(dropout)
    row = torch.arange(rows, device=x.device)
    keep = keep_lines(seed, row, row.new_zeros(()), row.new_zeros(()), hidden, dropout)
    return _Dropped.apply(x, keep, launch.drop_scale(dropout))  # type: ignore[no-untyped-call]


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
    groups = -(-columns // 8)
    group = torch.arange(groups, device=row.device)
    kept = torch.empty(len(row), groups * 8, dtype=torch.int8, device=row.device)
    threshold = launch.drop_threshold(dropout) - 2**15
    lines = max(1, GROUPS_AT_ONCE // max(groups, 1))
    keys = _keys(int(seed))
    for start in range(0, len(row), lines):
        part = slice(start, start + lines)
        words = _philox(keys, row[part, None], group, head[part, None], sequence[part, None])
        draws = words.view(torch.int16).flatten(1).bitwise_xor_(-(2**15))  # torch compares no unsigned integers
        kept[part] = torch.ge(draws, threshold, out=draws)  # into its own dtype: torch is slow at any other
    return kept[:, :columns]


def _keys(seed: int) -> list[tuple[int, int]]:
    """Philox's two key words in each of its rounds."""
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    return [((k0 + i * PHILOX_W0) & LOW, (k1 + i * PHILOX_W1) & LOW) for i in range(PHILOX_ROUNDS)]


def _philox(keys: list[tuple[int, int]], row: Tensor, group: Tensor, head: Tensor, sequence: Tensor) -> Tensor:
    """The draws of `reference._philox`, two of its four words in an int64: `[lines, groups, 2]`.

    Only `group` differs within a line, and it takes three rounds to reach all four words: until then a word that is the
    same in the whole line is made once for it, `[lines, 1]`. The low half of a product keeps the high half above it
    until the next xor. Large tensors are written over.
    """
    (k0, k1), *keys = keys
    product0, product1 = row * PHILOX_M0, head * PHILOX_M1
    c0, c1 = (_high(product1) ^ k0) ^ group, product1 & LOW  # c0 alone is [lines, groups]
    c2, c3 = _high(product0) ^ sequence ^ k1, product0 & LOW

    (k0, k1), *keys = keys
    spare, product0, product1 = c0, c0 * PHILOX_M0, c2 * PHILOX_M1
    c0, c1 = _high(product1) ^ c1 ^ k0, product1 & LOW
    c2, c3 = (product0 >> 32).bitwise_xor_(c3 ^ k1).bitwise_and_(LOW), product0  # c2 and c3 are

    (k0, k1), *keys = keys
    product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
    c0, c1 = torch.bitwise_right_shift(product1, 32, out=spare).bitwise_xor_(c1 ^ k0).bitwise_and_(LOW), product1
    c2, c3 = torch.bitwise_xor(c3, _high(product0) ^ k1, out=c2).bitwise_and_(LOW), c3.copy_(product0)  # all are

    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for k0, k1 in keys:
        torch.mul(c0, PHILOX_M0, out=product0)
        torch.mul(c2, PHILOX_M1, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    words = torch.empty(*c0.shape, 2, dtype=torch.int64, device=c0.device)
    torch.add(c0, c1, alpha=2**32, out=words[..., 0])
    torch.add(c2, c3, alpha=2**32, out=words[..., 1])
    return words


def _high(product: Tensor) -> Tensor:
    """The high 32 bits."""
    return (product >> 32) & LOW
