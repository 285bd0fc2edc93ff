"""LayerNorm of rows that are one value, or one value but for one element, wherever moments are computed.

At an eps of 1e-12 all that rounding leaves of such a row is multiplied by a million. Compilers for GPUs contract
multiply-adds where they like; the interpreter does it in the lane "contracted".
"""

import json
from contextlib import nullcontext
from pathlib import Path

import interpreter
import pytest
import torch
import torch.nn.functional as F
from gradients import gradients
from test_layer_norm import check, check_backward
from test_static import run

from fastbert import backend, reference
from fastbert.config import EncoderConfig
from fastbert.cpu.int8 import Int8Matrix
from fastbert.cpu.machine import Machine, host
from fastbert.kernels import target
from fastbert.model.encoder import Encoder
from fastbert.model.folded import fold
from fastbert.ops.embedding import embedding
from fastbert.ops.int8 import linear_int8, quantize_rows_int8
from fastbert.ops.layer_norm import layer_norm
from fastbert.packing import Packing
from fastbert.testing import assert_close

VALUES = [1.0, -3.0, 0.1, -3.3, 7.0, 123.456, 1e4, 1e-8, 6e4]
WIDTHS = [37, 312, 384, 768, 1000, 1024, 3072]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LANES = ["triton", "contracted", "torch"]

needs_int8 = pytest.mark.skipif(
    not (isinstance(host(), Machine) and host().int8), reason="needs a CPU with products of int8"
)


@pytest.fixture(params=LANES)
def path(request):
    """The backend to force; products are contracted meanwhile where the lane says so."""
    contracted = request.param == "contracted"
    if contracted and not target.interpreted():
        pytest.skip("kernels are compiled here, and contracted as the compiler likes")
    with interpreter.contracting() if contracted else nullcontext():
        yield "triton" if contracted else request.param


def constant_rows(width, dtype=torch.float32):
    """A row of each of VALUES."""
    return torch.tensor(VALUES)[:, None].repeat(1, width).to(dtype)


def parameters(width, generator, dtype=torch.float32):
    weight, bias = torch.randn(2, width, generator=generator).to(dtype)
    return weight, bias


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_user_case_ln_constant_rows_give_the_bias(width, dtype, eps, path, generator):
    x, (weight, bias) = constant_rows(width, dtype), parameters(width, generator, dtype)
    with backend.use_backend(path):
        for options in ({}, {"residual": x / 4}, {"residual": x / 4, "x_bias": torch.full_like(bias, 0.3)}):
            out = layer_norm(x, weight, bias, eps=eps, **options)
            if path == "torch" and dtype == torch.bfloat16 and not options:  # torch's own, and its rounding
                continue
            assert torch.equal(out, bias.expand_as(out)), options.keys()


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("change", ["an ulp", "a hundredth", "a thousand"])
@pytest.mark.parametrize("width", [312, 384, 768, 1000, 1024])
def test_user_case_ln_rows_constant_but_for_one_element(width, change, eps, path, generator):
    """Each row by itself, so that no other's values lend it slack."""
    weight, bias = parameters(width, generator)
    for x in constant_rows(width).split(1):
        one = x[:, width // 3]
        one.copy_({"an ulp": one.nextafter(one + 1), "a hundredth": one * 1.01, "a thousand": one + 1e3}[change])
        check(path, x, weight, bias, eps=eps)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("width", [312, 768, 1000])
def test_the_gradient_of_constant_rows(width, has_residual, path, generator):
    """It is that of `rstd * (dout * weight - its mean)`: the normal values are 0. Plain torch is far off here."""
    x, (weight, bias) = constant_rows(width), parameters(width, generator)
    dout = torch.randn(x.shape, generator=generator)
    residual = x / 4 if has_residual else None
    got = check_backward(path, x, weight, bias, dout, eps=1e-12, residual=residual)
    if path == "triton":
        dnormal = dout.double() * weight.double()
        exact = 1e6 * (dnormal - dnormal.mean(1, keepdim=True))
        assert_close(got["x"], exact.float(), exact, what="dx")
        assert not got["weight"].any()


@pytest.mark.parametrize("width", [312, 768, 1000, 1024])
def test_an_upstream_gradient_of_one_value(width, path, generator):
    """Its mean is all of it, so nothing is left but the slope."""
    x, (_, bias) = torch.randn(len(VALUES), width, generator=generator), parameters(width, generator)
    check_backward(path, x, torch.ones(width), bias, constant_rows(width), eps=1e-12)
    with backend.use_backend(path):
        (dx,) = gradients(
            lambda x: layer_norm(x, torch.ones(width), bias, eps=1e-12), [x[:2]], constant_rows(width)[:2]
        )
    assert dx.abs().max() < 1e-5


@pytest.mark.parametrize("width", WIDTHS)
def test_user_case_ln_embedding_of_constant_rows(width, path, generator):
    """The torch path without a gradient is the CPU's own kernel, where there is one; with a gradient torch."""
    word, (weight, bias) = constant_rows(width), parameters(width, generator)
    other = torch.full((2, width), 0.3)
    ids = torch.arange(len(VALUES))
    with backend.use_backend(path):
        for parameter in (bias, bias.clone().requires_grad_()):
            out = embedding(ids, ids % 2, None, word, other, other, weight, parameter, eps=1e-12)
            assert torch.equal(out, bias.expand_as(out))


def test_compiled_kernels_round_a_mean_before_it_is_taken_off():
    """Fused multiply-adds with 1 / width: one a mean, and one a variance; not one an element."""
    result = run(Path(__file__).with_name("multiply_adds.py"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "layer_norm_forward_kernel": 3,
        "layer_norm_backward_kernel": 3,
        "embedding_forward_kernel": 3,
    }


@pytest.mark.parametrize("width", [312, 768])
def test_the_gradient_of_an_embedding_of_constant_rows(width, path, generator):
    if path == "torch":
        pytest.skip("torch's own backward, which cancels here")
    word, (weight, bias) = constant_rows(width), parameters(width, generator)
    other, ids = torch.zeros(1, width), torch.arange(len(VALUES))
    dout = torch.randn(word.shape, generator=generator)
    with backend.use_backend(path):
        (got,) = gradients(
            lambda word: embedding(ids, ids * 0, None, word, other, other, weight, bias, eps=1e-12), [word], dout
        )
    dnormal = dout.double() * weight.double()
    exact = 1e6 * (dnormal - dnormal.mean(1, keepdim=True))
    assert_close(got, exact.float(), exact)


@needs_int8
@pytest.mark.parametrize("rows", [9, 400])
@pytest.mark.parametrize("width", [312, 768, 1000])
def test_linear_int8_of_constant_rows(width, rows, generator):
    """Few rows and many take kernels of their own. The product is 0, so the residual is normalised."""
    weight, bias = parameters(width, generator)
    residual = constant_rows(width).repeat(-(-rows // len(VALUES)), 1)[:rows]
    matrix = Int8Matrix.of(torch.zeros(width, 8))
    x = quantize_rows_int8(torch.randn(rows, 8, generator=generator))
    out, _ = linear_int8(x, matrix, torch.zeros(width), torch.float32, residual=residual, norm=(weight, bias, 1e-12))
    assert torch.equal(out, bias.expand_as(out))


def test_folding_of_constant_rows(generator):
    """The last LayerNorm of an encoder whose products are 0 sees rows of one value."""
    width = 312
    encoder = Encoder(EncoderConfig(hidden_size=width, num_layers=1, num_heads=39, intermediate_size=8)).eval()
    norm = torch.nn.LayerNorm(width)
    with torch.no_grad():
        for linear in (encoder.layer[0].attention.output.dense, encoder.layer[0].output.dense):
            linear.weight.zero_(), linear.bias.zero_()
        encoder.layer[0].attention.output.LayerNorm.weight.fill_(
            1e-30
        )  # so that what comes out of it is its bias, one value
        encoder.layer[0].attention.output.LayerNorm.bias.fill_(0.1)
        encoder.layer[0].output.LayerNorm.bias.copy_(torch.randn(width, generator=generator))
        x = torch.randn(20, width, generator=generator)
        packing = Packing.from_lengths([20])
        wanted = encoder.layer[0].output.LayerNorm.bias.expand(20, -1)
        assert torch.equal(encoder.run(x, packing)[-1], wanted)
        folded = fold(encoder, norm)
        assert folded is None  # such weights would round too much


@pytest.mark.parametrize("width", WIDTHS)
def test_the_reference_is_exact(width, generator):
    """In float64 of values that are no floats, whose sums are rounded too."""
    x = torch.tensor(VALUES, dtype=torch.float64)[:, None].repeat(1, width)
    weight, bias = parameters(width, generator, torch.float64)
    out = reference.layer_norm(x, weight, bias, eps=1e-12)
    assert torch.equal(out, bias.expand_as(out))
    assert torch.equal(F.layer_norm(x, (width,), weight, bias, 1e-12), out)
