"""layer_norm and linear_layer_norm: both paths against float64, by the error rule."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients, gradients, limit_programs

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import layer_norm as kernel
from fastbert.kernels import row_wise_choices, target
from fastbert.kernels.dropout import drop_scale
from fastbert.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward, linear_layer_norm
from fastbert.packing import Packing
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
        total = total * keep * drop_scale(dropout)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_x_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("hidden", [48, 769])
def test_what_is_stored_for_the_backward(
    hidden, dropout, has_x_bias, has_residual, dtype, device, generator, nan_empty
):
    """The sum, rounded once, unless it is x; the mean and deviation of what is stored; and the same result."""
    x, weight, bias, residual, x_bias = inputs(5, hidden, dtype, generator, device)
    residual, x_bias = residual if has_residual else None, x_bias if has_x_bias else None
    seed = torch.tensor([9], device=device)
    options = {"residual": residual, "x_bias": x_bias, "dropout": dropout, "seed": seed, "eps": 1e-5}
    out, total, mean, rstd = kernel.layer_norm_forward(x, weight, bias, store_stats=True, **options)
    if has_residual or has_x_bias or dropout:
        exact = x.double() + (x_bias.double() if has_x_bias else 0.0)
        if dropout:
            exact = exact * reference.hidden_keep_mask(seed, 5, hidden, dropout) * drop_scale(dropout)
        exact = exact + (residual.double() if has_residual else 0.0)
        assert_close(total, exact.to(dtype), exact, what="total")
    else:
        assert total.numel() == 0
        total = x
    exact = [total.double().mean(1), (total.double().var(1, correction=0) + 1e-5).rsqrt()]
    for name, ours, wanted in zip(("mean", "rstd"), (mean, rstd), exact, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, wanted.float(), wanted, what=name)
    inferred, *nothing = kernel.layer_norm_forward(x, weight, bias, **options)
    assert torch.equal(out, inferred)
    assert not any(each.numel() for each in nothing)


def test_gradients_of_the_torch_path(generator):
    x, weight, bias, residual, x_bias = inputs(3, 6, torch.float64, generator, "cpu")
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, residual, x_bias)]
    seed = torch.tensor([3])

    def run(x, weight, bias, residual, x_bias):
        return layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, dropout=0.3, seed=seed, eps=1e-5)

    assert torch.autograd.gradcheck(run, leaves)


def check_backward(path, x, weight, bias, dout, *, eps=1e-5, residual=None, x_bias=None, dropout=0.0, seed=None):
    """Hold every gradient to the error rule; gives them by name."""
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual, "x_bias": x_bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    keep = reference.hidden_keep_mask(seed, *x.shape, dropout) if dropout else None

    def by(op):
        def run(*tensors):
            named = dict(zip(leaves, tensors, strict=True))
            return op(**named)

        return run

    def plain(x, weight, bias, residual=None, x_bias=None):
        return plainly(x, weight, bias, residual, x_bias, keep, dropout, eps)

    return check_gradients(
        path,
        by(partial(layer_norm, dropout=dropout, seed=seed, eps=eps)),
        by(plain),
        by(partial(reference.layer_norm, keep=keep, dropout=dropout, eps=eps)),
        leaves,
        dout,
    )


def upstream(x, generator):
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 48, 384, 769, 8192])
def test_gradients_of_widths_case_14(hidden, dtype, device, generator, nan_empty, monkeypatch):
    limit_programs(monkeypatch, row_wise_choices, "layer_norm_backward", 2)
    x, weight, bias, residual, x_bias = inputs(5, hidden, dtype, generator, device)
    check_backward("triton", x, weight, bias, upstream(x, generator), residual=residual, x_bias=x_bias)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("has_x_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("rows", [1, 11])
def test_gradients_of_each_branch(rows, has_residual, has_x_bias, dropout, device, generator, nan_empty, monkeypatch):
    """Four rows of 48 halves a step: two programs share 11 rows as 4 + 3 and 4."""
    limit_programs(monkeypatch, row_wise_choices, "layer_norm_backward", 2)
    x, weight, bias, residual, x_bias = inputs(rows, 48, torch.float16, generator, device)
    check_backward(
        "triton",
        x,
        weight,
        bias,
        upstream(x, generator),
        residual=residual if has_residual else None,
        x_bias=x_bias if has_x_bias else None,
        dropout=dropout,
        seed=torch.tensor([9], device=device) if dropout else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_dropout(dtype, device, generator, nan_empty):
    x, weight, bias, residual, x_bias = inputs(4, 100, dtype, generator, device)
    seed = torch.tensor([-5], device=device)
    options = {"residual": residual, "x_bias": x_bias, "dropout": 0.1, "seed": seed}
    check_backward("triton", x, weight, bias, upstream(x, generator), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_float32_parameters_beside_half_rows(dtype, device, generator):
    x, weight, bias, residual, x_bias = inputs(3, 96, dtype, generator, device, parameters=torch.float32)
    check_backward("triton", x, weight, bias, upstream(x, generator), residual=residual, x_bias=x_bias)
    check_backward("triton", x, weight.to(dtype), bias, upstream(x, generator))  # each in a dtype of its own


def test_gradients_do_not_cancel_case_10(device, generator):
    x, weight, bias, residual, _ = inputs(3, 768, torch.float32, generator, device)
    check_backward("triton", x + 1e4, weight, bias, upstream(x, generator), residual=residual, eps=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "odd base"])
def test_gradients_of_layouts_case_29(layout, device, generator, monkeypatch):
    """In more than one step a program, which moves each tensor on by a stride of its own."""
    limit_programs(monkeypatch, row_wise_choices, "layer_norm_backward", 2)
    x, weight, bias, residual, _ = inputs(5, 96, torch.float16, generator, device)
    store = torch.randn(5 * 96 + 3, generator=generator).to(device, torch.float16)
    dout = {
        "transposed": store[3:].view(96, 5).T,
        "expanded": store[:96].expand(5, -1),
        "odd base": store[3:].view(5, 96),
    }[layout]
    check_backward("triton", dout, weight, bias, x, residual=residual)
    check_backward("triton", x, weight, bias, dout, residual=dout)


def test_gradients_of_no_rows_case_15(device):
    x, weight = torch.empty(0, 48, device=device), torch.ones(48, device=device)
    with backend.use_backend("triton"):
        run = partial(layer_norm, eps=1e-5)
        dx, dweight, dbias = gradients(lambda *leaves: run(*leaves), (x, weight, weight), x)
    assert dx.shape == (0, 48)
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_nearly_constant_rows(dtype, device, generator):
    """The sum is rounded for the backward by more than its deviation: statistics of another would not fit it."""
    x, weight, bias, residual, _ = inputs(3, 96, dtype, generator, device)
    x, residual = torch.full_like(x, 3.0) + x * 1e-6, torch.full_like(x, 1e-3)
    check_backward("triton", x, weight, bias, upstream(x, generator), residual=residual, eps=1e-5)


def test_gradients_leave_slack_alone_case_15(device, generator):
    """Rows around those asked for, NaN, stay out; a row without upstream gradient, as slack has, gets exactly 0."""
    x, weight, bias, residual, x_bias = inputs(6, 48, torch.float32, generator, device)
    dout = upstream(x, generator)
    for tensor in (x, residual, dout):
        tensor[[0, 5]] = torch.nan
    dout[2], x[2], residual[2] = 0.0, 0.0, 0.0
    got = check_backward("triton", x[1:5], weight, bias, dout[1:5], residual=residual[1:5], x_bias=x_bias, eps=1e-12)
    assert not got["x"][1].any() and got["x"][0].all()


def test_ten_backward_runs_are_bit_equal_case_16(device, generator, monkeypatch):
    limit_programs(monkeypatch, row_wise_choices, "layer_norm_backward", 3)
    leaves = inputs(17, 48, torch.float16, generator, device)
    dout, seed = upstream(leaves[0], generator), torch.tensor([3], device=device)

    def run(x, weight, bias, residual, x_bias):
        return layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, dropout=0.2, seed=seed, eps=1e-5)

    with backend.use_backend("triton"):
        first, *others = (gradients(run, leaves, dout) for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_dropped_elements_get_no_gradient_case_17(device, generator):
    x, weight, bias, residual, _ = inputs(9, 104, torch.float32, generator, device)
    seed = torch.tensor([77], device=device)
    got = check_backward("triton", x, weight, bias, upstream(x, generator), residual=residual, dropout=0.3, seed=seed)
    keep = reference.hidden_keep_mask(seed, *x.shape, 0.3)
    assert torch.equal(got["x"] != 0, keep)
    assert got["residual"].all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_case_27(dtype, path, device, generator):
    """float32 weights and residual, a product in the dtype of autocast."""
    leaves = [tensor.to(device) for tensor in projection(5, 32, 48, torch.float32, generator)]
    dout = torch.randn(5, 48, generator=generator).to(device)

    def cast(run):
        def under(*tensors):
            with torch.autocast(device.type, dtype):
                return run(*tensors)

        return under

    def plain(x, weight, x_bias, residual, norm_weight, norm_bias):
        total = F.linear(x, weight, x_bias) + residual.to(dtype)
        return F.layer_norm(total, (48,), norm_weight.to(dtype), norm_bias.to(dtype), 1e-5).to(dtype)

    def exact(x, weight, x_bias, residual, norm_weight, norm_bias):
        return reference.layer_norm(F.linear(x, weight, x_bias), norm_weight, norm_bias, residual=residual, eps=1e-5)

    run = cast(partial(linear_layer_norm, eps=1e-5))
    with backend.use_backend(path):
        assert run(*leaves).dtype == dtype
        assert run(leaves[0].to(dtype), *leaves[1:]).dtype == dtype  # half rows beside a float32 residual
        ours = gradients(run, leaves, dout)
    rough = gradients(cast(plain), leaves, dout)
    wanted = gradients(exact, [leaf.double() for leaf in leaves], dout.double())
    for got, by_torch, exactly in zip(ours, rough, wanted, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, by_torch, exactly, what=path)


def test_autocast_leaves_float64_alone(device):
    x, weight = torch.ones(2, 8, dtype=torch.float64, device=device), torch.ones(8, dtype=torch.float64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer_norm(x, weight, weight, eps=1e-5).dtype == torch.float64


def test_inference_writes_no_statistics(device, generator, monkeypatch):
    asked = []
    forward = kernel.layer_norm_forward

    def spy(*args, store_stats, **options):
        asked.append(store_stats)
        return forward(*args, store_stats=store_stats, **options)

    monkeypatch.setattr(kernel, "layer_norm_forward", spy)
    x, weight, bias, _, _ = inputs(2, 8, torch.float32, generator, device)
    with backend.use_backend("triton"):
        layer_norm(x, weight, bias, eps=1e-5)
        layer_norm(x, weight.requires_grad_(), bias, eps=1e-5)
        with torch.no_grad():
            layer_norm(x, weight, bias, eps=1e-5)
    assert asked == [False, True, False]


def test_the_op_without_statistics_has_no_gradient(device, generator):
    x, weight, bias, _, _ = inputs(2, 8, torch.float32, generator, device)
    out = layer_norm_forward(x.requires_grad_(), weight, bias, None, None, 0.0, None, 1e-5, None, 0, False)[0]
    with pytest.raises(BackendError, match="store_stats=True"):
        out.backward(torch.ones_like(out))


MASKS = {
    "holes": [[1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "left padding": [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]],
    "empty sequences": [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]],
    "no padding": [[1, 1, 1], [1, 1, 1]],
    "no tokens": [[0, 0], [0, 0]],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("hidden", [48, 769])
@pytest.mark.parametrize("mask", MASKS)
def test_unpack(mask, hidden, dropout, dtype, path, device, generator, nan_empty):
    """The padded result is that of unpacking; NaN in the gradient at padding goes nowhere."""
    packing = Packing.from_mask(torch.tensor(MASKS[mask], device=device))
    leaves = inputs(packing.tokens, hidden, dtype, generator, device)
    seed = torch.tensor([9], device=device)

    def run(x, weight, bias, residual, x_bias, **options):
        options |= {"residual": residual, "x_bias": x_bias, "dropout": dropout, "seed": seed, "eps": 1e-5}
        return layer_norm(x, weight, bias, **options)

    dout = torch.full((packing.batch * packing.padded_shape[1], hidden), torch.nan, device=device, dtype=dtype)
    dout[packing.indices] = upstream(leaves[0], generator)
    dout = dout.view(*packing.padded_shape, hidden)
    with backend.use_backend(path):
        padded, packed = run(*leaves, unpack=packing), run(*leaves)
        ours = gradients(partial(run, unpack=packing), leaves, dout)
        wanted = gradients(run, leaves, packing.pack(dout))
    assert padded.shape == (*packing.padded_shape, hidden)
    assert torch.equal(padded, packing.unpack(packed))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_unpack_of_wide_rows(device, generator, nan_empty):
    """Above 4096 columns torch adds up the gradient of the bias, and must leave out padding."""
    packing = Packing.from_mask(torch.tensor(MASKS["holes"], device=device))
    leaves = inputs(packing.tokens, 4097, torch.float16, generator, device)[:3]
    dout = torch.full((3, 6, 4097), torch.nan, device=device, dtype=torch.float16)
    dout.view(18, -1)[packing.indices] = upstream(leaves[0], generator)
    with backend.use_backend("triton"):
        ours = gradients(partial(layer_norm, eps=1e-5, unpack=packing), leaves, dout)
        wanted = gradients(partial(layer_norm, eps=1e-5), leaves, packing.pack(dout))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_unpack_compiles_to_one_graph(device, generator):
    packing = Packing.from_mask(torch.tensor(MASKS["holes"], device=device))
    leaves = inputs(packing.tokens, 24, torch.float32, generator, device)[:3]
    dout = torch.randn(3, 6, 24, generator=generator).to(device)
    run = partial(layer_norm, eps=1e-5, unpack=packing)
    torch._dynamo.reset()
    with backend.use_backend("triton"):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled, leaves, dout), gradients(run, leaves, dout))


def test_gradients_of_the_reference(generator):
    leaves = [leaf.requires_grad_() for leaf in inputs(3, 6, torch.float64, generator, "cpu")]
    keep = reference.hidden_keep_mask(torch.tensor([3]), 3, 6, 0.3)

    def run(x, weight, bias, residual, x_bias):
        options = {"residual": residual, "x_bias": x_bias, "keep": keep, "dropout": 0.3, "eps": 1e-5}
        return reference.layer_norm(x, weight, bias, **options)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.kernels
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_compiles_to_one_graph(dropout, generator):
    leaves = projection(3, 16, 24, torch.float32, generator)
    dout, seed = torch.randn(3, 24, generator=generator), torch.tensor([8])

    def run(*tensors):
        return linear_layer_norm(*tensors, dropout=dropout, seed=seed, eps=1e-5)

    torch._dynamo.reset()
    with backend.use_backend("triton"):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        for ours, wanted in zip(gradients(compiled, leaves, dout), gradients(run, leaves, dout), strict=True):
            torch.testing.assert_close(ours, wanted)


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
        ("unpack", {"unpack": Packing.from_lengths([3])}),
        ("unpack", {"unpack": Packing.from_lengths([2], device="meta")}),
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
    _, norm_weight, norm_bias, residual, x_bias = inputs(rows, hidden, dtype, generator, x.device)
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


@pytest.mark.kernels
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
    out = linear_layer_norm(*tensors, eps=1e-5)
    out.backward(torch.randn(out.shape, generator=generator))
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


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient, device, generator):
    x, weight, bias, residual, x_bias = inputs(3, 24, torch.float32, generator, device)
    for tensor in (x, weight, bias, residual, x_bias):
        tensor.requires_grad_(needs_gradient)
    seed = torch.tensor([8], device=device)
    rows = torch.tensor([4, 1, 0], device=device)
    for options in (
        (residual, x_bias, 0.1, seed, 1e-5, None, 0),
        (residual, None, 0.0, None, 1e-5, None, 0),
        (None, None, 0.0, None, 1e-5, None, 0),
        (residual, x_bias, 0.1, seed, 1e-5, rows, 6),
    ):
        torch.library.opcheck(layer_norm_forward, (x, weight, bias, *options, needs_gradient))


def test_opcheck_of_the_backward(device, generator):
    x, weight, *_ = inputs(3, 24, torch.float32, generator, device)
    dout = upstream(x, generator)
    mean, rstd = torch.rand(2, 3, generator=generator).to(device)
    seed = torch.tensor([8], device=device)
    rows = torch.tensor([2, 1, 0], device=device)
    torch.library.opcheck(layer_norm_backward, (dout, x, weight, mean, rstd, True, True, 0.1, seed, None))
    torch.library.opcheck(layer_norm_backward, (dout, x, weight, mean, rstd, True, False, 0.0, None, None))
    torch.library.opcheck(layer_norm_backward, (dout, x, weight, mean, rstd, False, False, 0.1, seed, rows))


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
