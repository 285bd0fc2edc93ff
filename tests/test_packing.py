"""Packing: from every form of mask, lengths and ragged lists; pack and unpack as exact inverses."""

import random

import pytest
import torch
from torch import Tensor

from fastbert import BertModel, EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.ops.attention import attention
from fastbert.ops.common import native_machine
from fastbert.ops.pooling import pool
from fastbert.packing import BLOCK_PADDING, NARROWEST, Packing

RIGHT = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
LEFT = [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
HOLES = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
def test_case_03_mask_of_any_pattern_and_dtype(pattern, dtype):
    mask = torch.tensor(pattern).to(dtype)
    packing = Packing.from_mask(mask)
    kept = torch.tensor(pattern, dtype=torch.bool)
    assert packing.lengths.tolist() == kept.sum(1).tolist()
    assert packing.max_seqlen == int(kept.sum(1).max())
    assert packing.indices.tolist() == kept.flatten().nonzero().flatten().tolist()
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.indices.dtype == torch.int64
    assert packing.tokens == int(kept.sum())
    assert packing.batch == 3


@pytest.mark.parametrize("pattern", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
def test_pack_and_unpack_are_inverses_and_padding_is_never_read(pattern, generator):
    kept = torch.tensor(pattern, dtype=torch.bool)
    packing = Packing.from_mask(kept)
    padded = torch.randn(3, 4, 2, 5, generator=generator)
    padded[~kept] = torch.nan
    packed = packing.pack(padded)
    assert packed.shape == (packing.tokens, 2, 5)
    assert packed.isfinite().all()
    back = packing.unpack(packed, fill=7.0)
    assert torch.equal(back[kept], padded[kept])
    assert (back[~kept] == 7.0).all()
    assert torch.equal(packing.pack(back), packed)


def test_pack_and_unpack_gradients(generator):
    packing = Packing.from_mask(torch.tensor(HOLES))
    padded = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, (padded,))
    assert torch.autograd.gradcheck(packing.unpack, (packed,))


def test_case_15_slack_rows_are_not_read_and_get_no_gradient(generator):
    packing = Packing.from_lengths([2, 0, 3])
    packed = torch.randn(9, 4, generator=generator)
    packed[5:] = torch.nan
    packed.requires_grad_()
    padded = packing.unpack(packed)
    assert padded.isfinite().all()
    upstream = torch.randn(padded.shape, generator=generator)
    padded.backward(upstream)
    assert (packed.grad[5:] == 0).all()
    assert torch.equal(packed.grad[:5], packing.pack(upstream))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [3], [1, 0, 4]])
def test_case_15_zero_length_sequences_and_empty_batches(lengths):
    packing = Packing.from_lengths(lengths)
    assert packing.lengths.tolist() == lengths
    assert packing.tokens == sum(lengths)
    assert packing.max_seqlen == max(lengths, default=0)
    x = torch.randn(packing.tokens, 3)
    assert torch.equal(packing.pack(packing.unpack(x)), x)
    mask = torch.arange(packing.max_seqlen) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    same = Packing.from_mask(mask)
    assert torch.equal(same.indices, packing.indices)
    assert torch.equal(same.cu_seqlens, packing.cu_seqlens)


def test_from_lengths_as_list_and_tensor_with_a_wider_grid():
    for lengths in ([2, 3], torch.tensor([2, 3]), torch.tensor([2, 3], dtype=torch.int32)):
        packing = Packing.from_lengths(lengths, seqlen=5)
        assert packing.padded_shape == (2, 5)
        assert packing.indices.tolist() == [0, 1, 5, 6, 7]
        assert packing.columns.tolist() == [0, 1, 0, 1, 2]
        assert packing.grid.tolist() == [0, 1, 3, 4, 5]


def test_from_ragged(generator):
    sequences = [torch.randn(n, 4, generator=generator) for n in (3, 0, 2)]
    packed, packing = Packing.from_ragged(sequences)
    assert torch.equal(packed, torch.cat(sequences))
    assert packing.lengths.tolist() == [3, 0, 2]


def test_from_kept_answers_flags_in_the_same_sync():
    kept = torch.tensor(HOLES, dtype=torch.bool)
    packing, flags = Packing.from_kept(kept, torch.tensor(True), torch.tensor(False))
    assert flags == [True, False]
    assert packing.lengths.tolist() == [2, 0, 3]


def test_blocks_hold_every_token_once_and_little_padding():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.choice([0, 1, draw.randrange(20), draw.randrange(20, 300)]) for _ in range(draw.randrange(20))]
        packing = Packing.from_lengths(lengths)
        ids = torch.arange(packing.tokens)
        seen = []
        for block in packing.blocks:
            mine = lengths[block.first : block.first + block.batch]
            assert block.begin == sum(lengths[: block.first]) and block.shortest == min(mine) > 0
            assert block.seqlen == max(*mine, NARROWEST)
            assert block.batch * max(mine) ** 2 - sum(length**2 for length in mine) <= BLOCK_PADDING
            tokens = ids[block.begin : block.begin + sum(mine)]
            assert torch.equal(ids[block.rows].flatten()[block.places], tokens)
            assert torch.equal(block.is_token.sum(1), torch.tensor(mine))
            for rows, sequence in zip(block.rows, tokens.split(mine), strict=True):
                assert set(rows.tolist()) == set(sequence.tolist())  # padding reads no other sequence
            seen += tokens.tolist()
        assert seen == ids.tolist()
    assert len(Packing.from_lengths([30] * 9 + [31] * 9).blocks) == 1
    assert len(Packing.from_lengths([256, 8, 256]).blocks) == 3
    assert [block.batch for block in Packing.from_lengths([128] * 9 + [300]).blocks] == [4, 4, 1, 1]


def test_runs_group_neighbours_of_one_length():
    assert Packing.from_lengths([3, 3, 0, 3, 2, 2]).runs == [(3, 3), (2, 2)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: Packing.from_mask(torch.ones(2)),
        lambda: Packing.from_mask(torch.ones(2, 1, 3, 3)),
        lambda: Packing.from_mask(torch.tensor([[0, 2]])),
        lambda: Packing.from_mask(torch.tensor([[0.0, -torch.inf]])),
        lambda: Packing.from_mask(torch.tensor([[1.0, torch.nan]])),
        lambda: Packing.from_lengths([-1]),
        lambda: Packing.from_lengths([4], seqlen=3),
        lambda: Packing.from_lengths(torch.ones(2)),
        lambda: Packing.from_lengths(torch.ones(2, 2, dtype=torch.int64)),
        lambda: Packing.from_ragged([]),
        lambda: Packing.from_ragged([torch.ones(2, 3), torch.ones(2, 4)]),
        lambda: Packing.from_ragged([torch.tensor(1.0)]),
        lambda: Packing.from_lengths([2]).pack(torch.ones(2, 2, 3)),
        lambda: Packing.from_lengths([2]).unpack(torch.ones(1, 3)),
    ],
)
def test_bad_input_names_the_argument(call):
    with pytest.raises(ArgumentError, match=r"got .*; expected "):
        call()


# Numbers that a kernel would follow out of memory: past the rows, before them, falling, longer than the longest.
@pytest.mark.parametrize(("at", "number"), [(2, 10**6), (1, 10**6), (1, -5), (0, 1), (2, 4), (1, 6)])
@pytest.mark.parametrize("write", [Tensor.__setitem__, lambda ends, at, number: ends.numpy().__setitem__(at, number)])
def test_ends_that_somebody_wrote_into_are_an_error_and_no_crash(write, at, number):
    config = EncoderConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=64, vocab_size=50)
    model, ids = BertModel(config).eval(), torch.randint(50, (9,))
    qkv = torch.randn(9, 3, 2, 16)
    if native_machine(qkv) is None:
        pytest.skip("no kernels for this CPU")

    def trains(packing):
        x = qkv.clone().requires_grad_()
        made = attention(x, packing)
        write(packing.cu_seqlens, at, number)
        made.sum().backward()

    calls = [
        lambda packing: write(packing.cu_seqlens, at, number) or model(ids, packing=packing),
        lambda packing: write(packing.cu_seqlens, at, number) or attention(qkv, packing),
        lambda packing: write(packing.cu_seqlens, at, number) or pool(qkv.flatten(1), packing, "mean"),
        trains,
    ]
    for call in calls:
        for context in (torch.inference_mode, torch.enable_grad) if call is not trains else (torch.enable_grad,):
            with context(), pytest.raises(ArgumentError, match="cu_seqlens: got other numbers"):
                call(Packing.from_lengths([4, 5]))
