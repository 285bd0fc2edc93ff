"""GELU(x + bias), exact or by tanh, in one pass, and its gradients in another.

The gated form multiplies the GELU of the first half of the columns by the second half.

One program owns a tile of several rows, so that a piece of the bias is loaded once for all of them. In the backward a
bounded number of programs stride over the rows; each writes its sums for the bias, which are added up afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import bias_gelu_choices, choices, row_wise_choices, target
from fastbert.kernels.dispatch import Prepared, dispatch
from fastbert.kernels.pieces import (
    gelu_erf,
    gelu_erf_and_gradient,
    gelu_erf_half,
    gelu_erf_half_and_gradient,
    gelu_tanh,
    gelu_tanh_and_gradient,
    quantize,
)


@triton.jit
def bias_gelu_forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    x_stride_row,
    out_stride_row,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    GATED: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """See `bias_gelu_forward`; width is that of the result. With QUANTIZE, where a block holds a row whole, see
    `bias_gelu_quantize`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_column = column < width if MASK_COLUMNS else tl.full([BLOCK], True, tl.int1)
    row_offset = row.to(tl.int64)[:, None]
    mask = (row < rows)[:, None] & mask_column[None, :]

    x_ptrs = x_ptr + row_offset * x_stride_row + column[None, :]
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]  # [BLOCK]
    if TANH:
        out = gelu_tanh(z)
    elif out_ptr.dtype.element_ty == tl.float32:
        out = gelu_erf(z)
    else:
        out = gelu_erf_half(z)
    if GATED:
        gate = tl.load(x_ptrs + width, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if HAS_BIAS:
            gate += tl.load(bias_ptr + width + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]  # [BLOCK]
        out *= gate
    out_ptrs = out_ptr + row_offset * out_stride_row + column[None, :]
    if QUANTIZE:
        out, scale = quantize(out)  # [ROWS, BLOCK], [ROWS]; out is 0 beyond the width
        tl.store(scale_ptr + row, scale, mask=row < rows)  # [ROWS]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]


def bias_gelu_forward(x: Tensor, bias: Tensor | None, *, approximate: str = "none", gated: bool = False) -> Tensor:
    """Launch the forward kernel.

    Args:
        x: `[rows, width]`, gated `[rows, 2 * width]`, any strides; copied once if they are not 16-byte aligned.
        bias: `[width]`, gated `[2 * width]`, in the dtype of `x` or float32.
        approximate: "none" for erf, "tanh".
        gated: multiply the GELU of the first half of the columns by the second half.

    Returns:
        `[rows, width]` in the dtype of `x`.
    """
    x = target.aligned(x)
    bias = None if bias is None else bias.contiguous()
    return prepare_bias_gelu_forward(x, bias, approximate=approximate, gated=gated)(x, bias)


def prepare_bias_gelu_forward(
    x: Tensor, bias: Tensor | None, *, approximate: str = "none", gated: bool = False
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`bias_gelu_forward` as a function of tensors that are as these but for contents and rows, 16-byte aligned.

    Their rows must be of one `choices.number_kind`.
    """
    width = x.shape[1] // 2 if gated else x.shape[1]
    x_stride_row = x.stride(0)
    choice = bias_gelu_choices.bias_gelu_forward(width, x.dtype, target.of(x.device))
    blocks = -(-width // choice.BLOCK)
    start = Prepared(
        bias_gelu_forward_kernel,
        ROWS=choice.ROWS,
        BLOCK=choice.BLOCK,
        HAS_BIAS=bias is not None,
        TANH=approximate == "tanh",
        GATED=gated,
        MASK_COLUMNS=width % choice.BLOCK != 0,
        QUANTIZE=False,
        num_warps=choice.num_warps,
    )

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.shape[0]
        out = x.new_empty(rows, width)
        if rows > 0 and width > 0:
            start((-(-rows // choice.ROWS), blocks, 1), x, bias, out, None, x_stride_row, width, rows, width)
        return out

    return run


def bias_gelu_quantize(x: Tensor, bias: Tensor | None, *, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """Launch the forward kernel with one block a row, whose largest element is its scale.

    Takes the arguments of `bias_gelu_forward`, and returns its result before it is rounded, as `quantize_rows` does.
    """
    x = target.aligned(x)
    bias = None if bias is None else bias.contiguous()
    return prepare_bias_gelu_quantize(x, bias, approximate=approximate)(x, bias)


def prepare_bias_gelu_quantize(
    x: Tensor, bias: Tensor | None, *, approximate: str = "none"
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """`bias_gelu_quantize` as a function of tensors that are as these but for contents and rows, 16-byte aligned.

    Their rows must be of one `choices.number_kind`.
    """
    width, x_stride_row, block = x.shape[1], x.stride(0), choices.row_block(x.shape[1])
    choice = row_wise_choices.whole_rows(width, x.dtype, target.of(x.device))
    start = Prepared(
        bias_gelu_forward_kernel,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        TANH=approximate == "tanh",
        GATED=False,
        MASK_COLUMNS=width != block,
        QUANTIZE=True,
        **choices.arguments(choice),
    )

    def run(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = len(x)
        values = x.new_empty((rows, width), dtype=torch.float8_e4m3fn)
        scale = x.new_empty(rows, dtype=torch.float32)
        if rows > 0:
            start((-(-rows // choice.ROWS), 1, 1), x, bias, values, scale, x_stride_row, width, rows, width)
        return values, scale

    return run


@triton.jit
def bias_gelu_backward_kernel(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    dout_stride_row,
    x_stride_row,
    dx_stride_row,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    GATED: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    """See `bias_gelu_backward`; width is that of dout. dbias has the sums of each program, a row for each along x."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_column = column < width if MASK_COLUMNS else tl.full([BLOCK], True, tl.int1)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
        acc_dbias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS and GATED:
        gate_bias = tl.load(bias_ptr + width + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
        acc_dgate_bias = tl.zeros([BLOCK], tl.float32)

    first_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    dout_rows = dout_ptr + first_row * dout_stride_row  # [ROWS]
    x_rows = x_ptr + first_row * x_stride_row  # [ROWS]
    dx_rows = dx_ptr + first_row * dx_stride_row  # [ROWS]

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        mask = (first + tl.arange(0, ROWS) < rows)[:, None] & mask_column[None, :]
        x_ptrs = x_rows[:, None] + column[None, :]
        z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if HAS_BIAS:
            z += bias[None, :]
        dout_ptrs = dout_rows[:, None] + column[None, :]
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if TANH:
            gelu, slope = gelu_tanh_and_gradient(z)
        elif dx_ptr.dtype.element_ty == tl.float32:
            gelu, slope = gelu_erf_and_gradient(z)
        else:
            gelu, slope = gelu_erf_half_and_gradient(z)
        dx_ptrs = dx_rows[:, None] + column[None, :]
        if GATED:
            gate = tl.load(x_ptrs + width, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
            dgate = dout * gelu
            if HAS_BIAS:
                gate += gate_bias[None, :]
                acc_dgate_bias += tl.sum(dgate, 0)
            tl.store(dx_ptrs + width, dgate.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
            dout *= gate
        dx = dout * slope
        if HAS_BIAS:
            acc_dbias += tl.sum(dx, 0)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]
        dout_rows += step * dout_stride_row
        x_rows += step * x_stride_row
        dx_rows += step * dx_stride_row

    if HAS_BIAS:
        sums_ptrs = dbias_ptr + tl.program_id(0) * (2 * width if GATED else width) + column
        tl.store(sums_ptrs, acc_dbias, mask=mask_column)  # [BLOCK]
        if GATED:
            tl.store(sums_ptrs + width, acc_dgate_bias, mask=mask_column)  # [BLOCK]


def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, *, approximate: str = "none", gated: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel, which computes the result's derivative again from `x`.

    Args:
        dout: `[rows, width]`, the gradient of the result.
        x, bias, approximate, gated: what the forward was given.

    Returns:
        The gradient of x, in its shape and dtype, and that of the bias, float32 in its shape, or `[0]` without bias.
    """
    rows, width = dout.shape
    dout, x = target.aligned(dout), target.aligned(x)
    dx = x.new_empty(x.shape)
    bias_width = 0 if bias is None else len(bias)
    if dx.numel() == 0:
        return dx, torch.zeros(bias_width, dtype=torch.float32, device=x.device)
    choice = bias_gelu_choices.bias_gelu_backward(width, x.dtype, target.of(x.device), gated=gated)
    programs = min(choice.PROGRAMS, -(-rows // choice.ROWS))
    sums = x.new_empty((programs, bias_width), dtype=torch.float32)
    dispatch(
        bias_gelu_backward_kernel,
        (programs, -(-width // choice.BLOCK), 1),
        dout,
        x,
        None if bias is None else bias.contiguous(),
        dx,
        None if bias is None else sums,
        dout.stride(0),
        x.stride(0),
        dx.stride(0),
        rows,
        width,
        ROWS=choice.ROWS,
        BLOCK=choice.BLOCK,
        HAS_BIAS=bias is not None,
        TANH=approximate == "tanh",
        GATED=gated,
        MASK_COLUMNS=width % choice.BLOCK != 0,
        num_warps=choice.num_warps,
    )
    return dx, sums.sum(0)
