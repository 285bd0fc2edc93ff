"""Each row of a hidden state in e4m3 with one scale, for the products of fp8.

It stands alone where the kernel before can't do this in passing: attention, whose programs own one head of a row each,
and the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import choices, row_wise_choices, target
from fastbert.kernels.dispatch import Prepared
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
    x = target.aligned(x)
    return prepare_quantize_rows(x)(x)


def prepare_quantize_rows(x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`quantize_rows` as a function of tensors that are as this one but for contents and rows, 16-byte aligned.

    Their rows must be of one `choices.number_kind`.
    """
    width, x_stride_row = x.shape[1], x.stride(0)
    choice = row_wise_choices.whole_rows(width, x.dtype, target.of(x.device))
    start = Prepared(quantize_rows_kernel, WIDTH=width, BLOCK=choices.row_block(width), **choices.arguments(choice))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(x)
        values = x.new_empty((rows, width), dtype=torch.float8_e4m3fn)
        scale = x.new_empty(rows, dtype=torch.float32)
        if rows > 0:
            start((-(-rows // choice.ROWS), 1, 1), x, values, scale, x_stride_row, width, rows)
        return values, scale

    return run
