"""Each row of a hidden state in e4m3 with one scale, for the products of fp8.

It stands alone where the kernel before can't do this in passing: attention, whose programs own one head of a row each,
and the embeddings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch, target
from fastbert.kernels.dispatch import dispatch
from fastbert.kernels.pieces import quantize


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    x_stride_row,
    values_stride_row,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `quantize_rows`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask_row = row < rows
    mask = mask_row[:, None] & (column < WIDTH)[None, :]
    row_offset = row.to(tl.int64)[:, None]
    x_ptrs = x_ptr + row_offset * x_stride_row + column[None, :]
    values, scale = quantize(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32))  # [ROWS, BLOCK]
    tl.store(values_ptr + row_offset * values_stride_row + column[None, :], values, mask=mask)  # [ROWS, BLOCK]
    tl.store(scale_ptr + row, scale, mask=mask_row)  # [ROWS]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x: `[rows, width]`, any strides; copied once if they are not 16-byte aligned.

    Returns:
        Values, float8_e4m3fn `[rows, width]`, and scales, float32 `[rows]`: their product is about `x`.
    """
    rows, width = x.shape
    x = target.aligned(x)
    values = x.new_empty((rows, width), dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return values, scale
    choice = launch.quantize_rows(width, x.dtype, target.of(x.device))
    dispatch(
        quantize_rows_kernel,
        (-(-rows // choice.ROWS), 1, 1),
        x,
        values,
        scale,
        x.stride(0),
        values.stride(0),
        rows,
        WIDTH=width,
        BLOCK=launch.row_block(width),
        **launch.arguments(choice),
    )
    return values, scale
