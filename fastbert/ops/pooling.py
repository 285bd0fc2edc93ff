"""pool: one vector a sequence from packed rows. Checks, the torch path, and the Triton kernels as custom ops."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend
from fastbert.cpu.memory import room
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import row_wise_choices
from fastbert.ops.common import check_rows, launcher, native_machine, wants_gradient
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
    packing.check_rows("x", x)
    if how not in get_args(Pooling):
        raise ArgumentError("how", repr(how), f"one of {', '.join(get_args(Pooling))}")
    if len(x) > packing.tokens:  # a slice of all rows would cost its gradient a copy
        x = x[: packing.tokens]
    if backend.uses_triton("pool", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        return launcher(pool_forward, x)(x, packing.cu_seqlens, how, normalise, wants_gradient(x))[0]
    machine = native_machine(x)
    if machine is not None and not wants_gradient(x):
        from fastbert.cpu import pooling as kernel

        out = room((packing.batch, x.shape[1]), torch.float32)
        packing.check_ends()
        kernel.pool_forward(machine, x.contiguous(), packing.cu_seqlens, out, how=how, normalise=normalise).run()
        return out
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
            return x.sum(0, dtype=dtype).expand(packing.batch, -1)
        return x.index_select(0, first_rows(packing)).to(dtype).masked_fill((lengths == 0)[:, None], 0.0)
    x = x.to(dtype)
    if how == "mean":
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True) / lengths.clamp(min=1)[:, None]
    largest: Tensor = _Maximum.apply(x, lengths)  # type: ignore[no-untyped-call]
    return largest.masked_fill((lengths == 0)[:, None], 0.0)


class _Maximum(torch.autograd.Function):
    """The maximum of each sequence. Rows that share it share its gradient; torch's shares only positive ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        largest = torch.segment_reduce(x, "max", lengths=lengths, unsafe=True)
        ctx.save_for_backward(x, lengths, largest)
        return largest

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        x, lengths, largest = ctx.saved_tensors
        each = largest.repeat_interleave(lengths, 0, output_size=len(x))
        at = (x == each) | (x.isnan() & each.isnan())
        count = torch.segment_reduce(at.to(x.dtype), "sum", lengths=lengths, unsafe=True)
        share = (dout / count).repeat_interleave(lengths, 0, output_size=len(x))
        return share.where(at, 0.0), None


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
    *_: Any,
) -> Tensor:
    return dout.new_empty(rows, dout.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, how, normalise, store_norm = inputs
    out, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of norm
    ctx.save_for_backward(out if normalise else None, norm, x if how == "max" else None, cu_seqlens)
    ctx.rows, ctx.dtype, ctx.how, ctx.normalise = len(x), x.dtype, how, normalise
    ctx.missing = normalise and not store_norm


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    if ctx.missing:
        raise BackendError(
            "pool_forward", "a gradient asked for after store_norm=False", "store_norm=True in the forward"
        )
    dx = pool_backward(dout, *ctx.saved_tensors, ctx.rows, ctx.dtype, ctx.how, ctx.normalise)
    return dx, None, None, None, None


pool_forward.register_autograd(_backward, setup_context=_save)
