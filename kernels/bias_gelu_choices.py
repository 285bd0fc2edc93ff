"""Launch choices of bias_gelu."""

from __future__ import annotations

import torch

from fastbert.kernels.choices import DTYPE_NAMES, Block, Described, StridedBlock, measured_first, row_block
from fastbert.kernels.target import Target


@measured_first
def bias_gelu_forward(width: int, dtype: torch.dtype, target: Target) -> Described[Block]:
    """The choice for rows of `width` columns: 4 rows of the widest block that divides them, with 32 elements a lane.

    A block that does not divide them needs masks, so it is small, with 8 elements a lane.
    """
    return _block(width), target, f"width={width},dtype={DTYPE_NAMES[dtype]}"


@measured_first
def bias_gelu_backward(
    width: int, dtype: torch.dtype, target: Target, *, gated: bool = False
) -> Described[StridedBlock]:
    """The tiles of `bias_gelu_forward`, and programs for 4096 warps in all: 32 on each of 128 multiprocessors.

    Gated, which holds five tensors and not three, half the rows of wide blocks, and of widths not divisible by 16.
    """
    tile = _block(width)
    rows = tile.ROWS // 2 if gated and (width % tile.BLOCK == 0 or width % 16) else tile.ROWS
    programs = max(1, 4096 // (-(-width // tile.BLOCK) * tile.num_warps))
    form = ",gated" if gated else ""
    default = StridedBlock(rows, tile.BLOCK, programs, tile.num_warps)
    return default, target, f"width={width},dtype={DTYPE_NAMES[dtype]}{form}"


def _block(width: int) -> Block:
    for block in (1024, 512, 256):
        if width % block == 0:
            return Block(ROWS=4, BLOCK=block, num_warps=block // 256)
    block = min(256, row_block(width))
    return Block(ROWS=4, BLOCK=block, num_warps=max(1, block // 64))
