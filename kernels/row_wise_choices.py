"""Launch choices of the row-wise ops: layer_norm, embedding, pool, quantize_rows and rotary.

`row_wise_unserved`, of rotary `rotary_unserved`, must have said None before any is asked for.
"""

from __future__ import annotations

import torch

from fastbert.kernels.choices import (
    DTYPE_NAMES,
    Block,
    Described,
    Rows,
    StridedRows,
    dtype_unserved,
    family,
    measured_first,
    row_block,
)
from fastbert.kernels.target import Target

WIDEST_ROW = 8192
WIDEST_HEAD = 1024  # of rotary

BOTH_BLACKWELLS = ("sm_100", "sm_120")  # of two families of tiles, with one assembler's habits


def row_wise_unserved(width: int, dtype: torch.dtype) -> str | None:
    """Why the kernels that hold a row whole can't serve this shape, or None when they can."""
    if width > WIDEST_ROW:
        return f"a row of {width} columns is wider than {WIDEST_ROW}"
    return dtype_unserved(dtype)


def whole_rows(width: int, dtype: torch.dtype, target: Target) -> Rows:
    """The choice for what quantizes rows: a warp for every 1024 columns, and rows to give each lane 16 bytes."""
    columns = row_block(width)
    rows = max(1, target.warp_size * 16 // dtype.itemsize // columns)
    return Rows(rows, num_warps=max(1, columns // 1024))


def rotary_unserved(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel that turns heads can't serve this shape, or None when it can."""
    if head_dim > WIDEST_HEAD:
        return f"head_dim {head_dim} is wider than {WIDEST_HEAD}"
    return dtype_unserved(dtype)


def rotary(head_dim: int, target: Target) -> Rows:
    """The choice for what turns heads: 128 lanes, each with 8 columns, 16 bytes of half types."""
    lanes = 128
    return Rows(max(1, lanes * 8 // row_block(head_dim // 2)), num_warps=lanes // target.warp_size)


def _strided_rows(width: int, dtype: torch.dtype, target: Target) -> StridedRows:
    """The choice for a backward: as `whole_rows`, in 1024 warps, 8 on 128 multiprocessors.

    Two rows of 512 columns of half types share the weight and the work around it, but on sm_120 they spill. The sums
    for the parameters take registers too. Where one warp for 1024 columns would spill, in float32 and on RDNA, there
    are two; not for 8192 columns on NVIDIA, where 16 warps have fewer registers a lane. So too for 4096 columns on
    sm_100. At 4096 and 8192, at 1024 in float32, and at 512 and 1024 on both Blackwells, NVIDIA's assembler would
    rather spill than take more than 128, 80 and 168 registers.
    """
    whole = whole_rows(width, dtype, target)
    rows, warps = whole.ROWS, whole.num_warps
    columns = row_block(width)
    if columns == 512 and dtype != torch.float32 and family(target) != "rdna" and target.kin != "sm_120":
        rows = 2
    if columns >= 1024 and (family(target) == "rdna" or (dtype == torch.float32 and columns < 8192)):
        warps *= 2
    if columns == 4096 and family(target) == "blackwell" and dtype != torch.float32:
        warps *= 2
    thrifty = columns >= 4096 or (columns == 1024 and dtype == torch.float32)
    thrifty = thrifty or (columns in (512, 1024) and target.kin in BOTH_BLACKWELLS)
    return StridedRows(rows, 1024 // warps, warps, maxnreg=255 if thrifty and target.backend == "cuda" else 0)


def _of_width(hidden: int, dtype: torch.dtype) -> str:
    return f"hidden={hidden},dtype={DTYPE_NAMES[dtype]}"


@measured_first
def layer_norm_forward(hidden: int, dtype: torch.dtype, target: Target) -> Described[Rows]:
    """The choice for rows of `hidden` columns."""
    return whole_rows(hidden, dtype, target), target, _of_width(hidden, dtype)


@measured_first
def layer_norm_backward(hidden: int, dtype: torch.dtype, target: Target) -> Described[StridedRows]:
    """The choice for rows of `hidden` columns."""
    return _strided_rows(hidden, dtype, target), target, _of_width(hidden, dtype)


@measured_first
def embedding_forward(hidden: int, dtype: torch.dtype, target: Target) -> Described[Rows]:
    """The choice for rows of `hidden` columns."""
    return whole_rows(hidden, dtype, target), target, _of_width(hidden, dtype)


@measured_first
def embedding_backward(hidden: int, dtype: torch.dtype, target: Target) -> Described[StridedRows]:
    """The choice for rows of `hidden` columns."""
    return _strided_rows(hidden, dtype, target), target, _of_width(hidden, dtype)


@measured_first
def embedding_backward_table(hidden: int, dtype: torch.dtype, target: Target) -> Described[Block]:
    """The choice for the sums that make the gradient of a table: ROWS rows a step, 32 elements a lane.

    The tables have `hidden` columns, and the tokens' gradients `dtype`.
    """
    return Block(ROWS=4, BLOCK=min(256, row_block(hidden)), num_warps=1), target, _of_width(hidden, dtype)


@measured_first
def pool_forward(hidden: int, dtype: torch.dtype, target: Target, *, how: str, normalise: bool) -> Described[Block]:
    """The choice for rows of `hidden` columns: ROWS rows a step of a block of columns of one sequence.

    The first row alone ("cls") gets a warp for every 1024 columns, and a program for each of them unless normalised.
    All rows are read a line of 128 bytes wide, 64 of them a step. Where they are normalised a program is alone with a
    sequence, so it gets 512 lanes, each with 32 elements: four 16-byte loads of halves in flight. On both Blackwells
    it has 16, or the assembler spills rather than take more than 64 registers.
    """
    columns = row_block(hidden)
    if how == "cls":
        block = columns if normalise else min(1024, columns)
        regime, default = "first", Block(ROWS=1, BLOCK=block, num_warps=max(1, block // 1024))
    elif normalise:
        rows = max(1, min(64, 512 * (16 if target.kin in BOTH_BLACKWELLS else 32) // columns))
        regime, default = "whole", Block(ROWS=rows, BLOCK=columns, num_warps=512 // target.warp_size)
    else:
        regime, default = "line", Block(ROWS=64, BLOCK=_line(columns, dtype), num_warps=4)
    return default, target, f"{_of_width(hidden, dtype)},regime={regime}"


@measured_first
def pool_backward(hidden: int, dtype: torch.dtype, target: Target) -> Described[Block]:
    """The choice for rows of `hidden` columns; as in `pool_forward`, but never all columns."""
    return Block(ROWS=32, BLOCK=_line(row_block(hidden), dtype), num_warps=4), target, _of_width(hidden, dtype)


def _line(columns: int, dtype: torch.dtype) -> int:
    """Columns of a block that is a line of memory wide: 128 bytes, the L1 and L2 line of NVIDIA's and CDNA's GPUs."""
    return min(columns, 128 // dtype.itemsize)
