"""linear_gelu: each form of it against float64, by the error rule, and the kernel with the epilogue by itself."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import choices, linear_gelu_choices
from fastbert.kernels.linear_gelu import linear_gelu_forward as launch_kernel
from fastbert.kernels.target import KNOWN, interpreted
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.layer_norm import linear_layer_norm
from fastbert.ops.linear_gelu import linear_gelu, linear_gelu_forward
from fastbert.testing import assert_close

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "static"))
import launches

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's: exp2 goes to infinity on purpose

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = ["triton", "torch"]
FORMS = ["none", "tanh"]


@pytest.fixture(params=["fused pass", "epilogue"])
def form(request, monkeypatch):
    """The form that the launch table names."""
    monkeypatch.setattr(linear_gelu_choices, "linear_gelu", lambda *_, **__: choices.LinearGeluForm(request.param))
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, in two programs, two rows of tiles at a time."""
    choice = choices.LinearGeluTile(16, 16, 16, 4, 2, PROGRAMS=1, GROUP_M=2)
    monkeypatch.setattr(linear_gelu_choices, "linear_gelu_forward", lambda *_: choice)


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
def test_linear_gelu(rows, has_bias, dtype, approximate, form, generator):
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
        return bias_gelu(linear_gelu(x, weight, bias), bias, approximate="tanh")

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
def test_onednn_fuses_where_it_may(context, fuses, dtype, generator, choose):
    choose("onednn")
    x, weight, bias = projection(3, 16, 24, dtype, generator)
    weight.requires_grad_(context is contextlib.nullcontext)
    fuses = fuses and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for run in (
        lambda: linear_gelu(x, weight, bias),
        lambda: linear_layer_norm(x, weight, bias, torch.zeros(3, 24, dtype=dtype), bias, bias, eps=1e-5),
    ):
        with context(), torch.profiler.profile() as seen:  # a dispatch mode would be shown torch's own ops
            run()
        assert ("mkldnn::_linear_pointwise" in {event.name for event in seen.events()}) == fuses


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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_case_27(dtype, path, form, device, generator):
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


@pytest.mark.kernels
def test_a_step_compiles_to_one_graph(form, generator):
    leaves = projection(3, 16, 24, torch.float32, generator)
    dout = torch.randn(3, 24, generator=generator)
    torch._dynamo.reset()
    with backend.use_backend("triton"):
        compiled = torch.compile(linear_gelu, backend="aot_eager", fullgraph=True)
        for ours, wanted in zip(gradients(compiled, leaves, dout), gradients(linear_gelu, leaves, dout), strict=True):
            torch.testing.assert_close(ours, wanted)


def operands(rows, width, depth, dtype, generator, device, bias_dtype=None):
    """x and weight in the midst of NaN; a bias."""
    x = torch.full((rows + 2, depth + 8), torch.nan).to(device, dtype)[1:-1, :depth]
    weight = torch.full((width + 2, depth + 24), torch.nan).to(device, dtype)[1:-1, :depth]
    x.copy_(torch.randn(rows, depth, generator=generator))
    weight.copy_(torch.randn(width, depth, generator=generator) * 3 / depth**0.5)
    return x, weight, torch.randn(width, generator=generator).to(device, bias_dtype or dtype)


def check_kernel(x, weight, bias, approximate="none"):
    """Hold the kernel's output to the error rule, and the product that it stores."""
    wide = F.linear(x.double(), weight.double())
    exact = reference.bias_gelu(wide, None if bias is None else bias.double(), approximate=approximate)
    x_alone, weight_alone = x.contiguous(), weight.contiguous()  # torch's bfloat16 product reads the NaN between rows
    rough = F.linear(x_alone, weight_alone, None if bias is None else bias.to(x.dtype))
    plain = F.gelu(rough, approximate=approximate)
    out, product = launch_kernel(x, weight, bias, approximate=approximate, store_product=True)
    assert_close(out, plain, exact, what="out")
    assert_close(product, F.linear(x_alone, weight_alone), wide, what="product")
    bare, nothing = launch_kernel(x, weight, bias, approximate=approximate)
    assert torch.equal(bare, out)
    assert nothing.shape == (0, len(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(1, 1, 1), (5, 7, 9), (129, 130, 40), (128, 128, 64), (70, 300, 100)]
)
def test_shapes(rows, width, depth, dtype, device, generator, nan_empty):
    check_kernel(*operands(rows, width, depth, dtype, generator, device))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("depth", [48, 50])
def test_each_branch(depth, has_bias, dtype, approximate, device, generator, nan_empty, small_tiles):
    """Two programs share 5 x 3 tiles, in groups of 2, 2 and 1 rows of them; 50 is no multiple of a step's 16."""
    x, weight, bias = operands(70, 45, depth, dtype, generator, device)
    check_kernel(x, weight, bias if has_bias else None, approximate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_bias_beside_half_rows(dtype, device, generator, nan_empty):
    check_kernel(*operands(5, 48, 32, dtype, generator, device, bias_dtype=torch.float32))


@pytest.mark.parametrize("layout", ["odd base", "odd stride", "transposed", "expanded"])
def test_layouts_case_29(layout, device, generator, nan_empty):
    rows, depth = 21, 40
    store = torch.randn(4000, generator=generator).to(device, torch.float16)
    x = {
        "odd base": store[3 : 3 + rows * depth].view(rows, depth),
        "odd stride": store[: rows * 43].view(rows, 43)[:, :depth],
        "transposed": store[: rows * depth].view(depth, rows).T,
        "expanded": store[:depth].expand(rows, -1),
    }[layout]
    other = torch.randn(30, depth, generator=generator).to(device, torch.float16)
    check_kernel(x, other, store[:60:2])
    check_kernel(other, x, store[: 2 * rows : 2])


@pytest.mark.parametrize("shape", [(0, 48, 32), (3, 0, 32), (0, 0, 0)])
def test_nothing_to_do_case_15(shape, device):
    rows, width, depth = shape
    out, product = launch_kernel(
        torch.empty(rows, depth, device=device), torch.empty(width, depth, device=device), None, store_product=True
    )
    assert out.shape == product.shape == (rows, width)


def test_of_no_depth_the_kernel_makes_gelu_of_the_bias(device, nan_empty):
    bias = torch.tensor([-1.0, 0.0, 2.0], device=device)
    out, _ = launch_kernel(torch.zeros(2, 0, device=device), torch.zeros(3, 0, device=device), bias)
    torch.testing.assert_close(out, F.gelu(bias).expand(2, -1))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients(has_bias, dtype, approximate, form, device, generator, nan_empty):
    x, weight, bias = operands(21, 40, 24, dtype, generator, device)
    dout = torch.randn(21, 40, generator=generator).to(device, dtype)
    leaves = {"x": x, "weight": weight} | ({"bias": bias} if has_bias else {})
    check_gradients(
        "triton",
        lambda x, weight, bias=None: linear_gelu(x, weight, bias, approximate=approximate),
        lambda x, weight, bias=None: F.gelu(F.linear(x, weight, bias), approximate=approximate),
        lambda x, weight, bias=None: reference.bias_gelu(F.linear(x, weight), bias, approximate=approximate),
        leaves,
        dout,
    )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen, form, device, generator):
    leaves = list(operands(21, 40, 24, torch.float32, generator, device))
    dout = torch.randn(21, 40, generator=generator).to(device)
    with backend.use_backend("triton"):
        every = gradients(linear_gelu, leaves, dout)
        asked = [leaf.detach().requires_grad_(i != frozen) for i, leaf in enumerate(leaves)]
        linear_gelu(*asked).backward(dout)
    assert asked[frozen].grad is None
    for i in {0, 1, 2} - {frozen}:
        assert torch.equal(asked[i].grad, every[i])


def test_a_gradient_needs_the_product(device, generator):
    x, weight, bias = operands(3, 8, 8, torch.float32, generator, device)
    out, _ = linear_gelu_forward(x.requires_grad_(), weight, bias, "none", False)
    with pytest.raises(BackendError, match="store_product=True"):
        out.backward(torch.randn(out.shape, generator=generator).to(device))


def test_cublaslts_epilogue_is_gelu_by_tanh(device, generator, monkeypatch):
    """Measured for tanh, it serves neither erf nor a call without a bias."""
    monkeypatch.setattr(linear_gelu_choices, "linear_gelu", lambda *_, **__: choices.LinearGeluForm("cublaslt"))
    x, weight, bias = operands(5, 16, 32, torch.float16, generator, device)
    with backend.use_backend("triton"), Recorder() as recorder:
        out = linear_gelu(x, weight, bias, approximate="tanh")
    assert "aten._addmm_activation.default" in recorder.names
    exact = reference.bias_gelu(F.linear(x.double(), weight.double()), bias.double(), approximate="tanh")
    assert_close(out, F.gelu(F.linear(x, weight, bias), approximate="tanh"), exact)
    with backend.use_backend("triton"), Recorder() as recorder:
        linear_gelu(x, weight, None, approximate="tanh")
        linear_gelu(x, weight, bias, approximate="none")
        linear_gelu(x, weight.requires_grad_(), bias, approximate="tanh")
    assert "aten._addmm_activation.default" not in recorder.names


def test_the_table_names_the_form(monkeypatch):
    """Until one is measured it is cuBLAS and a pass, everywhere; what is measured serves its rows and regime only."""

    def form(rows, approximate="none", gradient=False, arch="sm_90"):
        choice = linear_gelu_choices.linear_gelu(
            rows, 3072, 768, torch.float16, approximate=approximate, gradient=gradient, target=KNOWN[arch]
        )
        return choice.form

    monkeypatch.setattr(choices, "TUNED", {})
    assert {form(rows, arch=arch) for rows in (1, 10**6) for arch in KNOWN} == {"fused pass"}
    key = "rows=2048,width=3072,depth=768,dtype=float16,regime="
    monkeypatch.setattr(
        choices,
        "TUNED",
        {
            ("sm_90", "linear_gelu", key + "erf"): choices.LinearGeluForm("epilogue"),
            ("sm_90", "linear_gelu", key + "tanh"): choices.LinearGeluForm("cublaslt"),
        },
    )
    assert [form(rows) for rows in (512, 513, 2048, 2049)] == ["fused pass", "epilogue", "epilogue", "fused pass"]
    assert form(2048, "tanh") == "cublaslt"
    assert form(2048, "tanh", gradient=True) == form(2048, arch="sm_80") == "fused pass"


@pytest.mark.skipif(not interpreted(), reason="kernels are compiled here, not interpreted")
def test_with_the_epilogue_a_layer_has_seven_launches(monkeypatch):
    monkeypatch.setattr(linear_gelu_choices, "linear_gelu", lambda *_, **__: choices.LinearGeluForm("epilogue"))
    found = launches.layer(0.0, (5, 7))
    inference = found["inference"]
    assert (inference["kernels"], inference["matrix_products"], inference["others"]) == (4, 3, 0)
    assert inference["names"]["linear_gelu_forward_kernel"] == 1
    assert (found["backward"]["kernels"], found["backward"]["matrix_products"]) == (4, 8)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient, device, generator):
    x, weight, bias = (
        each.requires_grad_(needs_gradient) for each in operands(3, 24, 16, torch.float32, generator, device)
    )
    torch.library.opcheck(linear_gelu_forward, (x, weight, bias, "none", needs_gradient))
    torch.library.opcheck(linear_gelu_forward, (x, weight, None, "tanh", needs_gradient))
