"""Dropout of plain torch: the mask of `reference.keep_mask`, made in place and a piece at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert import reference
from fastbert.kernels import launch
from fastbert.reference import LOW, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

GROUPS_AT_ONCE = 2**17  # draws of eight columns: the fastest on a 2-core CPU, by its caches


def drop(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Dropout of a `[rows, hidden]` state by the same mask as the kernels'."""
    rows, hidden = x.shape
    if torch.compiler.is_compiling():
        keep = reference.hidden_keep_mask(seed, rows, hidden, dropout)
    else:
        row = torch.arange(rows, device=x.device)
        keep = keep_lines(seed, row, row.new_zeros(()), row.new_zeros(()), hidden, dropout)
    return x * keep * launch.drop_scale(dropout)


def keep_lines(seed: Tensor, row: Tensor, head: Tensor, sequence: Tensor, columns: int, dropout: float) -> Tensor:
    """`reference.keep_mask` of whole lines: int8 `[lines, columns]`, as torch multiplies slowly by bool on a CPU.

    Args:
        seed: int64, one element.
        row, head, sequence: int64, of shapes that broadcast to `[lines]`.
    """
    row, head, sequence = torch.broadcast_tensors(row, head, sequence)
    groups = -(-columns // 8)
    group = torch.arange(groups, device=row.device)
    kept = torch.empty(len(row), groups, 8, dtype=torch.bool, device=row.device)
    threshold = launch.drop_threshold(dropout) - 2**15
    lines = max(1, GROUPS_AT_ONCE // max(groups, 1))
    key = int(seed)
    for start in range(0, len(row), lines):
        part = slice(start, start + lines)
        words = _philox(key, row[part, None], group, head[part, None], sequence[part, None])
        draws = torch.empty(*words[0].shape, 4, dtype=torch.int32, device=row.device)
        for i, word in enumerate(words):
            draws[..., i].copy_(word)
        signed = draws.view(torch.int16).bitwise_xor_(-(2**15))  # torch compares no unsigned integers; the order stays
        torch.ge(signed, threshold, out=kept[part])
    return kept.view(torch.int8).flatten(1)[:, :columns]


def _philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference._philox` but for the bits above the low 32 of its words; one of the counters is of another shape."""
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
    c0, c1 = ((product1 >> 32) & LOW) ^ k0 ^ c1, product1
    c2, c3 = ((product0 >> 32) & LOW) ^ k1 ^ c3, product0
    # From here on all are of full size, and written over. A low half keeps its high half until the next xor.
    c0, c1, c2, c3 = (c.clone(memory_format=torch.contiguous_format) for c in torch.broadcast_tensors(c0, c1, c2, c3))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(PHILOX_ROUNDS - 1):
        k0, k1 = (k0 + PHILOX_W0) & LOW, (k1 + PHILOX_W1) & LOW
        torch.mul(c0, PHILOX_M0, out=product0)
        torch.mul(c2, PHILOX_M1, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    return c0, c1, c2, c3
