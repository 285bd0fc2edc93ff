"""The table that keeps attention's grid dense for ragged batches: (sequence, first row in it) of each tile.

A program owns a sequence and writes its entries. Where they begin needs no sum over the sequences before it: the
entries of sequence `i` begin at `cu_seqlens[i] // BLOCK_M + i`, which leaves each sequence room for its last, partly
filled tile. What is left of the room is spare, and so is what lies behind the last sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.dispatch import dispatch

# Entries that a program writes at once, and its warps: a sequence has few.
ENTRIES, WARPS = 32, 1


@triton.jit
def tile_table_kernel(cu_seqlens_ptr, table_ptr, batch, tiles, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """See `tile_table`. The program after those of the sequences writes the spare entries at the end."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < batch, other=0)
    first = begin // BLOCK_M + sequence
    last = tl.where(sequence < batch, end // BLOCK_M + sequence + 1, tiles)
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        row = (entry - first) * BLOCK_M
        owner = tl.where(row < end - begin, sequence, -1)
        mask_entry = entry < last
        tl.store(table_ptr + 2 * entry, owner, mask=mask_entry)  # [BLOCK]
        tl.store(table_ptr + 2 * entry + 1, row, mask=mask_entry)  # [BLOCK]


def tile_table(cu_seqlens: Tensor, tiles: int, *, block_m: int) -> Tensor:
    """Launch the kernel.

    Args:
        cu_seqlens: int32 `[batch + 1]`.
        tiles: `rows // block_m + batch`, for `rows` of at least `cu_seqlens[-1]`.
        block_m: rows of a tile, a power of two.

    Returns:
        int32 `[tiles, 2]`.
    """
    batch = len(cu_seqlens) - 1
    table = cu_seqlens.new_empty((tiles, 2), dtype=torch.int32)
    if tiles > 0:
        dispatch(
            tile_table_kernel,
            (batch + 1, 1, 1),
            cu_seqlens,
            table,
            batch,
            tiles,
            BLOCK_M=block_m,
            BLOCK=ENTRIES,
            num_warps=WARPS,
        )
    return table
