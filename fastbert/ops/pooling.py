"""pool: one vector a sequence from packed rows. Checks, the torch path, and the Triton kernels as custom ops."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import launch
from fastbert.ops.common import check_rows, wants_gradient
from fastbert.packing import Packing
from fastbert.reference import Pooling


def pool(x: Tensor, packing: Packing, how: Pooling, *, normalise: bool = False) -> Tensor:
    """The first row ("cls"), the mean, or the maximum of each sequence.

    Args:
        x: floating `[rows, hidden]`, any strides; rows >= `packing.tokens`, and rows beyond them (slack) are not read.
        packing: where the sequences begin.
        how: "cls", "mean" or "max". The gradient of a maximum is shared evenly by the rows that have it.
        normalise: divide each vector by its Euclidean norm, or by 1e-12 if that is larger, as
            `torch.nn.functional.normalize`.

    Returns:
        float32 `[batch, hidden]` (float64 for float64); zeros for a zero-length sequence.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
        BackendError: the Triton path was forced and can't serve this call.
    """
    check_rows("x", x)
    if x.shape[0] < packing.tokens:
        raise ArgumentError("x", f"{x.shape[0]} rows", f"at least the {packing.tokens} tokens of the packing")
    if x.device != packing.cu_seqlens.device:
        raise ArgumentError("packing", f"on {packing.cu_seqlens.device}", f"on {x.device}, the device of x")
    if how not in get_args(Pooling):
        raise ArgumentError("how", repr(how), f"one of {', '.join(get_args(Pooling))}")
    if len(x) > packing.tokens:  # a slice of all rows would cost its gradient a copy
        x = x[: packing.tokens]
    if backend.uses_triton("pool", x, launch.row_wise_unserved(x.shape[1], x.dtype)):
        return pool_forward(x, packing.cu_seqlens, how, normalise, wants_gradient(x))[0]
    pooled = _pool_torch(x, packing, how)
    return F.normalize(pooled) if normalise else pooled


def first_tokens(x: Tensor, packing: Packing) -> Tensor:
    """`pool(x, packing, "cls")` in the dtype of `x`."""
    return pool(x, packing, "cls").to(x.dtype)


def first_rows(packing: Packing) -> Tensor:
    """int64 `[batch]`: the row where each sequence begins; some row of another's for one of length zero."""
    return packing.cu_seqlens[:-1].long().clamp(max=max(packing.tokens - 1, 0))


def _pool_torch(x: Tensor, packing: Packing, how: Pooling) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    lengths = packing.lengths.long()
    if how == "cls":
        if packing.tokens == 0:
            return x.new_zeros(packing.batch, x.shape[1], dtype=dtype)
        return x.index_select(0, first_rows(packing)).to(dtype).masked_fill((lengths == 0)[:, None], 0.0)
    x = x.to(dtype)
    if how == "mean":
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True) / lengths.clamp(min=1)[:, None]
    largest = torch.segment_reduce(x, "max", lengths=lengths, unsafe=True)
    return largest.masked_fill((lengths == 0)[:, None], 0.0)


@torch.library.custom_op("fastbert::pool_forward", mutates_args=())
def pool_forward(x: Tensor, cu_seqlens: Tensor, how: str, normalise: bool, store_norm: bool) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.pooling.pool_forward`. Returns (out, norm)."""
    from fastbert.kernels import pooling as kernel

    return kernel.pool_forward(x, cu_seqlens, how=how, normalise=normalise, store_norm=store_norm)


@pool_forward.register_fake
def _(x: Tensor, cu_seqlens: Tensor, how: str, normalise: bool, store_norm: bool) -> tuple[Tensor, Tensor]:
    batch = len(cu_seqlens) - 1
    out = x.new_empty(batch, x.shape[1], dtype=torch.float32)
    return out, out.new_empty(batch if normalise and store_norm else 0)


@torch.library.custom_op("fastbert::pool_backward", mutates_args=())
def pool_backward(
    dout: Tensor,
    out: Tensor | None,
    norm: Tensor,
    x: Tensor | None,
    cu_seqlens: Tensor,
    rows: int,
    dtype: torch.dtype,
    how: str,
    normalise: bool,
) -> Tensor:
    """The kernel; see `fastbert.kernels.pooling.pool_backward`. Returns dx."""
    from fastbert.kernels import pooling as kernel

    return kernel.pool_backward(dout, out, norm, x, cu_seqlens, rows=rows, dtype=dtype, how=how, normalise=normalise)


@pool_backward.register_fake
def _(
    dout: Tensor,
    out: Tensor | None,
    norm: Tensor,
    x: Tensor | None,
    cu_seqlens: Tensor,
    rows: int,
    dtype: torch.dtype,
    how: str,
    normalise: bool,
) -> Tensor:
    return dout.new_empty(rows, dout.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, how, normalise, store_norm = inputs
    out, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.save_for_backward(out if normalise else None, norm, x if how == "max" else None, cu_seqlens)
    ctx.rows, ctx.dtype, ctx.how, ctx.normalise = len(x), x.dtype, how, normalise
    ctx.missing = normalise and not store_norm


def _backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.missing:
        raise BackendError(
            "pool_forward", "a gradient asked for after store_norm=False", "store_norm=True in the forward"
        )
    out, norm, x, cu_seqlens = ctx.saved_tensors
    dx = pool_backward(dout, out, norm, x, cu_seqlens, ctx.rows, ctx.dtype, ctx.how, ctx.normalise)
    return dx, None, None, None, None


pool_forward.register_autograd(_backward, setup_context=_save)
