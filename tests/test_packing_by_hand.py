"""A `Packing` that a caller makes of its fields is right, or an error that names the field; kernels trust it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.model.body import BertModel
from fastbert.model.encoder import Encoder
from fastbert.ops.attention import attention
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.pooling import pool
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing


def ends(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def by_hand(**fields: Any) -> Packing:
    """Of two sequences of 8 tokens, but for the fields that are given."""
    right = {"cu_seqlens": ends(0, 8, 16), "max_seqlen": 8, "indices": torch.arange(16), "padded_shape": (2, 8)}
    return Packing(**{**right, **fields})


def one(length: int, **fields: Any) -> Packing:
    """Of one sequence of so many tokens, but for the fields that are given."""
    right = {"cu_seqlens": ends(0, length), "max_seqlen": length, "indices": torch.arange(length)}
    return Packing(**{"padded_shape": (1, length), **right, **fields})


# Each with the name of the field that is at fault. Those of probes/p2_packing.py first.
WRONG: dict[str, tuple[str, Callable[[], Packing]]] = {
    "the end is past the rows": ("cu_seqlens", lambda: by_hand(cu_seqlens=ends(0, 8, 20), max_seqlen=12)),
    "a million rows": ("cu_seqlens", lambda: one(16, cu_seqlens=ends(0, 10**6), max_seqlen=10**6)),
    "an end past the rows, a small max_seqlen": ("cu_seqlens", lambda: one(16, cu_seqlens=ends(0, 10**5))),
    "max_seqlen is 1": ("max_seqlen", lambda: one(16, max_seqlen=1)),
    "max_seqlen is 0": ("max_seqlen", lambda: one(16, max_seqlen=0)),
    "max_seqlen is small, the sequence long": ("max_seqlen", lambda: one(400, max_seqlen=8)),
    "max_seqlen is negative": ("max_seqlen", lambda: one(16, max_seqlen=-1000)),
    "max_seqlen is huge": ("max_seqlen", lambda: one(16, max_seqlen=10**9)),
    "a negative start": ("cu_seqlens", lambda: one(16, cu_seqlens=ends(-100, 16), max_seqlen=116)),
    "a very negative start": ("cu_seqlens", lambda: one(16, cu_seqlens=ends(-(10**8), 16))),
    "ends that fall": (
        "cu_seqlens",
        lambda: by_hand(cu_seqlens=ends(0, 12, 4, 16), max_seqlen=12, padded_shape=(3, 12)),
    ),
    "the first is not 0": ("cu_seqlens", lambda: one(16, cu_seqlens=ends(4, 16), max_seqlen=12)),
    "int64 ends": ("cu_seqlens", lambda: by_hand(cu_seqlens=ends(0, 8, 16, dtype=torch.int64))),
    "floating ends": ("cu_seqlens", lambda: by_hand(cu_seqlens=ends(0, 8, 16).float())),
    "strided ends": ("cu_seqlens", lambda: by_hand(cu_seqlens=ends(0, 99, 8, 99, 16, 99)[::2])),
    "no ends": (
        "cu_seqlens",
        lambda: by_hand(cu_seqlens=ends(), max_seqlen=0, padded_shape=(0, 0)),
    ),
    "ends of two dimensions": ("cu_seqlens", lambda: by_hand(cu_seqlens=ends(0, 8, 16, 16).view(2, 2))),
    "few indices": ("cu_seqlens", lambda: by_hand(indices=torch.arange(2))),
    "max_seqlen is a float": ("max_seqlen", lambda: by_hand(max_seqlen=8.0)),
    # others of their kind
    "max_seqlen is a bool": ("max_seqlen", lambda: one(1, max_seqlen=True)),
    "max_seqlen is a tensor": ("max_seqlen", lambda: by_hand(max_seqlen=torch.tensor(8))),
    "lengths that wrap around in int32": (
        "cu_seqlens",
        lambda: Packing(ends(0, 2**31 - 1, -(2**31), 0), 2**31 - 1, torch.arange(0), (3, 2**31 - 1)),
    ),
    "ends in a list": ("cu_seqlens", lambda: by_hand(cu_seqlens=[0, 8, 16])),
    "sparse ends": ("cu_seqlens", lambda: by_hand(cu_seqlens=ends(0, 8, 16).to_sparse())),
    "int32 indices": ("indices", lambda: by_hand(indices=torch.arange(16, dtype=torch.int32))),
    "strided indices": ("indices", lambda: by_hand(indices=torch.arange(32)[::2])),
    "indices past the grid": ("indices", lambda: by_hand(indices=torch.arange(1, 17))),
    "indices before the grid": ("indices", lambda: by_hand(indices=torch.arange(-1, 15))),
    "indices of another sequence": (
        "indices",
        lambda: by_hand(cu_seqlens=ends(0, 4, 8), max_seqlen=4, indices=torch.arange(8)),
    ),
    "an index twice": ("indices", lambda: by_hand(indices=torch.arange(16).clamp(max=14))),
    "indices in another order": ("indices", lambda: one(4, indices=torch.tensor([1, 0, 2, 3]))),
    "indices elsewhere": ("indices", lambda: by_hand(indices=torch.arange(16, device="meta"))),
    "a grid of more sequences": ("padded_shape", lambda: by_hand(padded_shape=(3, 8))),
    "a grid that is too narrow": ("indices", lambda: by_hand(padded_shape=(2, 7))),
    "a grid without columns": ("indices", lambda: one(1, padded_shape=(1, 0))),
    "a grid in a list": ("padded_shape", lambda: by_hand(padded_shape=[2, 8])),
    "a grid of one number": ("padded_shape", lambda: by_hand(padded_shape=(2,))),
    "a field replaced": ("max_seqlen", lambda: replace(Packing.from_lengths([8, 8]), max_seqlen=4)),
}


@pytest.mark.parametrize("case", WRONG)
def test_user_probe_p2_a_wrong_packing_by_hand_names_its_field(case: str) -> None:
    field, make = WRONG[case]
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == field


@given(
    st.lists(st.integers(-40, 40), min_size=0, max_size=6),
    st.integers(-2, 42),
    st.integers(0, 40),
    st.tuples(st.integers(0, 5), st.integers(0, 42)),
)
@settings(deadline=None, max_examples=300)
def test_any_numbers_are_a_packing_that_packs_or_an_error(
    numbers: list[int], longest: int, tokens: int, shape: tuple[int, int]
) -> None:
    try:
        packing = Packing(ends(*numbers), longest, torch.arange(tokens), shape)
    except ArgumentError:
        return
    lengths = packing.lengths.tolist()
    assert sum(lengths) == tokens and max(lengths, default=0) == longest and min(lengths, default=0) >= 0
    x = torch.randn(*shape, 3)
    assert torch.equal(packing.pack(packing.unpack(packing.pack(x))), packing.pack(x))


@pytest.mark.parametrize("lengths", [[], [0], [3], [0, 5, 0], [7, 1, 16]])
def test_a_right_one_is_as_those_that_are_made_for_it(lengths: list[int], generator: torch.Generator) -> None:
    made = Packing.from_lengths(lengths, seqlen=17)
    packing = Packing(made.cu_seqlens.clone(), made.max_seqlen, made.indices.clone(), made.padded_shape)
    qkv = torch.randn(made.tokens, 3, 2, 8, generator=generator)
    assert torch.equal(attention(qkv, packing), attention(qkv, made))
    assert torch.equal(pool(qkv.flatten(1), packing, "mean"), pool(qkv.flatten(1), made, "mean"))
    again = pickle.loads(pickle.dumps(packing))
    assert torch.equal(again.indices, packing.indices) and again.max_seqlen == packing.max_seqlen
    assert replace(made).tokens == made.tokens


def test_one_without_values_can_be_made() -> None:
    """Of meta and of fake tensors: there is nothing to be read."""
    meta = torch.arange(16, device="meta")
    assert Packing(torch.empty(3, dtype=torch.int32, device="meta"), 8, meta, (2, 8)).tokens == 16
    with FakeTensorMode():
        assert Packing(torch.empty(3, dtype=torch.int32), 8, torch.arange(16), (2, 8)).tokens == 16


def test_one_can_be_made_inside_of_a_compiled_function() -> None:
    def mean(x: Tensor, cu_seqlens: Tensor, indices: Tensor) -> Tensor:
        return Packing(cu_seqlens, 8, indices, (2, 8)).unpack(x) * 2

    x, made = torch.randn(16, 4), Packing.from_lengths([8, 8])
    compiled = torch.compile(mean, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, made.cu_seqlens, made.indices), made.unpack(x) * 2)


CONFIG = EncoderConfig(vocab_size=50, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64)


def _model(x: Tensor, packing: Packing) -> None:
    model = BertModel(CONFIG).eval()
    with torch.inference_mode():
        model(torch.zeros(len(x), dtype=torch.int64), packing=packing)


def _layer_by_layer(x: Tensor, packing: Packing) -> None:
    model = BertModel(CONFIG).eval()
    with torch.inference_mode():
        model(torch.zeros(len(x), dtype=torch.int64), packing=packing, output_hidden_states=True)


TAKERS: dict[str, Callable[[Tensor, Packing], object]] = {
    "attention": lambda x, packing: attention(x[:, :48].reshape(-1, 3, 2, 8), packing),
    "pool": lambda x, packing: pool(x, packing, "max"),
    "unpack": lambda x, packing: packing.unpack(x),
    "layer_norm": lambda x, packing: layer_norm(x, torch.ones(64), torch.ones(64), eps=1e-5, unpack=packing),
    "Encoder": lambda x, packing: Encoder(CONFIG).eval()(x, packing=packing),
    "BertModel": _model,
    "BertModel, layer by layer": _layer_by_layer,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(("rows", "tokens"), [(15, 16), (1, 16), (0, 1), (299, 300)])
def test_fewer_rows_than_tokens(taker: str, rows: int, tokens: int) -> None:
    with pytest.raises(ArgumentError):
        TAKERS[taker](torch.zeros(rows, 64), Packing.from_lengths([tokens]))


def test_the_next_batch_in_the_same_memory_changes_nothing() -> None:
    """Kernels read where a packing points, so what was looked at is what they get."""
    cu_seqlens, indices = ends(0, 8, 16), torch.arange(16)
    packing = by_hand(cu_seqlens=cu_seqlens, indices=indices)
    cu_seqlens[1], indices[:] = 2**30, 2**40
    assert packing.cu_seqlens.tolist() == [0, 8, 16]
    assert packing.indices.tolist() == list(range(16))


def test_what_is_kept_is_of_its_own_packing() -> None:
    packing = Packing.from_lengths([3, 5])
    _ = packing.grid, tile_table(packing, 2)
    turned = Packing.from_lengths([5, 3])
    other = replace(packing, cu_seqlens=turned.cu_seqlens, indices=turned.indices)
    assert torch.equal(other.grid, turned.grid)
    assert torch.equal(tile_table(other, 2), tile_table(turned, 2))
