"""Layers of one kind are prepared once, give the very results of the long way, and go that way where they must."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from preparing import preparations
from torch import Tensor

from fastbert import backend
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.kernels.target import interpreted
from fastbert.model.layer import EncoderLayer
from fastbert.packing import Packing
from fastbert.run import prepared as executor

pytestmark = pytest.mark.skipif(not interpreted(), reason="the kernels need Triton's interpreter here")

HIDDEN, HEADS, INTERMEDIATE = 32, 2, 48


@pytest.fixture(autouse=True)
def prepared() -> Iterator[list[int]]:
    with preparations() as rows:
        yield rows


def layer(**changes: Any) -> EncoderLayer:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "intermediate_size": INTERMEDIATE}
    made = EncoderLayer(EncoderConfig(**(sizes | changes))).eval()
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def the_long_way(layer: EncoderLayer, x: Tensor, packing: Packing) -> Tensor:
    """All rows are read, which no layer is prepared for."""
    return layer(x, packing, read=torch.arange(len(x)))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_lengths_and_contents_may_change(activation: str, prepared: list[int], nan_empty: None) -> None:
    made = layer(activation=activation)
    for lengths in ([20, 3, 17], [3, 17, 20], [20, 10, 10]):
        x, packing = torch.randn(40, HIDDEN), Packing.from_lengths(lengths)
        assert torch.equal(made(x, packing), the_long_way(made, x, packing)), lengths
    assert prepared == [40]


@pytest.mark.parametrize("lengths", [[3, 6, 1], [4, 4, 1], [3, 5, 1, 0], [3, 5], [70], [1] * 15, []], ids=str)
def test_another_layout_is_of_the_same_kind(lengths: list[int], prepared: list[int], nan_empty: None) -> None:
    made = layer()
    made(torch.randn(9, HIDDEN), Packing.from_lengths([3, 5, 1]))
    packing = Packing.from_lengths(lengths)
    x = torch.randn(9 if sum(lengths) < 9 else sum(lengths), HIDDEN)  # with [3, 5] a row of slack
    real = slice(packing.tokens)
    assert torch.equal(made(x, packing)[real], the_long_way(made, x, packing)[real])
    assert len(prepared) == (2 if sum(lengths) == 70 else 1), "a sequence longer than 64 has other tiles"


@pytest.mark.parametrize(
    "lengths",
    [[20, 12], [1], pytest.param([600], marks=pytest.mark.long), [64, 64], pytest.param([128], marks=pytest.mark.long)],
    ids=str,
)
def test_what_code_or_choices_depend_on_is_a_kind(lengths: list[int], prepared: list[int]) -> None:
    """A multiple of 16 rows; one row; more than 512; whole tiles; and a longest sequence of more than 64."""
    made = layer()
    made(torch.randn(9, HIDDEN), Packing.from_lengths([3, 5, 1]))
    packing = Packing.from_lengths(lengths)
    x = torch.randn(sum(lengths), HIDDEN)
    # not exactly: for one row the CPU's BLAS takes a product of a matrix and a vector, which rounds by its address
    torch.testing.assert_close(made(x, packing), the_long_way(made, x, packing))
    assert len(prepared) == 2


def test_rows_of_more_than_2_gib_are_each_a_kind() -> None:
    assert executor.rows_kind(1001, 4096) == executor.rows_kind(2003, 4096) != executor.rows_kind(2000, 4096)
    assert executor.rows_kind(2**19 + 1, 4096) != executor.rows_kind(2**19 + 3, 4096)


def test_as_many_rows_with_other_tokens_are_of_the_same_kind(prepared: list[int], nan_empty: None) -> None:
    """Each row belongs to a program, whatever the first batch was."""
    made, x = layer(), torch.randn(41, HIDDEN)
    for lengths in ([20, 1], [20, 20], [41], [1, 1]):
        packing = Packing.from_lengths(lengths)
        real = slice(packing.tokens)
        assert torch.equal(made(x, packing)[real], the_long_way(made, x, packing)[real]), lengths
    assert prepared == [41]


def test_weights_may_change_in_any_way(prepared: list[int]) -> None:
    made, x, packing = layer(), torch.randn(8, HIDDEN), Packing.from_lengths([3, 5])
    before = made(x, packing)
    made.attention.self.key.weight.mul_(2.0)
    assert not torch.equal(made(x, packing), before)
    made.output.dense.bias = torch.nn.Parameter(torch.randn(HIDDEN))
    made.attention.output.LayerNorm.weight.data = torch.randn(HIDDEN)
    assert torch.equal(made(x, packing), the_long_way(made, x, packing))
    assert len(prepared) == 1
    made.half()
    assert torch.equal(made(x.half(), packing), the_long_way(made, x.half(), packing))
    assert len(prepared) == 2


def test_layers_that_compute_alike_share_what_is_prepared(prepared: list[int]) -> None:
    x, packing = torch.randn(8, HIDDEN), Packing.from_lengths([3, 5])
    for made in (layer(), layer(), layer(eps=1e-3), layer(activation="relu"), layer(num_heads=4)):
        assert torch.equal(made(x, packing), the_long_way(made, x, packing))
    assert len(prepared) == 4


@pytest.mark.parametrize("way", ["strided", "misaligned", "subclass", "gradient", "autocast", "torch", "mode", "vmap"])
def test_the_long_way_is_gone_where_it_must_be(way: str, prepared: list[int]) -> None:
    made, x, packing = layer(), torch.randn(8, HIDDEN), Packing.from_lengths([3, 5])
    expected = the_long_way(made, x, packing)
    match way:
        case "strided":
            got = made(torch.randn(8, 2 * HIDDEN)[:, :HIDDEN].copy_(x), packing)
        case "misaligned":
            got = made(torch.empty(8 * HIDDEN + 1)[1:].view(8, HIDDEN).copy_(x), packing)
        case "subclass":
            got = made(x.as_subclass(type("Subclass", (Tensor,), {})), packing)
        case "gradient":
            with torch.enable_grad():
                got = made(x, packing)
            assert got.requires_grad
        case "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got = made(x, packing)
            assert got.dtype == torch.bfloat16
            expected = got
        case "torch":
            with backend.use_backend("torch"):
                got = expected = made(x, packing)
        case "mode":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False):
                got = made(x, packing)
        case "vmap":  # no kernel runs in it, so what a layer would ask is asked
            asked: list[Any] = []

            def ask(row: Tensor) -> Tensor:
                asked.append(executor.of_kind(("kind",), (row,), (), lambda: prepared.append(0)))
                return row

            got = expected = torch.func.vmap(ask)(x)
            assert asked == [None]
    assert torch.equal(got, expected)
    assert prepared == []


def test_a_wrong_call_is_refused_each_time(prepared: list[int]) -> None:
    made = layer()
    for _ in range(2):
        with pytest.raises(ArgumentError, match="weight"):
            made(torch.randn(8, HIDDEN + 8), Packing.from_lengths([3, 5]))
        with pytest.raises(ArgumentError, match="qkv"):
            made(torch.randn(7, HIDDEN), Packing.from_lengths([3, 5]))
        made(torch.randn(7, HIDDEN), Packing.from_lengths([2, 5]))


def test_an_empty_batch(prepared: list[int]) -> None:
    made, x, packing = layer(), torch.randn(0, HIDDEN), Packing.from_lengths([])
    for _ in range(2):
        assert made(x, packing).shape == (0, HIDDEN)


def test_no_more_kinds_are_kept_than_said(monkeypatch: pytest.MonkeyPatch, prepared: list[int]) -> None:
    monkeypatch.setattr(executor, "MOST", 2)
    made = layer()
    for tokens in (3, 16, 1, 3):
        made(torch.randn(tokens, HIDDEN), Packing.from_lengths([tokens]))
        assert len(executor._kept) <= 2
    assert prepared == [3, 16, 1, 3]


def test_what_the_kernels_cannot_serve_goes_the_long_way() -> None:
    """Under `use_backend("triton")` that ends in an error, with its reason."""
    made, x = layer().double(), torch.randn(8, HIDDEN).double()
    with pytest.raises(backend.BackendError, match="float64"):
        made(x, Packing.from_lengths([3, 5]))
