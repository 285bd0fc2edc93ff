"""quantize_rows, and fused into LayerNorm and GELU: the kernels against the simulation that the CPU runs."""

from unittest.mock import MagicMock

import pytest
import torch

import fastbert
from fastbert import backend, reference
from fastbert.errors import ArgumentError
from fastbert.kernels import precision
from fastbert.ops import quantize_rows as ops
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.quantize_rows import (
    QuantizedRows,
    bias_gelu_quantize,
    bias_gelu_quantize_forward,
    layer_norm_quantize,
    layer_norm_quantize_forward,
    linear_quantized,
    quantize_rows,
    quantize_rows_forward,
)
from fastbert.run import eight_bits
from fastbert.tasks.encode import TextEncoder

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's: exp2 goes to infinity on purpose

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 16, 48, 300, 768, 1040, 3072]


def rows_of(rows, width, dtype, generator, device):
    """Rows of very different size, the first all zeros, in the midst of NaN."""
    x = torch.full((rows + 2, width), torch.nan).to(device, dtype)[1:-1]
    x.copy_(torch.randn(rows, width, generator=generator) * torch.logspace(-3, 3, rows)[:, None])
    x[0] = 0.0
    return x


def assert_same_bits(got, wanted):
    values, scale = wanted
    assert got.values.dtype == torch.float8_e4m3fn and got.scale.dtype == torch.float32
    assert torch.equal(got.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(got.scale, scale)


def assert_near(got, exact):
    """Within half a step of e4m3: 2^-4 of a value, or 2^-10 of the row's scale where values are subnormal."""
    dequantized = got.values.double() * got.scale.double()[:, None]
    allowed = exact.abs() * 2**-4 + got.scale.double()[:, None] * 2**-10
    assert ((dequantized - exact).abs() <= allowed * 1.01 + 1e-12).all()


def test_the_reference_keeps_each_row_s_largest(generator):
    x = rows_of(7, 64, torch.float32, generator, "cpu")
    values, scale = reference.quantize_rows(x)
    assert values[1:].float().abs().amax(-1).eq(448).all()
    torch.testing.assert_close(values.float().abs().amax(-1) * scale, x.abs().amax(-1))
    assert not values[0].float().any() and scale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_rows(width, dtype, device, generator, nan_empty):
    x = rows_of(7, width, dtype, generator, device)
    with backend.use_backend("triton"):
        got = quantize_rows(x)
    assert_same_bits(got, reference.quantize_rows(x.float()))
    assert_near(got, x.double())


def norm_operands(rows, hidden, dtype, generator, device):
    x, residual = (rows_of(rows, hidden, dtype, generator, device) for _ in range(2))
    weight, bias, x_bias = torch.randn(3, hidden, generator=generator).to(device, dtype)
    return (x, weight, bias), {"residual": residual, "x_bias": x_bias, "eps": 1e-5}


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_layer_norm_quantizes_what_it_computes(width, device, generator, nan_empty):
    """In float32 the result is not rounded, so the bits are those of its quantization."""
    operands, options = norm_operands(5, width, torch.float32, generator, device)
    with backend.use_backend("triton"):
        out, got = layer_norm_quantize(*operands, **options)
        assert torch.equal(out, layer_norm(*operands, **options))
    assert_same_bits(got, reference.quantize_rows(out))


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_every_dtype(dtype, path, device, generator, nan_empty):
    operands, options = norm_operands(5, 48, dtype, generator, device)
    with backend.use_backend(path):
        out, got = layer_norm_quantize(*operands, **options)
        assert torch.equal(out, layer_norm(*operands, **options))
    exact = reference.layer_norm(
        *(operand.double() for operand in operands),
        residual=options["residual"].double(), x_bias=options["x_bias"].double(), eps=1e-5,
    )  # fmt: skip
    if path == "triton" or dtype == torch.float32:
        assert_near(got, exact)
    else:
        assert_same_bits(got, reference.quantize_rows(out.float()))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_gelu_quantizes_what_it_computes(width, approximate, device, generator, nan_empty):
    """By erf it takes the form for half types, which can differ from float32's by one step where a value is a tie."""
    x = rows_of(5, width, torch.float32, generator, device)
    bias = torch.randn(width, generator=generator).to(device)
    with backend.use_backend("triton"):
        got = bias_gelu_quantize(x, bias, approximate=approximate)
        out = bias_gelu(x, bias, approximate=approximate)
    values, scale = reference.quantize_rows(out)
    if approximate == "tanh":
        assert_same_bits(got, (values, scale))
    torch.testing.assert_close(got.scale, scale)
    assert_near(got, out.double())
    assert (got.values.float() == values.float()).double().mean() > 0.97


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_every_dtype(dtype, path, device, generator, nan_empty):
    x = rows_of(5, 48, dtype, generator, device)
    bias = torch.randn(48, generator=generator).to(device, dtype)
    with backend.use_backend(path):
        got = bias_gelu_quantize(x, bias)
        if path == "torch":
            assert_same_bits(got, reference.quantize_rows(bias_gelu(x, bias).float()))
        else:
            assert_near(got, reference.bias_gelu(x.double(), bias.double()))


def test_the_product_is_that_of_what_the_rows_stand_for(generator):
    x, weight = (rows_of(n, 48, torch.float32, generator, "cpu") for n in (5, 16))
    bias = torch.randn(16, generator=generator)
    by_rows = [quantize_rows(each) for each in (x, weight)]
    wide = [rows.values.double() * rows.scale.double()[:, None] for rows in by_rows]
    out = linear_quantized(*by_rows, bias, torch.float32)
    torch.testing.assert_close(out.double(), wide[0] @ wide[1].t() + bias, rtol=1e-5, atol=1e-5)
    half, single = (linear_quantized(*by_rows, None, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(half, single.bfloat16())


def floor_log2(x):
    return torch.where(x == 0, -200.0, torch.frexp(x)[1].double() - 1)


def summed_fast(x, weight, terms):
    """`x @ weight^T` as Hopper's tensor cores sum e4m3 (32 terms at once) and Ada's (16), float64 for all.

    MMA-Sim's model (arXiv 2511.10909), bit for bit: terms and sum are cut to 13 bits below the largest exponent, added
    exactly, and the sum is cut to 13 bits of its own.
    """
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for a, b in zip(x.split(terms, 1), weight.split(terms, 1), strict=True):
        exponents = floor_log2(a)[:, None] + floor_log2(b)
        step = torch.exp2(torch.maximum(exponents.amax(-1), floor_log2(out)) - 13)
        out = ((a[:, None] * b / step[..., None]).trunc().sum(-1) + (out / step).trunc()) * step
        step = torch.exp2(floor_log2(out) - 13)
        out = (out / step).trunc() * step
    return out


def wide(rows):
    return rows.values.double() * rows.scale.double()[:, None]


def matrices(layer):
    parts = layer.parts()
    return [parts["qkv"].joined()[0], *(parts[name].weight for name in ("attention_output", "intermediate", "output"))]


def products(minilm, monkeypatch):
    """What each product of MiniLM in fp8 read, before it was quantized and after."""
    found, exact = [], {}

    def quantized(x):
        rows = quantize_rows(x)
        exact[id(rows.values)] = x.double(), rows
        return rows

    def product(x, weight, bias, dtype):
        found.append((exact[id(x.values)][0], x, weight))
        return linear_quantized(x, weight, bias, dtype)

    for module in (ops, eight_bits):
        monkeypatch.setattr(module, "quantize_rows", quantized)
    monkeypatch.setattr(eight_bits, "linear_quantized", product)
    encoder = TextEncoder.from_folder(minilm, dtype="fp32", device="cpu")
    TextEncoder(fastbert.quantize(encoder.model, dtype="fp8"), encoder.tokenizer).encode(
        ["a fine film, with actors who know what they do", "two dull hours and a plot that nobody needed"]
    )
    weights = [
        weight.detach()
        for layer in encoder.model.encoder.layer
        for weight in (
            layer.attention.self.joined()[0],
            *(layer.parts()[i].weight for i in ("attention_output", "intermediate", "output")),
        )
    ]
    return found, weights


@pytest.mark.parametrize("terms", [32, 16])
def test_summing_fast_adds_little_to_what_e4m3_rounds(terms, minilm, monkeypatch):
    """RMS: up to the depth where it is done less than a twentieth, beyond it up to a fifth; see docs/numerics.md."""
    shares = {True: [], False: []}
    for depth in (768, 1024):
        x, weight = torch.randn(2, 40, depth, generator=torch.Generator().manual_seed(depth))
        by_rows = quantize_rows(x), quantize_rows(weight)
        shares[precision.fp8_sums_fast(depth)].append(share(x.double(), weight, *by_rows, terms))
    found, weights = products(minilm, monkeypatch)
    for (x, rows, by_channel), weight in zip(found, weights, strict=True):
        columns = torch.arange(0, len(weight), 29)
        by_channel = QuantizedRows(by_channel.values[columns], by_channel.scale[columns])
        shares[precision.fp8_sums_fast(x.shape[1])].append(share(x, weight[columns], rows, by_channel, terms))
    assert len(shares[True]) == 20 and len(shares[False]) == 6
    rms, largest = zip(*shares[True], strict=True)
    assert max(rms) < 0.05 and max(largest) < 0.2, shares
    assert max(shares[False])[0] > 0.1, shares


def share(x, weight, rows, by_channel, terms):
    """RMS and largest error that fast sums add, in those of quantization."""
    exact, rounded = x @ weight.double().t(), wide(rows) @ wide(by_channel).t()
    fast = summed_fast(rows.values.double(), by_channel.values.double(), terms)
    added, quantization = fast * rows.scale.double()[:, None] * by_channel.scale.double() - rounded, rounded - exact
    rms = (added.square().mean() / quantization.square().mean()).sqrt()
    return rms.item(), (added.abs().max() / quantization.abs().max()).item()


@pytest.mark.parametrize(("depth", "fast"), [(384, True), (1024, True), (1040, False), (3072, False)])
def test_only_shallow_products_sum_fast(depth, fast, monkeypatch):
    asked = MagicMock()
    monkeypatch.setattr(torch, "_scaled_mm", asked)
    rows = QuantizedRows(MagicMock(is_cuda=True, shape=(5, depth)), MagicMock())
    linear_quantized(rows, rows, None, torch.bfloat16)
    assert asked.call_args.kwargs["use_fast_accum"] is fast


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_no_rows(path, device):
    with backend.use_backend(path):
        got = quantize_rows(torch.empty(0, 16, device=device))
    assert got.values.shape == (0, 16) and got.scale.shape == (0,)


def test_bad_input():
    with pytest.raises(ArgumentError, match="x: got"):
        quantize_rows(torch.zeros(3))


def test_opcheck(device, generator):
    (x, weight, bias), options = norm_operands(3, 48, torch.float32, generator, device)
    torch.library.opcheck(quantize_rows_forward, (x,))
    torch.library.opcheck(layer_norm_quantize_forward, (x, weight, bias, *options.values()))
    torch.library.opcheck(bias_gelu_quantize_forward, (x, bias, "none"))
