"""The table of attention's tiles: every row of every sequence has one tile, and the rest of the table is spare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert import backend
from fastbert.ops.attention import attention
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing

LENGTHS = [[], [0], [0, 0], [1], [1, 5, 0, 130, 64], [64, 64], [63, 65, 1, 2048], [3] * 70, [0, 0, 4096, 0]]


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, nan_empty: None) -> str:
    """Which path makes the table."""
    return str(request.param)


@pytest.mark.parametrize("block_m", [1, 2, 3, 16, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_row_of_every_sequence_has_one_tile(lengths: list[int], block_m: int, path: str) -> None:
    packing = Packing.from_lengths(lengths)
    with backend.use_backend(path):
        tiles = tile_table(packing, block_m)
    assert tiles.dtype == torch.int32
    assert tiles.shape == (packing.tokens // block_m + packing.batch, 2)
    owned = [(sequence, first) for sequence, first in tiles.tolist() if sequence >= 0]
    assert owned == [(i, first) for i, length in enumerate(lengths) for first in range(0, length, block_m)]
    assert {sequence for sequence, _ in tiles.tolist() if sequence < 0} <= {-1}


@pytest.mark.parametrize("block_m", [16, 64])
def test_slack_behind_the_last_sequence_is_spare(block_m: int, path: str) -> None:
    """As in a CUDA graph, whose table is of the bucket's size and whose lengths change."""
    cu_seqlens = torch.tensor([0, 70, 71, 200, 200, 200], dtype=torch.int32)
    packing = Packing.made_right(cu_seqlens, 256, torch.arange(1024), (5, 256))
    with backend.use_backend(path):
        tiles = tile_table(packing, block_m).tolist()
    owned = [(sequence, first) for sequence, first in tiles if sequence >= 0]
    lengths = cu_seqlens.diff().tolist()
    assert owned == [(i, first) for i, length in enumerate(lengths) for first in range(0, length, block_m)]


def test_the_table_is_kept_for_the_next_layer(path: str) -> None:
    packing = Packing.from_lengths([5, 9])
    with backend.use_backend(path):
        assert tile_table(packing, 16) is tile_table(packing, 16)
        assert tile_table(packing, 32) is not tile_table(packing, 16)
        assert tile_table(Packing.from_lengths([5, 9]), 16) is not tile_table(packing, 16)


def test_both_paths_make_the_same_table() -> None:
    tables = []
    for path in ("torch", "triton"):
        with backend.use_backend(path):
            tables.append(tile_table(Packing.from_lengths([17, 0, 300, 1]), 32))
    assert torch.equal(*tables)


def test_a_batch_costs_one_launch_for_each_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbert.kernels import tile_table as kernel

    launched: list[int] = []
    dispatch = kernel.dispatch

    def noted(*arguments: Any, **constexprs: Any) -> None:
        launched.append(constexprs["BLOCK_M"])
        dispatch(*arguments, **constexprs)

    monkeypatch.setattr(kernel, "dispatch", noted)
    packing = Packing.from_lengths([5, 9, 0])
    with backend.use_backend("triton"), torch.no_grad():
        for _ in range(3):
            attention(torch.randn(14, 3, 2, 16), packing)
    assert len(launched) == 1
