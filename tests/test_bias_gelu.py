"""bias_gelu and linear_gelu: both paths against float64, by the error rule."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients, gradients, limit_programs
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.ops.bias_gelu import bias_gelu, bias_gelu_backward, bias_gelu_forward, linear_gelu
from fastbert.ops.layer_norm import linear_layer_norm
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
    limit_programs(monkeypatch, "bias_gelu_backward", 2)
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
    limit_programs(monkeypatch, "bias_gelu_backward", 1)
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
    limit_programs(monkeypatch, "bias_gelu_backward", 3)
    x, bias = inputs(33, 48, torch.float16, generator, device)
    dout = upstream(x, generator)
    with backend.use_backend("triton"):
        first, *others = (gradients(bias_gelu, (x, bias), dout) for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_case_27(dtype, path, device, generator):
    """float32 weights, a product in the dtype of autocast."""
    leaves = [tensor.to(device) for tensor in projection(5, 32, 48, torch.float32, generator)]
    dout = torch.randn(5, 48, generator=generator).to(device)

    def cast(run):
        def under(*tensors):
            with torch.autocast(device.type, dtype):
                return run(*tensors)

        return under

    with backend.use_backend(path):
        assert cast(linear_gelu)(*leaves).dtype == dtype
        assert cast(bias_gelu)(leaves[0], leaves[0][0]).dtype == dtype
        ours = gradients(cast(linear_gelu), leaves, dout)
    rough = gradients(cast(lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))), leaves, dout)
    wanted = gradients(
        lambda x, weight, bias: reference.bias_gelu(F.linear(x, weight), bias),
        [leaf.double() for leaf in leaves],
        dout.double(),
    )
    for got, by_torch, exactly in zip(ours, rough, wanted, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, by_torch, exactly, what=path)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("approximate", FORMS)
def test_gradients_of_the_reference(approximate, gated, generator):
    x, bias = (tensor.requires_grad_() for tensor in inputs(3, 6, torch.float64, generator, "cpu"))
    run = partial(reference.bias_gelu, approximate=approximate, gated=gated)
    assert torch.autograd.gradcheck(run, (x, bias))


@pytest.mark.kernels
def test_a_step_compiles_to_one_graph(generator):
    leaves = projection(3, 16, 24, torch.float32, generator)
    dout = torch.randn(3, 24, generator=generator)
    torch._dynamo.reset()
    with backend.use_backend("triton"):
        compiled = torch.compile(linear_gelu, backend="aot_eager", fullgraph=True)
        for ours, wanted in zip(gradients(compiled, leaves, dout), gradients(linear_gelu, leaves, dout), strict=True):
            torch.testing.assert_close(ours, wanted)


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


def projection(rows, wide, out, dtype, generator):
    x = torch.randn(rows, wide, generator=generator).to(dtype)
    weight = (torch.randn(out, wide, generator=generator) * 3 / wide**0.5).to(dtype)
    return x, weight, torch.randn(out, generator=generator).to(dtype)


def check_linear(path, x, weight, bias, approximate, context):
    with backend.use_backend(path), context:
        out = linear_gelu(x, weight, bias, approximate=approximate)
    plain = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    wide = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(out, plain, reference.bias_gelu(wide, None, approximate=approximate), what=path)


@pytest.mark.kernels
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_linear_gelu(rows, has_bias, dtype, approximate, generator):
    x, weight, bias = projection(rows, 32, 48, dtype, generator)
    bias = bias if has_bias else None
    check_linear("triton", x, weight, bias, approximate, contextlib.nullcontext())
    check_linear("torch", x, weight, bias, approximate, torch.no_grad())
    check_linear("torch", x.T.contiguous().T, weight.T.contiguous().T, bias, approximate, torch.no_grad())


def test_linear_gelu_of_no_columns_is_gelu_of_the_bias():
    bias = torch.tensor([-1.0, 0.0, 2.0])
    with torch.no_grad():
        out = linear_gelu(torch.zeros(2, 0), torch.zeros(3, 0), bias)
    assert torch.equal(out, F.gelu(bias).expand(2, -1))


def test_linear_gelu_has_gradients_where_asked(generator):
    x, weight, bias = projection(3, 4, 5, torch.float32, generator)
    out = linear_gelu(x, weight.requires_grad_(), bias)
    dout = torch.randn(out.shape, generator=generator)
    out.backward(dout)
    expected = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)), weight, dout)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_linear_gelu_honours_autocast(generator):
    x, weight, bias = projection(3, 16, 8, torch.float32, generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argument", "at", "bad"),
    [
        ("x", 0, torch.zeros(3)),
        ("weight", 1, torch.zeros(5, 3)),
        ("weight", 1, torch.zeros(5, 4, dtype=torch.float16)),
        ("bias", 2, torch.zeros(4)),
        ("bias", 2, torch.zeros(5, dtype=torch.float16)),
        ("bias", 2, torch.zeros(5, device="meta")),
    ],
)
def test_linear_gelu_bad_input(argument, at, bad, generator):
    tensors = list(projection(3, 4, 5, torch.float32, generator))
    tensors[at] = bad
    with pytest.raises(ArgumentError) as raised:
        linear_gelu(*tensors)
    assert raised.value.argument == argument
    with pytest.raises(ArgumentError, match="approximate"):
        linear_gelu(torch.zeros(2, 4), torch.zeros(5, 4), None, approximate="quick")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_to_one_graph(compiler, path, generator):
    x, weight, bias = projection(3, 16, 16, torch.float32, generator)

    def run(x):
        return bias_gelu(bias_gelu(linear_gelu(x, weight, bias), bias, approximate="tanh"), bias, gated=True)

    torch._dynamo.reset()
    with backend.use_backend(path), torch.no_grad():
        compiled = torch.compile(run, backend=compiler, fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x))


class Recorder(TorchDispatchMode):
    """Names of the ops that run inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:TF32")  # torch's, about GPUs that aren't there, when flags are set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("context", "fuses"),
    [
        (torch.no_grad, True),
        (torch.inference_mode, True),
        (contextlib.nullcontext, False),
        (lambda: torch.backends.mkldnn.flags(enabled=False), False),
    ],
    ids=["no_grad", "inference", "gradient", "disabled"],
)
def test_onednn_fuses_where_it_may(context, fuses, dtype, generator):
    x, weight, bias = projection(3, 16, 24, dtype, generator)
    weight.requires_grad_(context is contextlib.nullcontext)
    if dtype == torch.float32 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        fuses = False
    with context(), Recorder() as recorder:
        linear_gelu(x, weight, bias)
    assert ("mkldnn._linear_pointwise.default" in recorder.names) == fuses
    with context(), Recorder() as recorder:
        linear_layer_norm(x, weight, bias, torch.zeros(3, 24, dtype=dtype), bias, bias, eps=1e-5)
    assert ("mkldnn._linear_pointwise.binary" in recorder.names) == fuses


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
def test_the_old_exporter_sees_plain_torch_case_26(generator):
    x, weight, bias = projection(3, 16, 24, torch.float32, generator)
    with torch.no_grad():
        graph = str(torch.jit.trace(lambda x: linear_gelu(x, weight, bias), x).graph)
    assert "aten::gelu" in graph
    assert "mkldnn" not in graph


def test_linear_gelu_exports_plain_torch_case_26(generator):
    """Exporters see F.linear and F.gelu, not oneDNN's private op."""
    x, weight, bias = projection(3, 16, 24, torch.float32, generator)

    class Module(torch.nn.Module):
        def forward(self, x):
            return linear_gelu(x, weight, bias)

    with torch.no_grad():
        graph = str(torch.export.export(Module(), (x,)).graph)
    assert "aten.gelu" in graph
    assert "mkldnn" not in graph


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
