"""GELU(x + bias), exact or by tanh, in one pass.

One program owns a tile of several rows, so that a piece of the bias is loaded once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch, target
from fastbert.kernels.pieces import gelu_erf, gelu_erf_half, gelu_tanh


@triton.jit
def bias_gelu_forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    x_stride_row,
    out_stride_row,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    """See `bias_gelu_forward`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_offset = row.to(tl.int64)[:, None]
    mask = (row < rows)[:, None]
    if MASK_COLUMNS:
        mask = mask & (column < width)[None, :]

    x_ptrs = x_ptr + row_offset * x_stride_row + column[None, :]
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_BIAS:
        if MASK_COLUMNS:
            bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)  # [BLOCK]
        else:
            bias = tl.load(bias_ptr + column)  # [BLOCK]
        z += bias.to(tl.float32)[None, :]
    if TANH:
        out = gelu_tanh(z)
    elif out_ptr.dtype.element_ty == tl.float32:
        out = gelu_erf(z)
    else:
        out = gelu_erf_half(z)
    out_ptrs = out_ptr + row_offset * out_stride_row + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]


def bias_gelu_forward(x: Tensor, bias: Tensor | None, *, approximate: str = "none") -> Tensor:
    """Launch the forward kernel.

    Args:
        x: `[rows, width]`, any strides; copied once if they are not 16-byte aligned.
        bias: `[width]`, in the dtype of `x` or float32.
        approximate: "none" for erf, "tanh".

    Returns:
        `[rows, width]` in the dtype of `x`.
    """
    rows, width = x.shape
    x = target.aligned(x)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    choice = launch.bias_gelu_forward(width, x.dtype, target.of(x.device))
    with target.guard(x):
        bias_gelu_forward_kernel[(triton.cdiv(rows, choice.ROWS), triton.cdiv(width, choice.BLOCK))](
            x,
            None if bias is None else bias.contiguous(),
            out,
            x.stride(0),
            out.stride(0),
            rows,
            width,
            ROWS=choice.ROWS,
            BLOCK=choice.BLOCK,
            HAS_BIAS=bias is not None,
            TANH=approximate == "tanh",
            MASK_COLUMNS=width % choice.BLOCK != 0,
            num_warps=choice.num_warps,
        )
    return out
