"""The bias of relative positions: against its meaning in float64, and its rows against transformers' buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert import reference
from fastbert.config import Disentangled
from fastbert.errors import ArgumentError
from fastbert.ops.disentangled import disentangled_bias, rows_of_distances, rows_of_pairs
from fastbert.packing import Packing
from fastbert.testing import assert_close

HEADS, HEAD_DIM, SCALE = 3, 16, 0.2
ASKED = {
    "buckets": Disentangled(("c2p", "p2c"), 12, buckets=6),
    "distances": Disentangled(("c2p", "p2c"), 5),
    "c2p": Disentangled(("c2p",), 12, buckets=5),
    "p2c": Disentangled(("p2c",), 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[7, 1, 0, 17], [1], [4, 4], []], ids=str)
@pytest.mark.parametrize("asked", ASKED)
def test_forward_and_gradient(asked: str, lengths: list[int], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Of rows that lie apart, with poisoned slack; a part of the table gives what the whole of it does."""
    of, packing = ASKED[asked], Packing.from_lengths(lengths, device="cpu")
    rows, places, batch = packing.tokens, packing.max_seqlen, len(lengths)
    first, last = rows_of_distances(places, of)
    assert 0 <= first <= last < 2 * of.span
    given = torch.randn(rows + 2, 4, HEADS, HEAD_DIM, generator=generator).to(dtype)[:, :3]
    given[rows:] = torch.nan
    table = [torch.randn(2 * of.span, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in of.terms]
    real = torch.arange(places) < packing.lengths[:, None]
    pairs = (real[:, None, :, None] & real[:, None, None]).expand(batch, HEADS, places, places)
    dout = torch.randn(pairs.shape, generator=generator).to(dtype) * pairs

    def results(to: torch.dtype, how: str) -> list[torch.Tensor]:
        leaves = [x.detach().to(to).requires_grad_() for x in (given, *table)]
        qkv, *tables = leaves
        named = dict(zip(of.terms, tables, strict=True))
        if how == "reference":
            index = rows_of_pairs(places, of, qkv.device)
            made = reference.disentangled_bias(qkv, packing, named.get("c2p"), named.get("p2c"), index, SCALE)
        else:
            begin = first if how == "part" else 0
            named = {term: x[begin : last + 1] if how == "part" else x for term, x in named.items()}
            made = disentangled_bias(qkv, packing, named.get("c2p"), named.get("p2c"), of, first=begin, scale=SCALE)
        assert made.isfinite().all()
        dqkv, *dtables = torch.autograd.grad(made, leaves, dout.to(to))
        return [made[pairs], dqkv[:rows], *dtables]

    exact, plain = results(torch.float64, "reference"), results(dtype, "reference")
    for how in ("part", "whole"):
        for got, other, wanted in zip(results(dtype, how), plain, exact, strict=True):
            assert_close(got, other, wanted, factor=3.0, what=how)


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (8, 12), (5, 40), (2, 3), (32, 18), (None, 7)])
def test_rows_are_those_of_transformers(buckets: int | None, farthest: int) -> None:
    module: Any = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    of, places = Disentangled(("c2p",), farthest, buckets), 700
    grid = torch.zeros(1, places, 1)
    wanted = module.build_relative_position(grid, grid, -1 if buckets is None else buckets, farthest)[0] + of.span
    assert torch.equal(rows_of_pairs(places, of, torch.device("cpu")), wanted.clamp(0, 2 * of.span - 1))


def test_what_is_wrong_is_refused() -> None:
    of, packing = ASKED["buckets"], Packing.from_lengths([9], device="cpu")
    qkv, rows = torch.zeros(9, 3, HEADS, HEAD_DIM), torch.zeros(2 * of.span, HEADS, HEAD_DIM)
    for wrong in (rows[:4], rows[:, 1:], rows.half()):
        with pytest.raises(ArgumentError, match="position_query: got"):
            disentangled_bias(qkv, packing, rows, wrong, of, first=0, scale=SCALE)
    with pytest.raises(ArgumentError, match=r"position_key: got .* from row 2 on"):
        disentangled_bias(qkv, packing, rows, None, of, first=2, scale=SCALE)
    with pytest.raises(ArgumentError, match="one of position_key and position_query"):
        disentangled_bias(qkv, packing, None, None, of, first=0, scale=SCALE)
    for wrong_terms in ((), ("c2p", "c2p"), ("p2p",)):
        with pytest.raises(ArgumentError, match="terms"):
            Disentangled(wrong_terms, 4)  # type: ignore[arg-type]
