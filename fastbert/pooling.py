"""Pooling: one vector a sequence from packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.errors import ArgumentError
from fastbert.packing import Packing
from fastbert.reference import Pooling


def pool(x: Tensor, packing: Packing, how: Pooling) -> Tensor:
    """`[rows, hidden]` -> float32 `[batch, hidden]`: the first token, the mean, or the maximum of each sequence.

    A zero-length sequence gives zeros; rows of slack are not read. float64 stays float64.

    Raises:
        ArgumentError: `how` is none of "cls", "mean", "max", or `x` has fewer rows than there are tokens.
    """
    if x.dim() != 2 or x.shape[0] < packing.tokens:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", f"[rows, hidden] with at least {packing.tokens} rows")
    x = x[: packing.tokens]
    if how == "cls":
        return first_tokens(x, packing).to(torch.promote_types(x.dtype, torch.float32))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = packing.lengths.long()
    if how == "mean":
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True) / lengths.clamp(min=1)[:, None]
    if how == "max":
        largest = torch.segment_reduce(x, "max", lengths=lengths, unsafe=True)
        return largest.masked_fill((lengths == 0)[:, None], 0.0)
    raise ArgumentError("how", repr(how), "'cls', 'mean' or 'max'")


def first_tokens(x: Tensor, packing: Packing) -> Tensor:
    """`[rows, hidden]` -> `[batch, hidden]`: the first row of each sequence, zeros for one of length zero."""
    if packing.tokens == 0:
        return x.new_zeros(packing.batch, x.shape[1])
    return x.index_select(0, first_rows(packing)).masked_fill((packing.lengths == 0)[:, None], 0.0)


def first_rows(packing: Packing) -> Tensor:
    """int64 `[batch]`: the row where each sequence begins; some row of another's for one of length zero."""
    return packing.cu_seqlens[:-1].long().clamp(max=max(packing.tokens - 1, 0))
