"""layer_norm and linear_layer_norm: both paths against float64, by the error rule."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import launch, target
from fastbert.kernels import layer_norm as kernel
from fastbert.ops.layer_norm import layer_norm, layer_norm_forward, linear_layer_norm
from fastbert.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = ["triton", "torch"]
WIDTHS = [1, 7, 8, 48, 128, 384, 768, 769, 1024, 1536, 4096, 8192]


def inputs(rows, hidden, dtype, generator, device, parameters=None):
    """x, weight, bias, residual, x_bias."""
    parameters = parameters or dtype
    x, residual = torch.randn(2, rows, hidden, generator=generator).to(device, dtype)
    weight, bias, x_bias = torch.randn(3, hidden, generator=generator).to(device, parameters)
    return x, weight, bias, residual, x_bias


def cast(x, dtype):
    return None if x is None else x.to(dtype)


def plainly(x, weight, bias, residual, x_bias, keep, dropout, eps):
    """What a user of PyTorch writes in one dtype."""
    total = x if x_bias is None else x + x_bias
    if keep is not None:
        total = total * keep * launch.drop_scale(dropout)
    if residual is not None:
        total = total + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def check(path, x, weight, bias, *, eps=1e-12, **options):
    """Run one path and hold it to the error rule; returns the output."""
    with backend.use_backend(path):
        out = layer_norm(x, weight, bias, eps=eps, **options)
    keep = None
    if options.get("dropout"):
        keep = reference.hidden_keep_mask(options["seed"], *x.shape, options["dropout"])
    terms = (x, weight, bias, options.get("residual"), options.get("x_bias"))
    plain = plainly(*(cast(term, x.dtype) for term in terms), keep, options.get("dropout", 0.0), eps)
    x, weight, bias, residual, x_bias = (cast(term, torch.float64) for term in terms)
    exact = reference.layer_norm(
        x, weight, bias, residual=residual, x_bias=x_bias, keep=keep, dropout=options.get("dropout", 0.0), eps=eps
    )
    assert_close(out, plain, exact, what=path)
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_widths_case_14(hidden, dtype, path, device, generator, nan_empty):
    x, weight, bias, residual, x_bias = inputs(3, hidden, dtype, generator, device)
    check(path, x, weight, bias, residual=residual, x_bias=x_bias, eps=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("has_x_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_each_branch(rows, has_residual, has_x_bias, dropout, path, device, generator, nan_empty):
    """Hidden 48 puts several rows in a program, and 5 rows leave the last one part empty."""
    x, weight, bias, residual, x_bias = inputs(rows, 48, torch.float16, generator, device)
    check(
        path,
        x,
        weight,
        bias,
        residual=residual if has_residual else None,
        x_bias=x_bias if has_x_bias else None,
        dropout=dropout,
        seed=torch.tensor([9], device=device) if dropout else None,
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 100, 1536])
def test_dropout(hidden, dtype, path, device, generator):
    x, weight, bias, residual, x_bias = inputs(4, hidden, dtype, generator, device)
    seed = torch.tensor([-5], device=device)
    options = {"residual": residual, "x_bias": x_bias, "seed": seed}
    out = check(path, x, weight, bias, dropout=0.1, **options)
    assert not torch.equal(out, check(path, x, weight, bias, dropout=0.1, **options | {"seed": seed + 1}))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_parameters_beside_half_rows(dtype, path, device, generator):
    x, weight, bias, residual, x_bias = inputs(3, 96, dtype, generator, device, parameters=torch.float32)
    check(path, x, weight, bias, residual=residual, x_bias=x_bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outliers_stay_finite_case_8(dtype, path, device, generator):
    """A sum and a square beyond float16's largest value, 65504, are harmless in float32."""
    x, weight, bias, residual, _ = inputs(3, 768, dtype, generator, device)
    x[:, 5], residual[:, 5], x[:, 300] = 6e4, 5e4, -6e4
    with backend.use_backend(path):
        out = layer_norm(x, weight, bias, residual=residual, eps=1e-12)
    wide = [tensor.double() for tensor in (x, weight, bias)]
    exact = reference.layer_norm(*wide, residual=residual.double(), eps=1e-12)
    assert_close(out, exact.to(dtype), exact, what="outliers")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_rows_give_the_bias_case_9(value, eps, dtype, path, device, generator):
    _, weight, bias, _, _ = inputs(1, 384, dtype, generator, device)
    x = torch.full((2, 384), value, dtype=dtype, device=device)
    assert torch.equal(check(path, x, weight, bias, eps=eps), bias.expand(2, -1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_variance_does_not_cancel_case_10(mean, path, device, generator):
    x, weight, bias, _, _ = inputs(3, 768, torch.float32, generator, device)
    check(path, x + mean, weight, bias, eps=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["slice", "odd base", "odd stride", "transposed", "expanded"])
def test_layouts_case_29(layout, path, device, generator):
    rows, hidden = 5, 96
    _, weight, bias, _, _ = inputs(1, hidden, torch.float16, generator, device)
    store = torch.randn(rows * 4, hidden * 2, generator=generator).to(device, torch.float16)
    x = {
        "slice": store[::4, :hidden],
        "odd base": store.flatten()[3 : 3 + rows * hidden].view(rows, hidden),
        "odd stride": store.flatten()[: rows * 99].view(rows, 99)[:, :hidden],
        "transposed": store.flatten()[: rows * hidden].view(hidden, rows).T,
        "expanded": store[:1, :hidden].expand(rows, -1),
    }[layout]
    check(path, x, weight, bias, residual=x.flip(0))
    check(path, x.flip(0), weight, bias, residual=x)
    wide = torch.stack([weight, bias], 1)  # parameters that are columns
    check(path, x, wide[:, 0], wide[:, 1], x_bias=wide[:, 1])


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_case_15(path, device):
    x = torch.empty(0, 48, device=device)
    with backend.use_backend(path):
        out = layer_norm(x, torch.ones(48, device=device), torch.zeros(48, device=device), residual=x, eps=1e-5)
    assert out.shape == (0, 48)


def test_slack_is_not_touched_case_15(device, generator):
    """The rows before and after those that were asked for, NaN, stay out of the result."""
    x, weight, bias, residual, _ = inputs(5, 48, torch.float32, generator, device)
    x[[0, 4]], residual[[0, 4]] = torch.nan, torch.nan
    check("triton", x[1:4], weight, bias, residual=residual[1:4])


@pytest.mark.parametrize("hidden", [48, 769, 2048])
def test_statistics(hidden, device, generator, nan_empty):
    x, weight, bias, residual, x_bias = inputs(5, hidden, torch.float16, generator, device)
    out, mean, rstd = kernel.layer_norm_forward(
        x, weight, bias, residual=residual, x_bias=x_bias, eps=1e-5, store_stats=True
    )
    total = x.double() + x_bias.double() + residual.double()
    exact = [total.mean(1), (total.var(1, correction=0) + 1e-5).rsqrt()]
    for name, ours, wanted in zip(("mean", "rstd"), (mean, rstd), exact, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, wanted.float(), wanted, what=name)
    assert torch.equal(out, kernel.layer_norm_forward(x, weight, bias, residual=residual, x_bias=x_bias, eps=1e-5)[0])


def test_gradients_of_the_torch_path(generator):
    x, weight, bias, residual, x_bias = inputs(3, 6, torch.float64, generator, "cpu")
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, residual, x_bias)]
    seed = torch.tensor([3])

    def run(x, weight, bias, residual, x_bias):
        return layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, dropout=0.3, seed=seed, eps=1e-5)

    assert torch.autograd.gradcheck(run, leaves)


def test_triton_refuses_gradients(device, generator):
    x, weight, bias, _, _ = inputs(2, 8, torch.float32, generator, device)
    with backend.use_backend("triton"):
        with pytest.raises(BackendError, match="require a gradient"):
            layer_norm(x, weight.requires_grad_(), bias, eps=1e-5)
        with torch.no_grad():
            layer_norm(x, weight, bias, eps=1e-5)


def test_too_wide_for_the_kernel(device):
    x, weight = torch.zeros(1, 8193, device=device), torch.zeros(8193, device=device)
    with backend.use_backend("triton"), pytest.raises(BackendError, match="wider than 8192"):
        layer_norm(x, weight, weight, eps=1e-5)
    with backend.use_backend("torch"):
        assert layer_norm(x, weight, weight, eps=1e-5).shape == x.shape


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": torch.zeros(4)}),
        ("x", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
        ("x", {"x": torch.zeros(2, 0), "weight": torch.zeros(0), "bias": torch.zeros(0)}),
        ("weight", {"weight": torch.zeros(5)}),
        ("weight", {"weight": torch.zeros(4, dtype=torch.float16)}),
        ("weight", {"weight": torch.zeros(4, device="meta")}),
        ("bias", {"bias": torch.zeros(1, 4)}),
        ("x_bias", {"x_bias": torch.zeros(3)}),
        ("residual", {"residual": torch.zeros(3, 4)}),
        ("residual", {"residual": torch.zeros(2, 4, dtype=torch.float16)}),
        ("eps", {"eps": -1.0}),
        ("eps", {"eps": float("nan")}),
        ("dropout", {"dropout": 1.0}),
        ("seed", {"dropout": 0.5}),
    ],
)
def test_bad_input(argument, changes):
    good = {"x": torch.zeros(2, 4), "weight": torch.zeros(4), "bias": torch.zeros(4), "eps": 1e-5}
    with pytest.raises(ArgumentError) as raised:
        layer_norm(**good | changes)
    assert raised.value.argument == argument


def projection(rows, wide, hidden, dtype, generator):
    """x, weight, x_bias, residual, norm_weight, norm_bias."""
    x = torch.randn(rows, wide, generator=generator).to(dtype)
    weight = (torch.randn(hidden, wide, generator=generator) / wide**0.5).to(dtype)
    _, norm_weight, norm_bias, residual, x_bias = inputs(rows, hidden, dtype, generator, "cpu")
    return x, weight, x_bias, residual, norm_weight, norm_bias


def check_linear(path, x, weight, x_bias, residual, norm_weight, norm_bias, context, **options):
    before = residual.clone()
    with backend.use_backend(path), context:
        out = linear_layer_norm(x, weight, x_bias, residual, norm_weight, norm_bias, eps=1e-5, **options)
    assert torch.equal(residual, before)
    keep, dropout = None, options.get("dropout", 0.0)
    if dropout:
        keep = reference.hidden_keep_mask(options["seed"], *residual.shape, dropout)

    def run(norm, *tensors):
        x, weight, x_bias, residual, norm_weight, norm_bias = tensors
        return norm(F.linear(x, weight, x_bias), norm_weight, norm_bias, residual, None, keep, dropout, 1e-5)

    def exactly(x, weight, bias, residual, x_bias, keep, dropout, eps):
        return reference.layer_norm(x, weight, bias, residual=residual, keep=keep, dropout=dropout, eps=eps)

    tensors = (x, weight, x_bias, residual, norm_weight, norm_bias)
    exact = run(exactly, *(cast(tensor, torch.float64) for tensor in tensors))
    assert_close(out, run(plainly, *tensors), exact, what=path)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_linear_layer_norm(rows, has_bias, dtype, generator):
    x, weight, x_bias, *rest = projection(rows, 32, 48, dtype, generator)
    tensors = (x, weight, x_bias if has_bias else None, *rest)
    check_linear("triton", *tensors, contextlib.nullcontext())
    check_linear("torch", *tensors, torch.no_grad())
    seed = torch.tensor([4])
    check_linear("triton", *tensors, contextlib.nullcontext(), dropout=0.2, seed=seed)
    check_linear("torch", *tensors, contextlib.nullcontext(), dropout=0.2, seed=seed)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_linear_layer_norm_layouts_case_29(layout, generator):
    x, weight, x_bias, residual, *norm = projection(6, 32, 48, torch.float32, generator)
    if layout == "transposed":
        x, weight, residual = (tensor.T.contiguous().T for tensor in (x, weight, residual))
    else:
        residual = residual[:1].expand(6, -1)
    check_linear("torch", x, weight, x_bias, residual, *norm, contextlib.nullcontext())


def test_linear_layer_norm_has_gradients_where_asked(generator):
    tensors = projection(3, 4, 5, torch.float32, generator)
    weight = tensors[1].requires_grad_()
    linear_layer_norm(*tensors, eps=1e-5).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


@pytest.mark.parametrize(
    ("argument", "at", "bad"),
    [
        ("x", 0, torch.zeros(3)),
        ("weight", 1, torch.zeros(5, 3)),
        ("bias", 2, torch.zeros(4)),
        ("residual", 3, torch.zeros(1, 5)),
        ("weight", 4, torch.zeros(4)),
    ],
)
def test_linear_layer_norm_bad_input(argument, at, bad, generator):
    tensors = list(projection(3, 4, 5, torch.float32, generator))
    tensors[at] = bad
    with pytest.raises(ArgumentError) as raised:
        linear_layer_norm(*tensors, eps=1e-5)
    assert raised.value.argument == argument


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_to_one_graph(compiler, path, generator):
    x, weight, x_bias, residual, norm_weight, norm_bias = projection(3, 16, 24, torch.float32, generator)
    seed = torch.tensor([8])

    def run(x):
        inner = linear_layer_norm(x, weight, x_bias, residual, norm_weight, norm_bias, eps=1e-5)
        return layer_norm(inner, norm_weight, norm_bias, residual=residual, dropout=0.1, seed=seed, eps=1e-5)

    torch._dynamo.reset()
    with backend.use_backend(path), torch.no_grad():
        compiled = torch.compile(run, backend=compiler, fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))


def test_linear_layer_norm_exports_plain_torch_case_26(generator):
    """Exporters see F.linear, not oneDNN's private op."""
    tensors = projection(3, 16, 24, torch.float32, generator)

    class Module(torch.nn.Module):
        def forward(self, x):
            return linear_layer_norm(x, *tensors[1:], eps=1e-5)

    with torch.no_grad():
        graph = str(torch.export.export(Module(), (tensors[0],)).graph)
        assert "aten.linear" in graph
        assert "mkldnn" not in graph


def test_opcheck(device, generator):
    x, weight, bias, residual, x_bias = inputs(3, 24, torch.float32, generator, device)
    seed = torch.tensor([8], device=device)
    torch.library.opcheck(layer_norm_forward, (x, weight, bias, residual, x_bias, 0.1, seed, 1e-5))
    torch.library.opcheck(layer_norm_forward, (x, weight, bias, None, None, 0.0, None, 1e-5))


def test_aligned_copies_only_what_needs_it(device):
    store = torch.zeros(8, 64, dtype=torch.float16, device=device)
    assert target.aligned(store[:, :48]).data_ptr() == store.data_ptr()
    assert target.aligned(store[:1].expand(5, -1)).stride(0) == 0
    for awkward in (
        store.T,
        store[:, 1:],
        store.flatten()[1:65].view(1, 64),
        store.flatten()[: 8 * 63].view(8, 63)[:, :48],
    ):
        copy = target.aligned(awkward)
        assert copy.stride(-1) == 1
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, awkward)
