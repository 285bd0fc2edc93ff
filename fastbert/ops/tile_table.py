"""tile_table: which rows each program of attention owns. The torch path, and the Triton kernel as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert import backend
from fastbert.ops.common import launcher
from fastbert.packing import Packing


def tile_table(packing: Packing, block_m: int) -> Tensor:
    """int32 `[tiles, 2]`: `(sequence, first row in it)` of each tile of `block_m` rows.

    A ragged batch becomes a dense one-dimensional grid. The table is made on the device without a sync, so its size is
    the bound `tokens // block_m + batch`; spare entries carry sequence -1. Kept for the next layer.

    Args:
        block_m: rows of a tile, a power of two.
    """
    return packing.kept(("tile_table", block_m), lambda: _made(packing, block_m))


def _made(packing: Packing, block_m: int) -> Tensor:
    cu_seqlens, tiles = packing.cu_seqlens, packing.tokens // block_m + packing.batch
    if backend.uses_triton("tile_table", cu_seqlens, None):
        return launcher(tile_table_op, cu_seqlens)(cu_seqlens, tiles, block_m)
    # as in the kernel, whose docstring says why entries begin there
    numbers = torch.arange(packing.batch, dtype=torch.int32, device=cu_seqlens.device)
    begins = cu_seqlens[:-1] // block_m + numbers
    entry = torch.arange(tiles, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(begins, entry, right=True, out_int32=True) - 1
    row = (entry - begins.index_select(0, sequence)) * block_m
    sequence = sequence.where(row < packing.lengths.index_select(0, sequence), -1)
    return torch.stack([sequence, row], dim=1)


@torch.library.custom_op("fastbert::tile_table", mutates_args=())
def tile_table_op(cu_seqlens: Tensor, tiles: int, block_m: int) -> Tensor:
    """The Triton kernel; see `fastbert.kernels.tile_table.tile_table`."""
    from fastbert.kernels.tile_table import tile_table

    return tile_table(cu_seqlens, tiles, block_m=block_m)


@tile_table_op.register_fake
def _(cu_seqlens: Tensor, tiles: int, block_m: int) -> Tensor:
    return cu_seqlens.new_empty(tiles, 2)
