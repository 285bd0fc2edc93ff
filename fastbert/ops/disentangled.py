"""disentangled: terms of attention's scores by relative positions (He et al. 2021, "DeBERTa").

They are made by matrix products and a gather, and given to attention as a bias of pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastbert.config import Disentangled
from fastbert.errors import ArgumentError
from fastbert.packing import Packing


def disentangled_bias(
    qkv: Tensor,
    packing: Packing,
    position_key: Tensor | None,
    position_query: Tensor | None,
    asked: Disentangled,
    *,
    first: int,
    scale: float,
) -> Tensor:
    """`scale * (query[row] . position_key[r] + key[column] . position_query[r])`, r the row of `row - column`.

    Args:
        qkv: floating `[rows, 3, heads, head_dim]`, rows >= `packing.tokens`.
        packing: where the sequences begin.
        position_key, position_query: in the dtype of `qkv`, `[number, heads, head_dim]`, of `number` rows of the table
            one after another; None for a term that is not asked for.
        asked: which row of the table a distance has.
        first: the row of the table that theirs begin with; they have all that `rows_of_distances` says.
        scale: factor on both.

    Returns:
        `[batch, heads, max_seqlen, max_seqlen]` in the dtype of `qkv`, finite and without meaning where the row or the
        column is no token. While it is made, it takes the memory of all padded pairs for each term.

    Raises:
        ArgumentError: neither of the two is given, or a shape or dtype is wrong.
    """
    places = packing.max_seqlen
    lowest, highest = rows_of_distances(places, asked)
    packing.check_rows("qkv", qkv)
    for name, positions in (("position_key", position_key), ("position_query", position_query)):
        if positions is not None:
            fits = positions.shape[1:] == qkv.shape[2:] and first <= lowest and highest < first + len(positions)
            if not fits or positions.dtype != qkv.dtype:
                got = f"{positions.dtype} of shape {tuple(positions.shape)} from row {first} on"
                wanted = f"{qkv.dtype} of shape [number, {qkv.shape[2]}, {qkv.shape[3]}], rows {lowest} to {highest}"
                raise ArgumentError(name, got, wanted)
    # [max_seqlen, max_seqlen], of row and column
    index = packing.kept(("disentangled", asked, first), lambda: rows_of_pairs(places, asked, qkv.device) - first)
    made = None
    if position_key is not None:
        made = _spread(qkv[:, 0], packing, position_key, index, scale)
    if position_query is not None:
        # a gather by an index that is not contiguous takes twice as long
        by_column = packing.kept(("disentangled by column", asked, first), lambda: index.t().contiguous())
        of_keys = _spread(qkv[:, 1], packing, position_query, by_column, scale).transpose(2, 3)
        made = of_keys if made is None else made.add_(of_keys)
    if made is None:
        raise ArgumentError("position_key", None, "one of position_key and position_query")
    return made.transpose(0, 1)


def _spread(x: Tensor, packing: Packing, positions: Tensor, index: Tensor, scale: float) -> Tensor:
    """`scale * x[i] . positions[index[i, j]]`, `[heads, batch, max_seqlen, max_seqlen]`, of packed `x`."""
    batch, places, heads = packing.batch, packing.max_seqlen, x.shape[1]
    grid = x.new_zeros(batch * places, *x.shape[1:]).index_copy(0, packing.grid, x[: packing.tokens])
    # [heads, batch * max_seqlen, number]
    products = torch.baddbmm(
        x.new_zeros(1, 1, 1), grid.transpose(0, 1), positions.permute(1, 2, 0), beta=0, alpha=scale
    )
    of_places = products.view(heads, batch, places, len(positions))
    return of_places.gather(3, index.expand(heads, batch, places, places))


def rows_of_distances(places: int, asked: Disentangled) -> tuple[int, int]:
    """The first and the last row of the table that sequences of up to so many tokens need."""
    if torch.compiler.is_compiling():  # which has no numbers to look at
        return 0, 2 * asked.span - 1
    return _needed(places, asked)


@lru_cache(maxsize=4096)
def _needed(places: int, asked: Disentangled) -> tuple[int, int]:
    most = max(places, 1)
    rows = rows_by_distance(torch.arange(1 - most, most, dtype=torch.int64, device="cpu"), asked)
    return int(rows.min()), int(rows.max())


def rows_of_pairs(places: int, asked: Disentangled, device: torch.device) -> Tensor:
    """int64 `[places, places]`: the row of the table for each pair, by how far the first is behind the second."""
    place = torch.arange(places, dtype=torch.int64, device="cpu")
    return rows_by_distance(place[:, None] - place, asked).to(device)


def rows_by_distance(distance: Tensor, asked: Disentangled) -> Tensor:
    """int64 as `distance`, on the CPU: its row of the table, as transformers' `make_log_bucket_position` has it.

    In float32, as there (`modeling_deberta_v2.py`): rounding decides where a bucket ends.
    """
    if asked.buckets is not None:
        half, far = asked.buckets // 2, distance.abs().clamp(min=asked.buckets // 2)
        widest = torch.tensor((asked.farthest - 1) / half, dtype=torch.float32, device="cpu").log()
        grown = ((far.float() / half).log() / widest * (half - 1)).ceil().long() + half
        distance = torch.where(distance.abs() <= half, distance, grown * distance.sign())
    return (distance + asked.span).clamp(0, 2 * asked.span - 1)
