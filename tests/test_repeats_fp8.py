"""Layers in fp8 are prepared once, as others are, and give the very results of the long way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from preparing import preparations, unprepared
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError, BackendError
from fastbert.families.quantization import quantize
from fastbert.kernels.target import interpreted
from fastbert.model.encoder import Encoder
from fastbert.packing import Packing
from fastbert.run import prepared as executor
from fastbert.run.parts import linears_of

pytestmark = pytest.mark.skipif(not interpreted(), reason="the kernels need Triton's interpreter here")

HIDDEN = 32


@pytest.fixture(autouse=True)
def prepared() -> Iterator[list[int]]:
    with preparations() as rows:
        yield rows


def encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_heads": 2, "intermediate_size": 48, "num_layers": 2}
    made = Encoder(EncoderConfig(**(sizes | changes))).eval()
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return quantize(made, dtype="fp8")


def the_long_way(encoder: Encoder, x: Tensor, packing: Packing, bias: Tensor | None = None) -> list[Tensor]:
    with unprepared():
        return encoder.run(x, packing, bias)


def same(encoder: Encoder, x: Tensor, packing: Packing) -> None:
    real = slice(packing.tokens)
    for got, wanted in zip(encoder.run(x, packing), the_long_way(encoder, x, packing), strict=True):
        assert torch.equal(got[real], wanted[real])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_batches_of_any_size_and_layers_of_one_kind_share_what_is_prepared(
    activation: str, prepared: list[int], nan_empty: None
) -> None:
    made = encoder(activation=activation)
    for lengths, slack in (([20, 3, 18], 0), ([3, 17], 1), ([1] * 9, 0), ([5], 8)):
        same(made, torch.randn(sum(lengths) + slack, HIDDEN), Packing.from_lengths(lengths))
    assert prepared == [41]
    same(made, torch.randn(32, HIDDEN), Packing.from_lengths([20, 12]))
    assert prepared == [41, 32], "a multiple of 16"


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_other_activations_go_the_long_way(activation: str, prepared: list[int]) -> None:
    made = encoder(activation=activation)
    same(made, torch.randn(9, HIDDEN), Packing.from_lengths([4, 5]))
    assert executor._kept == {}


def test_weights_may_change(prepared: list[int]) -> None:
    made, x, packing = encoder(), torch.randn(9, HIDDEN), Packing.from_lengths([4, 5])
    before = made.run(x, packing)[-1]
    parts: Any = made.layer[1].parts()
    parts["output_norm"].weight.mul_(2.0)
    parts["intermediate"].bias = torch.nn.Parameter(torch.randn(48))
    scale = parts["qkv"].value.scale
    scale.copy_((scale.view(torch.float32) * 2.0).view(torch.int32))
    assert not torch.equal(made.run(x, packing)[-1], before)
    same(made, x, packing)
    assert len(prepared) == 1


def test_weights_may_move(prepared: list[int]) -> None:
    made, x, packing = encoder(num_layers=1), torch.randn(9, HIDDEN), Packing.from_lengths([4, 5])
    before = made.run(x, packing)[-1]
    parts: Any = made.layer[0].parts()
    products = (parts[name] for name in ("qkv", "attention_output", "intermediate", "output"))
    for linear in (linear for part in products for linear in linears_of(part)):
        old, linear.values = linear.values, linear.values.clone()
        linear.scale.data = linear.scale.clone()
        old.zero_()  # what still reads it shows
    assert torch.equal(made.run(x, packing)[-1], before)
    assert prepared == [9]
    made.bfloat16()
    same(made, x.bfloat16(), packing)
    assert prepared == [9, 9], "another dtype"


def test_what_code_or_choices_depend_on_is_a_kind(prepared: list[int]) -> None:
    x, packing = torch.randn(9, HIDDEN), Packing.from_lengths([4, 5])
    for changes in ({}, {"eps": 1e-3}, {"num_heads": 4}, {"activation": "gelu_tanh"}, {"intermediate_size": 64}):
        same(encoder(num_layers=1, **changes), x, packing)
    assert prepared == [9] * 5
    same(encoder(num_layers=1), torch.randn(70, HIDDEN), Packing.from_lengths([70]))
    assert prepared == [9] * 5 + [70], "a sequence longer than 64 has other tiles"


@pytest.mark.parametrize("way", ["read", "bias", "misaligned", "misaligned weight", "autocast", "gradient of a bias"])
def test_the_long_way_is_gone_where_it_must_be(way: str, prepared: list[int]) -> None:
    made, x, packing = encoder(num_layers=1), torch.randn(9, HIDDEN), Packing.from_lengths([4, 5])
    expected = the_long_way(made, x, packing)[-1]
    match way:
        case "read":
            got = made.run(x, packing, read=torch.arange(9))[-1]
        case "bias":
            bias = torch.randn(2, 2, 5, 5)
            got, plain, expected = made.run(x, packing, bias)[-1], expected, the_long_way(made, x, packing, bias)[-1]
            assert not torch.equal(got, plain)
        case "misaligned":
            got = made.run(torch.empty(9 * HIDDEN + 1)[1:].view(9, HIDDEN).copy_(x), packing)[-1]
        case "misaligned weight":
            norm: Any = made.layer[0].parts()["output_norm"]
            norm.weight.data = torch.empty(HIDDEN + 1)[1:].copy_(norm.weight)
            got = made.run(x, packing)[-1]
        case "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got, expected = made.run(x, packing)[-1], the_long_way(made, x, packing)[-1]
        case "gradient of a bias":
            made.layer[0].parts()["intermediate"].bias.requires_grad_()
            with torch.enable_grad():
                got = made.run(x, packing)[-1]
    assert torch.equal(got, expected)
    assert prepared == []


def test_a_gradient_is_refused_each_time(prepared: list[int]) -> None:
    made, x, packing = encoder(num_layers=1), torch.randn(9, HIDDEN), Packing.from_lengths([4, 5])
    made.run(x, packing)
    for _ in range(2):
        with torch.enable_grad(), pytest.raises(BackendError, match="a gradient"):
            made.run(x.clone().requires_grad_(), packing)
    assert prepared == [9]


def test_a_wrong_call_is_refused_each_time() -> None:
    made = encoder()
    made.run(torch.randn(9, HIDDEN), Packing.from_lengths([4, 5]))
    for _ in range(2):
        with pytest.raises(ArgumentError, match="qkv"):
            made.run(torch.randn(7, HIDDEN), Packing.from_lengths([4, 5]))


def test_an_empty_batch() -> None:
    for _ in range(2):
        assert encoder().run(torch.randn(0, HIDDEN), Packing.from_lengths([]))[-1].shape == (0, HIDDEN)
