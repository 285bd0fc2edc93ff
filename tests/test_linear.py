"""linear: against float64, and what it refuses."""

import pytest
import torch

from fastbert.errors import ArgumentError
from fastbert.ops.linear import linear
from fastbert.testing import assert_close

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(has_bias, dtype, generator):
    x, weight = (torch.randn(n, 48, generator=generator).to(dtype) for n in (17, 33))
    bias = torch.randn(33, generator=generator).to(dtype) if has_bias else None
    plain = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(linear(x, weight, bias), plain, exact)


def test_gradients(generator):
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: linear(x, weight, None), (x, weight))


def test_bad_input():
    with pytest.raises(ArgumentError, match="weight"):
        linear(torch.ones(2, 3), torch.ones(4, 5), None)
