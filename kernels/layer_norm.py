"""LN(residual + dropout(x + x_bias)) in one pass over a packed hidden state, and its gradients in another.

One program holds ROWS rows whole, so that the variance takes its second pass over registers. Up to 1024 columns a row
belongs to one warp: its sums are shuffles, without shared memory or barriers. In the backward a bounded number of
programs stride over the rows; each writes one row of sums for the parameters, which are then added up: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch, target
from fastbert.kernels.pieces import keep_mask, normalise, normalise_gradient, quantize


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    x_bias_ptr,
    seed_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    values_ptr,
    scale_ptr,
    x_stride_row,
    residual_stride_row,
    out_stride_row,
    rows,
    eps,
    drop_threshold,
    drop_scale,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_STATS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """See `layer_norm_forward`; values and out have one layout."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask_row = row < rows
    mask_column = column < HIDDEN
    mask = mask_row[:, None] & mask_column[None, :]
    row_offset = row.to(tl.int64)[:, None]

    x_ptrs = x_ptr + row_offset * x_stride_row + column[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_X_BIAS:
        x += tl.load(x_bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]  # [BLOCK]
    if HAS_DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), row, 0, 0, 0, drop_threshold, BLOCK)  # [ROWS, BLOCK]
        x = tl.where(keep, x * drop_scale, 0.0)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row_offset * residual_stride_row + column[None, :]
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    weight = tl.load(weight_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
    bias = tl.load(bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]

    out, mean, rstd = normalise(x, mask_column[None, :], weight, bias, eps, HIDDEN)  # [ROWS, BLOCK]
    out_ptrs = out_ptr + row_offset * out_stride_row + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
    if STORE_STATS:
        tl.store(mean_ptr + row, mean, mask=mask_row)  # [ROWS]
        tl.store(rstd_ptr + row, rstd, mask=mask_row)  # [ROWS]
    if QUANTIZE:
        values, scale = quantize(out)  # [ROWS, BLOCK], [ROWS]; out is 0 beyond HIDDEN
        tl.store(values_ptr + row_offset * out_stride_row + column[None, :], values, mask=mask)  # [ROWS, BLOCK]
        tl.store(scale_ptr + row, scale, mask=mask_row)  # [ROWS]


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float,
    store_stats: bool = False,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x, residual: `[rows, hidden]` of one dtype, any strides; copied once if they are not 16-byte aligned.
        weight, bias, x_bias: `[hidden]`, in the dtype of `x` or float32.
        dropout, seed, eps: as in `fastbert.ops.layer_norm`.
        store_stats: whether the backward will need mean and rstd.
        quantized: float8_e4m3fn `[rows, hidden]`, contiguous, and float32 `[rows]` <- the result before it is rounded,
            as `quantize_rows` gives it.

    Returns:
        out `[rows, hidden]` in the dtype of `x`; mean and rstd float32 `[rows]`, or `[0]`.
    """
    rows, hidden = x.shape
    x = target.aligned(x)
    residual = None if residual is None else target.aligned(residual)
    out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    mean = torch.empty(rows if store_stats else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return out, mean, rstd
    choice = launch.layer_norm_forward(hidden, x.dtype, target.of(x.device))
    with target.guard(x):
        layer_norm_forward_kernel[(triton.cdiv(rows, choice.ROWS),)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            residual,
            None if x_bias is None else x_bias.contiguous(),
            seed,
            out,
            mean,
            rstd,
            *((None, None) if quantized is None else quantized),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            rows,
            eps,
            launch.drop_threshold(dropout),
            launch.drop_scale(dropout),
            HIDDEN=hidden,
            ROWS=choice.ROWS,
            BLOCK=launch.row_block(hidden),
            HAS_RESIDUAL=residual is not None,
            HAS_X_BIAS=x_bias is not None,
            HAS_DROPOUT=dropout > 0.0,
            STORE_STATS=store_stats,
            QUANTIZE=quantized is not None,
            num_warps=choice.num_warps,
        )
    return out, mean, rstd


@triton.jit
def layer_norm_backward_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    x_bias_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dx_bias_ptr,
    dout_stride_row,
    x_stride_row,
    residual_stride_row,
    dx_stride_row,
    rows,
    drop_threshold,
    drop_scale,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    SUM_BIASES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """See `layer_norm_backward`. dweight, dbias and dx_bias are the sums of each program, `[programs, HIDDEN]`."""
    column = tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    acc_dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUM_BIASES:
        acc_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUM_BIASES and HAS_X_BIAS:
        acc_dx_bias = tl.zeros([ROWS, BLOCK], tl.float32)

    # What stays the same from row to row is cheaper to compute again than to keep: no loop-invariant code motion.
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, disable_licm=True):
        row = first + tl.arange(0, ROWS)
        mask_row = row < rows
        mask = mask_row[:, None] & mask_column[None, :]
        row_offset = row.to(tl.int64)[:, None]
        z = tl.load(x_ptr + row_offset * x_stride_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_X_BIAS:
            z += tl.load(x_bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]  # [BLOCK]
        if HAS_DROPOUT:
            keep = keep_mask(tl.load(seed_ptr), row, 0, 0, 0, drop_threshold, BLOCK)  # [ROWS, BLOCK]
            z = tl.where(keep, z * drop_scale, 0.0)
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + row_offset * residual_stride_row + column[None, :]
            z += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        mean = tl.load(mean_ptr + row, mask=mask_row, other=0.0)  # [ROWS]
        rstd = tl.load(rstd_ptr + row, mask=mask_row, other=0.0)  # [ROWS]; 0 makes a masked row's gradient 0

        normal = (z - mean[:, None]) * rstd[:, None]
        dout_ptrs = dout_ptr + row_offset * dout_stride_row + column[None, :]
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        acc_dweight = tl.fma(dout, normal, acc_dweight)
        if SUM_BIASES:
            acc_dbias += dout
        # Parameters are read again for each row, from the cache: the sums leave no registers to keep them in.
        weight = tl.load(weight_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
        dx = normalise_gradient(dout, normal, weight, rstd, HIDDEN)  # [ROWS, BLOCK]
        dx_offset = row_offset * dx_stride_row + column[None, :]
        if HAS_DROPOUT:
            if HAS_RESIDUAL:
                tl.store(dresidual_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
            dx = tl.where(keep, dx * drop_scale, 0.0)
        if SUM_BIASES and HAS_X_BIAS:
            acc_dx_bias += dx
        tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]

    sums = tl.program_id(0) * HIDDEN + column
    tl.store(dweight_ptr + sums, tl.sum(acc_dweight, 0), mask=mask_column)  # [BLOCK]
    if SUM_BIASES:
        tl.store(dbias_ptr + sums, tl.sum(acc_dbias, 0), mask=mask_column)  # [BLOCK]
    if SUM_BIASES and HAS_X_BIAS:
        tl.store(dx_bias_ptr + sums, tl.sum(acc_dx_bias, 0), mask=mask_column)  # [BLOCK]


def layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; the sum that is normalised is computed again from `x` and `residual`.

    Args:
        dout: `[rows, hidden]`, the gradient of the result.
        x, weight, residual, x_bias, dropout, seed: what the forward was given.
        mean, rstd: float32 `[rows]`, what it stored.

    Returns:
        The gradient of x, `[rows, hidden]`, and that of residual, both in the dtype of `x`; the latter is `[0]` where
        there is no residual, and where dropout is off, because it is then that of x. Those of weight, bias and, where
        there is one, x_bias: float32 `[2 or 3, hidden]`.
    """
    rows, hidden = x.shape
    dout, x = target.aligned(dout), target.aligned(x)
    residual = None if residual is None else target.aligned(residual)
    dx = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    dresidual = torch.empty_like(dx) if residual is not None and dropout > 0.0 else dx.new_empty(0)
    choice = launch.layer_norm_backward(hidden, x.dtype, target.of(x.device))
    programs = min(choice.PROGRAMS, triton.cdiv(rows, choice.ROWS))
    sum_biases = hidden <= 4096  # wider rows leave registers for one sum, so torch adds up dout and dx
    parameters = 1 if not sum_biases else 2 if x_bias is None else 3
    sums = torch.empty((parameters, programs, hidden), dtype=torch.float32, device=x.device)
    if rows > 0:
        with target.guard(x):
            layer_norm_backward_kernel[(programs,)](
                dout,
                x,
                weight.contiguous(),
                residual,
                None if x_bias is None else x_bias.contiguous(),
                seed,
                mean,
                rstd,
                dresidual,
                dx,
                sums[0],
                sums[1] if sum_biases else None,
                sums[2] if sum_biases and x_bias is not None else None,
                dout.stride(0),
                x.stride(0),
                0 if residual is None else residual.stride(0),
                dx.stride(0),
                rows,
                launch.drop_threshold(dropout),
                launch.drop_scale(dropout),
                HIDDEN=hidden,
                BLOCK=launch.row_block(hidden),
                HAS_RESIDUAL=residual is not None,
                HAS_X_BIAS=x_bias is not None,
                SUM_BIASES=sum_biases,
                HAS_DROPOUT=dropout > 0.0,
                **launch.arguments(choice),
            )
    dparameters = sums.sum(1)
    if not sum_biases:
        gradients = [dout] if x_bias is None else [dout, dx]
        wide = [gradient.sum(0, keepdim=True, dtype=torch.float32) for gradient in gradients]
        dparameters = torch.cat([dparameters, *wide])
    return dx, dresidual, dparameters
