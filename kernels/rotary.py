"""Rotary positions of queries and keys (Su et al. 2021, "RoFormer"), read from the QKV product once and written once.

A program owns ROWS tokens of one head, and its query, key and value. Cosines and sines come from a table that a batch
makes once for all its layers: far places need angles in float64, and then a kernel that has memory to wait for would
wait for arithmetic. Programs of neighbouring heads follow each other and find their rows of it in a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import choices, row_wise_choices, target
from fastbert.kernels.dispatch import dispatch


@triton.jit
def rotary_forward_kernel(
    qkv_ptr,
    angles_ptr,
    out_ptr,
    qkv_stride_row,
    qkv_stride_part,
    qkv_stride_head,
    rows,
    tokens,
    heads,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Queries and keys of ROWS rows of one head turned; values, and rows that are no tokens, copied."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < HALF)[None, :]
    is_token = (row < tokens)[:, None]
    row = row.to(tl.int64)[:, None]
    angles_ptrs = angles_ptr + row * HALF + column[None, :]
    cos = tl.load(angles_ptrs, mask=mask & is_token, other=0.0)  # [ROWS, BLOCK]
    sin = tl.load(angles_ptrs + tl.cast(tokens, tl.int64) * HALF, mask=mask & is_token, other=0.0)  # [ROWS, BLOCK]
    if INVERSE:
        sin = -sin
    in_ptrs = qkv_ptr + row * qkv_stride_row + head.to(tl.int64) * qkv_stride_head + column[None, :]
    out_ptrs = out_ptr + (row * (3 * heads) + head) * HEAD_DIM + column[None, :]
    dtype = out_ptr.dtype.element_ty
    for part in tl.static_range(3):
        part_ptrs = in_ptrs + part * qkv_stride_part
        one = tl.load(part_ptrs, mask=mask, other=0.0)  # [ROWS, BLOCK]
        other = tl.load(part_ptrs + HALF, mask=mask, other=0.0)  # [ROWS, BLOCK]
        if part < 2:
            wide_one, wide_other = one.to(tl.float32), other.to(tl.float32)
            one = tl.where(is_token, (wide_one * cos - wide_other * sin).to(dtype), one)
            other = tl.where(is_token, (wide_other * cos + wide_one * sin).to(dtype), other)
        part_ptrs = out_ptrs + part * heads * HEAD_DIM
        tl.store(part_ptrs, one, mask=mask)  # [ROWS, BLOCK]
        tl.store(part_ptrs + HALF, other, mask=mask)  # [ROWS, BLOCK]


def rotary_forward(qkv: Tensor, angles: Tensor, *, inverse: bool = False) -> Tensor:
    """Launch the kernel.

    Args:
        qkv: `[rows, 3, heads, head_dim]`, an even `head_dim`; copied once if the last stride is not 1.
        angles: float32 `[2, tokens, head_dim / 2]`, contiguous, of `reference.rotary_angles`; tokens <= rows.
        inverse: turn the other way, which is the gradient.

    Returns:
        `[rows, 3, heads, head_dim]`, contiguous, in the dtype of `qkv`; computed in float32 and rounded once. Values,
        and rows beyond the tokens, are as they were.
    """
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((rows, 3, heads, head_dim))
    if out.numel() == 0:
        return out
    choice = row_wise_choices.rotary(head_dim, target.of(qkv.device))
    dispatch(
        rotary_forward_kernel, (-(-rows // choice.ROWS) * heads, 1, 1),
        qkv, angles, out, *qkv.stride()[:3], rows, angles.shape[1], heads,
        HEAD_DIM=head_dim, BLOCK=choices.row_block(head_dim // 2), INVERSE=inverse, **choices.arguments(choice),
    )  # fmt: skip
    return out
