"""One float32 vector a sequence from packed rows: the first, the mean or the maximum of each; and its gradient.

A program owns a sequence and a block of columns as wide as a line of memory, and walks the rows ROWS at a time. The
blocks of a sequence are neighbours on the grid, so that they read the same pages of memory at once. For a vector of
length 1 the forward needs all columns together: there the block is the whole row, with more warps. In the backward each
program multiplies the rows of result and gradient for itself. Nothing is added by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import choices, row_wise_choices, target
from fastbert.kernels.dispatch import dispatch

NORM_EPS = tl.constexpr(1e-12)  # the eps of torch.nn.functional.normalize


@triton.jit
def larger(a, b):
    """The maximum, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def same(a, b):
    """Whether both are equal, or both NaN."""
    return (a == b) | ((a != a) & (b != b))


@triton.jit
def pool_forward_kernel(
    x_ptr,
    cu_seqlens_ptr,
    out_ptr,
    norm_ptr,
    x_stride_row,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HOW: tl.constexpr,
    NORMALISE: tl.constexpr,
    STORE_NORM: tl.constexpr,
):
    """See `pool_forward`. With NORMALISE, BLOCK holds all columns."""
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    sequence = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    length = end - begin
    if HOW == "cls":
        end = tl.minimum(end, begin + 1)

    neutral: tl.constexpr = float("-inf") if HOW == "max" else 0.0
    acc = tl.full([ROWS, BLOCK], neutral, tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & mask_column[None, :]
        x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride_row + column[None, :]
        x = tl.load(x_ptrs, mask=mask, other=neutral).to(tl.float32)  # [ROWS, BLOCK]
        if HOW == "max":
            acc = larger(acc, x)
        else:
            acc += x

    if HOW == "max":
        out = tl.where(length > 0, tl.reduce(acc, 0, larger), 0.0)
    else:
        out = tl.sum(acc, 0)
    if HOW == "mean":
        out /= tl.maximum(length, 1).to(tl.float32)
    if NORMALISE:
        out = tl.where(mask_column, out, 0.0)
        norm = tl.sqrt(tl.sum(out * out, 0))
        out /= larger(norm, NORM_EPS)
        if STORE_NORM:
            tl.store(norm_ptr + sequence, norm)
    tl.store(out_ptr + sequence.to(tl.int64) * HIDDEN + column, out, mask=mask_column)  # [BLOCK]


def pool_forward(
    x: Tensor, cu_seqlens: Tensor, *, how: str, normalise: bool, store_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x: `[rows, hidden]`, any strides; copied once if it is not 16-byte aligned.
        cu_seqlens: int32 `[batch + 1]`; sequence `i` is rows `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`.
        how, normalise: as in `fastbert.ops.pooling`.
        store_norm: whether the backward will need the norm of what is normalised.

    Returns:
        out float32 `[batch, hidden]`; norm float32 `[batch]`, or `[0]`.
    """
    batch, hidden = len(cu_seqlens) - 1, x.shape[1]
    x = target.aligned(x)
    store_norm = normalise and store_norm
    out = x.new_empty((batch, hidden), dtype=torch.float32)
    norm = x.new_empty(batch if store_norm else 0, dtype=torch.float32)
    if out.numel() == 0:
        return out, norm.zero_()
    choice = row_wise_choices.pool_forward(hidden, x.dtype, target.of(x.device), how=how, normalise=normalise)
    dispatch(
        pool_forward_kernel,
        (batch * -(-hidden // choice.BLOCK), 1, 1),
        x,
        cu_seqlens,
        out,
        norm,
        x.stride(0),
        HIDDEN=hidden,
        HOW=how,
        NORMALISE=normalise,
        STORE_NORM=store_norm,
        **choices.arguments(choice),
    )
    return out, norm


@triton.jit
def pool_backward_kernel(
    dout_ptr,
    out_ptr,
    norm_ptr,
    x_ptr,
    cu_seqlens_ptr,
    dx_ptr,
    x_stride_row,
    dx_stride_row,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HOW: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """See `pool_backward`. COLUMNS holds all columns."""
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    sequence = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)

    sequence_offset = sequence.to(tl.int64) * HIDDEN
    dpooled = tl.load(dout_ptr + sequence_offset + column, mask=mask_column, other=0.0)  # [BLOCK]
    if NORMALISE:
        each = tl.arange(0, COLUMNS)
        dout = tl.load(dout_ptr + sequence_offset + each, mask=each < HIDDEN, other=0.0)  # [COLUMNS]
        product = dout * tl.load(out_ptr + sequence_offset + each, mask=each < HIDDEN, other=0.0)  # [COLUMNS]
        norm = tl.load(norm_ptr + sequence)
        slope = tl.where(norm >= NORM_EPS, tl.sum(product, 0), 0.0)  # below eps the divisor is a constant
        out = tl.load(out_ptr + sequence_offset + column, mask=mask_column, other=0.0)  # [BLOCK]
        dpooled = (dpooled - out * slope) / larger(norm, NORM_EPS)
    if HOW == "mean":
        dpooled /= tl.maximum(end - begin, 1).to(tl.float32)
    if HOW == "max":
        # The maximum again, which a normalised result has lost, and how often it occurs.
        acc_largest = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
        acc_count = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in range(begin, end, ROWS):
            row = first + tl.arange(0, ROWS)
            mask = (row < end)[:, None] & mask_column[None, :]
            x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride_row + column[None, :]
            x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)  # [ROWS, BLOCK]
            largest = larger(acc_largest, x)
            acc_count = tl.where(same(largest, acc_largest), acc_count, 0.0)
            acc_count += tl.where(same(x, largest) & mask, 1.0, 0.0)
            acc_largest = largest
        total = tl.reduce(acc_largest, 0, larger)
        count = tl.sum(tl.where(same(acc_largest, total[None, :]), acc_count, 0.0), 0)
        dpooled /= larger(count, 1.0)  # a masked column has none

    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & mask_column[None, :]
        row_offset = row.to(tl.int64)[:, None]
        dx = tl.broadcast_to(dpooled[None, :], [ROWS, BLOCK])
        if HOW == "cls":
            dx = tl.where((row == begin)[:, None], dx, 0.0)
        if HOW == "max":
            x_ptrs = x_ptr + row_offset * x_stride_row + column[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
            dx = tl.where(same(x, total[None, :]), dx, 0.0)
        dx_ptrs = dx_ptr + row_offset * dx_stride_row + column[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]


def pool_backward(
    dout: Tensor,
    out: Tensor | None,
    norm: Tensor,
    x: Tensor | None,
    cu_seqlens: Tensor,
    *,
    rows: int,
    dtype: torch.dtype,
    how: str,
    normalise: bool,
) -> Tensor:
    """Launch the backward kernel.

    Args:
        dout: float32 `[batch, hidden]`, the gradient of the result.
        out, norm: what the forward returned; `out` only where it normalised.
        x: what the forward was given; only for "max".
        cu_seqlens, how, normalise: as in `pool_forward`.
        rows, dtype: of x; every row belongs to a sequence.

    Returns:
        The gradient of x, `[rows, hidden]`. That of a maximum is shared evenly by the rows that have it.
    """
    batch, hidden = dout.shape
    dx = torch.empty((rows, hidden), dtype=dtype, device=dout.device)
    if dx.numel() == 0:
        return dx
    x = None if x is None else target.aligned(x)
    choice = row_wise_choices.pool_backward(hidden, dtype, target.of(dout.device))
    dispatch(
        pool_backward_kernel,
        (batch * -(-hidden // choice.BLOCK), 1, 1),
        dout.contiguous(),
        out,
        norm,
        x,
        cu_seqlens,
        dx,
        0 if x is None else x.stride(0),
        dx.stride(0),
        HIDDEN=hidden,
        COLUMNS=choices.row_block(hidden),
        HOW=how,
        NORMALISE=normalise,
        **choices.arguments(choice),
    )
    return dx
