"""Pooling over packed rows, against the reference."""

import pytest
import torch

from fastbert import reference
from fastbert.errors import ArgumentError
from fastbert.packing import Packing
from fastbert.pooling import first_tokens, pool
from fastbert.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 129, 1]], ids=str)
@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_pool(how, lengths, dtype, generator):
    packing = Packing.from_lengths(lengths)
    x = torch.randn(packing.tokens + 2, 7, generator=generator).to(dtype)
    x[packing.tokens :] = torch.nan
    got = pool(x, packing, how)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = x.to(got.dtype)
    assert_close(got, reference.pool(wide, packing, how), reference.pool(x.double(), packing, how))


def test_maximum_of_negative_rows_is_negative():
    packing = Packing.from_lengths([2, 0])
    assert pool(torch.tensor([[-3.0], [-2.0]]), packing, "max").tolist() == [[-2.0], [0.0]]


@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_gradients(how, generator):
    packing = Packing.from_lengths([3, 0, 4])
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool(x, packing, how), (x,))


def test_first_tokens_keeps_the_dtype():
    packing = Packing.from_lengths([0, 2])
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float16)
    assert first_tokens(x, packing).dtype == torch.float16
    assert first_tokens(x, packing).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("x", "how"), [(torch.ones(2, 3), "median"), (torch.ones(1, 3), "mean"), (torch.ones(2), "cls")]
)
def test_bad_input(x, how):
    with pytest.raises(ArgumentError):
        pool(x, Packing.from_lengths([2]), how)
