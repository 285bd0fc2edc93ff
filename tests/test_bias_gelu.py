"""bias_gelu: both paths against float64, by the error rule."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients, gradients, limit_programs

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import bias_gelu_choices
from fastbert.ops.bias_gelu import bias_gelu, bias_gelu_backward, bias_gelu_forward
from fastbert.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's: exp2 goes to infinity on purpose

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = ["triton", "torch"]
FORMS = ["none", "tanh"]
WIDTHS = [1, 7, 8, 48, 128, 384, 768, 769, 1024, 1536, 4096, 8192]


def inputs(rows, width, dtype, generator, device, parameters=None):
    x = (torch.randn(rows, width, generator=generator) * 3).to(device, dtype)
    return x, torch.randn(width, generator=generator).to(device, parameters or dtype)


def plainly(x, bias=None, *, approximate="none", gated=False):
    """What a user of PyTorch writes in one dtype."""
    z = x if bias is None else x + bias
    if not gated:
        return F.gelu(z, approximate=approximate)
    z, gate = z.chunk(2, 1)
    return F.gelu(z, approximate=approximate) * gate


def check(path, x, bias, approximate="none", gated=False):
    """Run one path and hold it to the error rule; returns the output."""
    form = {"approximate": approximate, "gated": gated}
    with backend.use_backend(path):
        out = bias_gelu(x, bias, **form)
    plain = plainly(x, None if bias is None else bias.to(x.dtype), **form)
    exact = reference.bias_gelu(x.double(), None if bias is None else bias.double(), **form)
    assert_close(out, plain, exact, what=path)
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_case_14(width, dtype, path, device, generator, nan_empty):
    check(path, *inputs(3, width, dtype, generator, device))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (5, 300), (9, 256)])
@pytest.mark.parametrize("gated", [False, True])
def test_each_branch(rows, width, gated, has_bias, dtype, approximate, path, device, generator, nan_empty):
    """300 columns leave a block part empty, 256 don't; 5 and 9 rows leave a tile part empty."""
    x, bias = inputs(rows, width * (1 + gated), dtype, generator, device)
    check(path, x, bias if has_bias else None, approximate, gated)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 7, 1152, 2624])
def test_gated_widths_case_14(width, path, device, generator, nan_empty):
    """ModernBERT's two, and halves that do not begin on 16 bytes."""
    check(path, *inputs(3, 2 * width, torch.float16, generator, device), gated=True)


@pytest.mark.parametrize("path", PATHS)
def test_the_first_half_goes_through_gelu_and_the_second_is_the_gate(path, device):
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]], device=device)
    with backend.use_backend(path):
        out = bias_gelu(x, None, gated=True)
    torch.testing.assert_close(out, F.gelu(x[:, :2]) * x[:, 2:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("approximate", FORMS)
def test_erf_and_tanh_are_not_the_same_case_7(approximate, path, device):
    x = torch.tensor([[-2.0, 2.5]], device=device)
    other = "tanh" if approximate == "none" else "none"
    with backend.use_backend(path):
        ours = bias_gelu(x, None, approximate=approximate)
    assert (ours - F.gelu(x, approximate=approximate)).abs().max() < 1e-6
    assert (ours - F.gelu(x, approximate=other)).abs().max() > 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_bias_beside_half_rows(dtype, path, device, generator):
    check(path, *inputs(3, 96, dtype, generator, device, parameters=torch.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("approximate", FORMS)
def test_outliers_stay_finite_case_8(approximate, path, device):
    """The sum is beyond float16 on the way, and the result is not."""
    x = torch.tensor([[60000.0, -60000.0, 65504.0, 30.0]], dtype=torch.float16, device=device)
    bias = torch.tensor([5000.0, -60000.0, -60000.0, -30.0], dtype=torch.float16, device=device)
    with backend.use_backend(path):
        out = bias_gelu(x, bias, approximate=approximate)
    assert torch.equal(out, torch.tensor([[65000.0, 0.0, 5504.0, 0.0]], dtype=torch.float16, device=device))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["slice", "odd base", "odd stride", "transposed", "expanded"])
def test_layouts_case_29(layout, path, device, generator):
    rows, width = 5, 96
    store, bias = inputs(rows * 4, width * 2, torch.float16, generator, device)
    x = {
        "slice": store[::4, :width],
        "odd base": store.flatten()[3 : 3 + rows * width].view(rows, width),
        "odd stride": store.flatten()[: rows * 99].view(rows, 99)[:, :width],
        "transposed": store.flatten()[: rows * width].view(width, rows).T,
        "expanded": store[:1, :width].expand(rows, -1),
    }[layout]
    check(path, x, bias[::2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 48), (3, 0)])
def test_nothing_to_do_case_15(shape, path, device):
    x, bias = torch.empty(shape, device=device), torch.zeros(shape[1], device=device)
    with backend.use_backend(path):
        assert bias_gelu(x, bias).shape == shape
        assert bias_gelu(x, bias, gated=True).shape == (shape[0], shape[1] // 2)


@pytest.mark.parametrize("gated", [False, True])
def test_slack_is_not_touched_case_15(gated, device, generator):
    x, bias = inputs(5, 48, torch.float32, generator, device)
    x[[0, 4]] = torch.nan
    check("triton", x[1:4], bias, gated=gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("approximate", FORMS)
def test_gradients_of_the_torch_path(approximate, gated, generator):
    x, bias = (tensor.requires_grad_() for tensor in inputs(3, 6, torch.float64, generator, "cpu"))
    run = partial(bias_gelu, approximate=approximate, gated=gated)
    assert torch.autograd.gradcheck(run, (x, bias))


def check_backward(path, x, bias, dout, approximate="none", gated=False):
    """Hold both gradients to the error rule; gives them by name."""
    leaves = {"x": x} if bias is None else {"x": x, "bias": bias}
    form = {"approximate": approximate, "gated": gated}
    return check_gradients(
        path,
        lambda x, bias=None: bias_gelu(x, bias, **form),
        partial(plainly, **form),
        lambda x, bias=None: reference.bias_gelu(x, bias, **form),
        leaves,
        dout,
    )


def upstream(x, generator, gated=False):
    return torch.randn(len(x), x.shape[1] // (1 + gated), generator=generator).to(x.device, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 48, 384, 769, 1024, 8192])
def test_gradients_of_widths_case_14(width, dtype, device, generator, nan_empty):
    x, bias = inputs(3, width, dtype, generator, device)
    check_backward("triton", x, bias, upstream(x, generator))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (5, 300), (19, 256)])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_each_branch(
    rows, width, gated, has_bias, dtype, approximate, device, generator, nan_empty, monkeypatch
):
    """Two programs share 19 rows, in steps of 4, as 4 + 4 + 3 and 4 + 4."""
    limit_programs(monkeypatch, bias_gelu_choices, "bias_gelu_backward", 2)
    x, bias = inputs(rows, width * (1 + gated), dtype, generator, device)
    dout = upstream(x, generator, gated)
    check_backward("triton", x, bias if has_bias else None, dout, approximate, gated)


@pytest.mark.parametrize("width", [1, 7, 1152])
def test_gradients_of_gated_widths_case_14(width, device, generator, nan_empty):
    x, bias = inputs(3, 2 * width, torch.float16, generator, device)
    check_backward("triton", x, bias, upstream(x, generator, gated=True), gated=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_a_float32_bias_beside_half_rows(dtype, device, generator):
    x, bias = inputs(3, 96, dtype, generator, device, parameters=torch.float32)
    check_backward("triton", x, bias, upstream(x, generator))
    check_backward("triton", x, bias, upstream(x, generator, gated=True), gated=True)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "odd base"])
def test_gradients_of_layouts_case_29(layout, device, generator, monkeypatch):
    """In more than one step a program, which moves each tensor on by a stride of its own."""
    limit_programs(monkeypatch, bias_gelu_choices, "bias_gelu_backward", 1)
    x, bias = inputs(5, 96, torch.float16, generator, device)
    store = torch.randn(5 * 96 + 3, generator=generator).to(device, torch.float16)
    dout = {
        "transposed": store[3:].view(96, 5).T,
        "expanded": store[:96].expand(5, -1),
        "odd base": store[3:].view(5, 96),
    }[layout]
    check_backward("triton", x, bias, dout)
    check_backward("triton", dout, bias, x)
    check_backward("triton", dout, bias, x[:, ::2], gated=True)


@pytest.mark.parametrize("shape", [(0, 48), (3, 0)])
def test_gradients_of_nothing_case_15(shape, device):
    x, bias = torch.empty(shape, device=device), torch.ones(shape[1], device=device)
    for gated in (False, True):
        with backend.use_backend("triton"):
            dx, dbias = gradients(partial(bias_gelu, gated=gated), (x, bias), x[:, : shape[1] // (1 + gated)])
        assert dx.shape == shape
        assert torch.equal(dbias, torch.zeros_like(bias))


def test_gradients_leave_slack_alone_case_15(device, generator):
    x, bias = inputs(6, 48, torch.float32, generator, device)
    dout = upstream(x, generator)
    x[[0, 5]], dout[[0, 5]] = torch.nan, torch.nan
    dout[2] = 0.0
    assert not check_backward("triton", x[1:5], bias, dout[1:5])["x"][1].any()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's: the forward of an infinity
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_outliers_case_8(dtype, approximate, device):
    """Far out the derivative is 0 or 1, where its formula is infinity times 0; NaN stays."""
    x = torch.tensor([[6e4, -6e4, 30.0, -30.0, torch.inf, -torch.inf, torch.nan]], dtype=dtype, device=device)
    dout = torch.tensor([[2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0]], dtype=dtype, device=device)
    with backend.use_backend("triton"):
        (dx,) = gradients(lambda x: bias_gelu(x, None, approximate=approximate), (x,), dout)
    assert dx[0, :6].tolist() == [2.0, 0.0, 3.0, 0.0, 4.0, 0.0]
    assert dx[0, 6].isnan()


def test_ten_backward_runs_are_bit_equal_case_16(device, generator, monkeypatch):
    limit_programs(monkeypatch, bias_gelu_choices, "bias_gelu_backward", 3)
    x, bias = inputs(33, 48, torch.float16, generator, device)
    dout = upstream(x, generator)
    with backend.use_backend("triton"):
        first, *others = (gradients(bias_gelu, (x, bias), dout) for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("approximate", FORMS)
def test_gradients_of_the_reference(approximate, gated, generator):
    x, bias = (tensor.requires_grad_() for tensor in inputs(3, 6, torch.float64, generator, "cpu"))
    run = partial(reference.bias_gelu, approximate=approximate, gated=gated)
    assert torch.autograd.gradcheck(run, (x, bias))


def test_triton_does_not_serve_float64(device):
    with backend.use_backend("triton"), pytest.raises(BackendError, match="float64"):
        bias_gelu(torch.zeros(1, 8, dtype=torch.float64, device=device), None)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": torch.zeros(4)}),
        ("x", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
        ("x", {"x": torch.zeros(2, 5), "bias": torch.zeros(5), "gated": True}),
        ("bias", {"bias": torch.zeros(5)}),
        ("bias", {"bias": torch.zeros(2), "gated": True}),
        ("bias", {"bias": torch.zeros(4, dtype=torch.float16)}),
        ("bias", {"bias": torch.zeros(4, device="meta")}),
        ("approximate", {"approximate": "gelu_new"}),
    ],
)
def test_bad_input(argument, changes):
    good = {"x": torch.zeros(2, 4), "bias": torch.zeros(4)}
    with pytest.raises(ArgumentError) as raised:
        bias_gelu(**good | changes)
    assert raised.value.argument == argument


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient, device, generator):
    x, bias = (tensor.requires_grad_(needs_gradient) for tensor in inputs(3, 24, torch.float32, generator, device))
    torch.library.opcheck(bias_gelu_forward, (x, bias, "none"))
    torch.library.opcheck(bias_gelu_forward, (x, None, "tanh"))
    torch.library.opcheck(bias_gelu_forward, (x, bias, "none", True))


def test_opcheck_of_the_backward(device, generator):
    x, bias = inputs(3, 24, torch.float32, generator, device)
    torch.library.opcheck(bias_gelu_backward, (upstream(x, generator), x, bias, "none"))
    torch.library.opcheck(bias_gelu_backward, (upstream(x, generator), x, None, "tanh"))
    torch.library.opcheck(bias_gelu_backward, (upstream(x, generator, gated=True), x, bias, "none", True))
