"""linear: against float64, and weights held for a piece of work."""

import pytest
import torch

from fastbert.errors import ArgumentError
from fastbert.ops.linear import hold_weights, linear, packed
from fastbert.testing import assert_close

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(has_bias, held, dtype, generator):
    x, weight = (torch.randn(n, 48, generator=generator).to(dtype) for n in (17, 33))
    bias = torch.randn(33, generator=generator).to(dtype) if has_bias else None
    plain = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if held:
        with hold_weights():
            assert_close(linear(x, weight, bias), plain, exact)
            assert_close(linear(x, weight, bias), plain, exact)
    else:
        assert_close(linear(x, weight, bias), plain, exact)


def test_weights_are_laid_out_once_inside_the_block_and_never_outside():
    weight = torch.nn.Parameter(torch.randn(32, 64))  # float32, which oneDNN multiplies on every CPU
    assert packed(weight) is weight
    with torch.no_grad(), hold_weights():
        laid_out = packed(weight)
        assert laid_out is packed(weight)
        assert laid_out.layout != weight.layout
        with hold_weights():
            assert packed(weight) is not laid_out
    assert packed(weight) is weight


@pytest.mark.parametrize("change", ["data", "fused optimizer"])
def test_a_weight_changed_without_a_trace_is_seen(change, generator):
    """`.data` and torch's fused AdamW leave a parameter's version as it was."""
    layer = torch.nn.Linear(48, 48)
    x = torch.randn(16, 48, generator=generator)
    for _ in range(2):
        with torch.no_grad(), hold_weights():
            torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
        if change == "data":
            layer.weight.data.mul_(2.0)
        else:
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
            layer(x).square().mean().backward()
            optimizer.step()


def test_gradients_flow_inside_the_block(generator):
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    with hold_weights():
        assert torch.autograd.gradcheck(lambda x, weight: linear(x, weight, None), (x, weight))


def test_bad_input():
    with pytest.raises(ArgumentError, match="weight"):
        linear(torch.ones(2, 3), torch.ones(4, 5), None)
