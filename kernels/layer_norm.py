"""LN(residual + dropout(x + x_bias)) in one pass over a packed hidden state, and its gradients in another.

One program holds ROWS rows whole, so that the variance takes its second pass over registers. Up to 1024 columns a row
belongs to one warp: its sums are shuffles, without shared memory or barriers. In training the forward also writes the
sum that it normalises, which the backward reads in place of x, x_bias and residual: as many bytes in all, and fewer
registers. In the backward a bounded number of programs stride over the rows; each writes one row of sums for the
parameters, which are then added up: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import choices, row_wise_choices, target
from fastbert.kernels.dispatch import Prepared, dispatch
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.kernels.pieces import keep_mask, moments, normalise, normalise_gradient, quantize


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    x_bias_ptr,
    seed_ptr,
    out_rows_ptr,
    out_ptr,
    total_ptr,
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
    HAS_OUT_ROWS: tl.constexpr,
    STORE_STATS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """See `layer_norm_forward`; rows of total and values are as far apart as those of out."""
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
    offset = row_offset * out_stride_row + column[None, :]
    out_ptrs = out_ptr + offset
    if HAS_OUT_ROWS:
        out_row = tl.load(out_rows_ptr + row, mask=mask_row, other=0)  # [ROWS]
        out_ptrs = out_ptr + out_row[:, None] * out_stride_row + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
    if STORE_STATS:
        if HAS_RESIDUAL or HAS_X_BIAS or HAS_DROPOUT:
            total = x.to(out_ptr.dtype.element_ty)
            tl.store(total_ptr + offset, total, mask=mask)  # [ROWS, BLOCK]
            # Of the sum as it was rounded: a row of nearly equal values has no others that fit it.
            mean, _, variance = moments(total.to(tl.float32), mask_column[None, :], HIDDEN)
            rstd = tl.rsqrt(variance + eps)
        tl.store(mean_ptr + row, mean, mask=mask_row)  # [ROWS]
        tl.store(rstd_ptr + row, rstd, mask=mask_row)  # [ROWS]
    if QUANTIZE:
        values, scale = quantize(out)  # [ROWS, BLOCK], [ROWS]; out is 0 beyond HIDDEN
        tl.store(values_ptr + offset, values, mask=mask)  # [ROWS, BLOCK]
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
    out_rows: Tensor | None = None,
    out_size: int = 0,
    store_stats: bool = False,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x, residual: `[rows, hidden]` of one dtype, any strides; copied once if they are not 16-byte aligned.
        weight, bias, x_bias: `[hidden]`, in the dtype of `x` or float32.
        dropout, seed, eps: as in `fastbert.ops.layer_norm`.
        out_rows: int64 `[rows]`, no two alike: the row of each in a result of `out_size` rows, 0 elsewhere.
        store_stats: whether to store what the backward reads: total, mean and rstd.
        quantized: float8_e4m3fn `[rows, hidden]`, contiguous, and float32 `[rows]` <- the result before it is rounded,
            as `quantize_rows` gives it.

    Returns:
        out `[rows, hidden]`, or `[out_size, hidden]`, in the dtype of `x`; total, what is normalised, `[rows, hidden]`
        likewise, or `[0]` where it is `x` or not stored; mean and rstd float32 `[rows]`, or `[0]`.
    """
    x = target.aligned(x)
    residual = None if residual is None else target.aligned(residual)
    x_bias = None if x_bias is None else x_bias.contiguous()
    run = prepare_layer_norm_forward(
        x, residual=residual, x_bias=x_bias, dropout=dropout, eps=eps, out_rows=out_rows, out_size=out_size,
        store_stats=store_stats, quantize=quantized is not None,
    )  # fmt: skip
    return run(x, weight.contiguous(), bias.contiguous(), residual, x_bias, seed, out_rows, *(quantized or ()))


def prepare_layer_norm_forward(
    x: Tensor,
    *,
    residual: Tensor | None,
    x_bias: Tensor | None,
    dropout: float = 0.0,
    eps: float,
    out_rows: Tensor | None = None,
    out_size: int = 0,
    store_stats: bool = False,
    quantize: bool = False,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`layer_norm_forward` as a function of tensors that are as these but for contents and rows, 16-byte aligned.

    The rows of all must be of one `choices.number_kind`, and as many as here if there are `out_rows`. It takes x,
    weight, bias, residual, x_bias, seed, out_rows and the two of `quantized`; those left out at the end are None. What
    it need not store it returns as the same empty tensors each time.
    """
    hidden = x.shape[1]
    x_stride_row, residual_stride_row = x.stride(0), 0 if residual is None else residual.stride(0)
    size = None if out_rows is None or out_size == len(x) else out_size
    stores_total = store_stats and (residual is not None or x_bias is not None or dropout > 0.0)
    nothing = x.new_empty(0), x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    dropped = drop_threshold(dropout), drop_scale(dropout)
    choice = row_wise_choices.layer_norm_forward(hidden, x.dtype, target.of(x.device))
    start = Prepared(
        layer_norm_forward_kernel,
        HIDDEN=hidden,
        ROWS=choice.ROWS,
        BLOCK=choices.row_block(hidden),
        HAS_RESIDUAL=residual is not None,
        HAS_X_BIAS=x_bias is not None,
        HAS_DROPOUT=dropout > 0.0,
        HAS_OUT_ROWS=out_rows is not None,
        STORE_STATS=store_stats,
        QUANTIZE=quantize,
        num_warps=choice.num_warps,
    )

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        x_bias: Tensor | None,
        seed: Tensor | None = None,
        out_rows: Tensor | None = None,
        values: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = x.shape[0]
        out = x.new_empty(rows, hidden) if size is None else x.new_zeros((size, hidden))
        total, mean, rstd = nothing
        if stores_total:
            total = x.new_empty((rows, hidden))
        if store_stats:
            mean, rstd = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
        if rows > 0:
            start(
                (-(-rows // choice.ROWS), 1, 1),
                x, weight, bias, residual, x_bias, seed, out_rows, out, total, mean, rstd, values, scale, x_stride_row,
                residual_stride_row, hidden, rows, eps, *dropped,
            )  # fmt: skip
        return out, total, mean, rstd

    return run


@triton.jit
def layer_norm_backward_kernel(
    dout_ptr,
    total_ptr,
    weight_ptr,
    out_rows_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dx_bias_ptr,
    dout_stride_row,
    total_stride_row,
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
    HAS_OUT_ROWS: tl.constexpr,
):
    """See `layer_norm_backward`. dweight, dbias and dx_bias are the sums of each program, `[programs, HIDDEN]`."""
    column = tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    acc_dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUM_BIASES:
        acc_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUM_BIASES and HAS_X_BIAS:
        acc_dx_bias = tl.zeros([ROWS, BLOCK], tl.float32)

    # Rows are found by steps from the first: a product of 64 bits a row and tensor is a tenth of all instructions.
    first_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    total_rows = total_ptr + first_row * total_stride_row  # [ROWS]
    dout_rows = dout_ptr + first_row * dout_stride_row  # [ROWS]
    dx_row_offset = first_row * dx_stride_row  # [ROWS]

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask_row = row < rows
        mask = mask_row[:, None] & mask_column[None, :]
        total = tl.load(total_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        mean = tl.load(mean_ptr + row, mask=mask_row, other=0.0)  # [ROWS]
        rstd = tl.load(rstd_ptr + row, mask=mask_row, other=0.0)  # [ROWS]; 0 makes a masked row's gradient 0

        normal = (total - mean[:, None]) * rstd[:, None]
        if HAS_OUT_ROWS:
            out_row = tl.load(out_rows_ptr + row, mask=mask_row, other=0)  # [ROWS]
            dout_rows = dout_ptr + out_row * dout_stride_row  # [ROWS]
        dout = tl.load(dout_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        acc_dweight = tl.fma(dout, normal, acc_dweight)
        if SUM_BIASES:
            acc_dbias += dout
        # The weight is read again for each row, from the cache: the sums leave no registers to keep it in.
        weight = tl.load(weight_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
        dx = normalise_gradient(dout, normal, mask_column[None, :], weight, rstd, HIDDEN)  # [ROWS, BLOCK]
        dx_offset = dx_row_offset[:, None] + column[None, :]
        if HAS_DROPOUT:
            if HAS_RESIDUAL:
                tl.store(dresidual_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
            keep = keep_mask(tl.load(seed_ptr), row, 0, 0, 0, drop_threshold, BLOCK)  # [ROWS, BLOCK]
            dx = tl.where(keep, dx * drop_scale, 0.0)
        if SUM_BIASES and HAS_X_BIAS:
            acc_dx_bias += dx
        tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
        total_rows += step * total_stride_row
        dout_rows += step * dout_stride_row
        dx_row_offset += step * dx_stride_row

    sums = tl.program_id(0) * HIDDEN + column
    tl.store(dweight_ptr + sums, tl.sum(acc_dweight, 0), mask=mask_column)  # [BLOCK]
    if SUM_BIASES:
        tl.store(dbias_ptr + sums, tl.sum(acc_dbias, 0), mask=mask_column)  # [BLOCK]
    if SUM_BIASES and HAS_X_BIAS:
        tl.store(dx_bias_ptr + sums, tl.sum(acc_dx_bias, 0), mask=mask_column)  # [BLOCK]


def layer_norm_backward(
    dout: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual: bool,
    x_bias: bool,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel.

    Args:
        dout: the gradient of the result, with as many rows.
        total: `[rows, hidden]`, what was normalised: the forward's total, or x where nothing was added to it.
        mean, rstd: float32 `[rows]`, what the forward stored.
        weight, dropout, seed, out_rows: what the forward was given.
        residual, x_bias: whether it was given these.

    Returns:
        The gradient of x, `[rows, hidden]`, and that of residual, both in the dtype of `total`; the latter is `[0]`
        where there is no residual, and where dropout is off, because it is then that of x. Those of weight, bias and,
        where there is one, x_bias: float32 `[2 or 3, hidden]`.
    """
    rows, hidden = total.shape
    dout, total = target.aligned(dout), target.aligned(total)
    dx = total.new_empty((rows, hidden))
    dresidual = torch.empty_like(dx) if residual and dropout > 0.0 else dx.new_empty(0)
    choice = row_wise_choices.layer_norm_backward(hidden, total.dtype, target.of(total.device))
    programs = min(choice.PROGRAMS, -(-rows // choice.ROWS))
    sum_biases = hidden <= 4096  # wider rows leave registers for one sum, so torch adds up dout and dx
    parameters = 1 if not sum_biases else 3 if x_bias else 2
    sums = total.new_empty((parameters, programs, hidden), dtype=torch.float32)
    if rows > 0:
        dispatch(
            layer_norm_backward_kernel,
            (programs, 1, 1),
            dout,
            total,
            weight.contiguous(),
            out_rows,
            mean,
            rstd,
            seed,
            dresidual,
            dx,
            sums[0],
            sums[1] if sum_biases else None,
            sums[2] if sum_biases and x_bias else None,
            dout.stride(0),
            total.stride(0),
            dx.stride(0),
            rows,
            drop_threshold(dropout),
            drop_scale(dropout),
            HIDDEN=hidden,
            BLOCK=choices.row_block(hidden),
            HAS_RESIDUAL=residual,
            HAS_X_BIAS=x_bias,
            SUM_BIASES=sum_biases,
            HAS_DROPOUT=dropout > 0.0,
            HAS_OUT_ROWS=out_rows is not None,
            **choices.arguments(choice),
        )
    dparameters = sums.sum(1)
    if not sum_biases:
        dout = dout if out_rows is None else dout.index_select(0, out_rows)
        gradients = [dout, dx] if x_bias else [dout]
        wide = [gradient.sum(0, keepdim=True, dtype=torch.float32) for gradient in gradients]
        dparameters = torch.cat([dparameters, *wide])
    return dx, dresidual, dparameters
