"""Where an op may do without torch's own ops, and what has to see those."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.ops.attention import attention
from fastbert.ops.bias_gelu import bias_gelu_forward
from fastbert.ops.common import launcher
from fastbert.ops.embedding import embedding
from fastbert.ops.layer_norm import linear_layer_norm
from fastbert.ops.linear_gelu import linear_gelu
from fastbert.ops.pooling import pool
from fastbert.packing import Packing


class LookingOn(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_launcher_is_called_straight_where_nobody_looks_on() -> None:
    x = torch.ones(2, 8)
    weight = torch.nn.Parameter(x)
    assert launcher(bias_gelu_forward, x, None) is not bias_gelu_forward
    assert launcher(bias_gelu_forward, x, weight) is bias_gelu_forward
    with torch.no_grad():
        assert launcher(bias_gelu_forward, x, weight) is not bias_gelu_forward


@pytest.mark.parametrize("looking", ["mode", "vmap", "compile", "trace", "dual"])
def test_whoever_looks_on_sees_the_op(looking: str) -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(launcher(bias_gelu_forward, x) is bias_gelu_forward)
        return x + 1

    x = torch.ones(2, 8)
    contexts = {"mode": LookingOn, "dual": forward_ad.dual_level}
    with contexts.get(looking, contextlib.nullcontext)():
        if looking == "vmap":
            torch.vmap(look)(x)
        elif looking == "trace":
            torch.jit.trace(look, x, check_trace=False)
        elif looking == "compile":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                look(x)
        else:
            look(x)
    assert seen and all(seen)


def half_layers(dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Both linear ops, of `[3, 16]`."""
    generator = torch.Generator().manual_seed(5)
    weight, bias, residual = (torch.randn(size, generator=generator).to(dtype) for size in ((24, 16), 24, (3, 24)))
    return {
        "linear_gelu": lambda x: linear_gelu(x, weight, bias),
        "linear_layer_norm": lambda x: linear_layer_norm(x, weight, bias, residual, bias, bias, eps=1e-5),
    }


@pytest.mark.filterwarnings("ignore:TF32")  # torch's, about GPUs that aren't there, when flags are set
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear_gelu", "linear_layer_norm"])
def test_a_mode_sees_no_private_op_and_nothing_overwritten(name: str, dtype: torch.dtype, onednn: bool) -> None:
    """torch's counter of operations knows neither oneDNN's fused layer nor what is added in it."""
    run, x = half_layers(dtype)[name], torch.ones(3, 16, dtype=dtype)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn), LookingOn() as seen:
        run(x)
    assert seen.names
    assert not [one for one in seen.names if "mkldnn" in one or one.split(".")[1].endswith("_")]


@pytest.mark.filterwarnings("ignore:TF32")  # torch's, about GPUs that aren't there, when flags are set
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("name", ["linear_gelu", "linear_layer_norm"])
def test_vmap_of_rows_beside_a_residual_that_all_share(name: str, onednn: bool) -> None:
    run = half_layers(torch.float32)[name]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        torch.testing.assert_close(torch.vmap(run)(x), torch.stack([run(one) for one in x]))


@pytest.mark.parametrize("name", ["linear_gelu", "linear_layer_norm"])
def test_tangents_go_through_a_linear_op(name: str) -> None:
    run = half_layers(torch.float32)[name]
    x, dx = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, dx))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(run, (x,), (dx,))[1])


def test_tangents_go_through_an_op_with_a_kernel_of_the_cpu() -> None:
    table, ones = torch.randn(4, 16, generator=torch.Generator().manual_seed(8)), torch.ones(16)
    ids = torch.tensor([2, 0, 3])
    with torch.no_grad(), forward_ad.dual_level():
        word = forward_ad.make_dual(table, torch.ones_like(table) * torch.arange(16.0))
        made = embedding(ids, ids, None, word, torch.zeros(4, 16), torch.zeros(1, 16), ones, ones, eps=1e-5)
        plain = F.layer_norm(F.embedding(ids, word), (16,), ones, ones, 1e-5)
        tangent, expected = forward_ad.unpack_dual(made).tangent, forward_ad.unpack_dual(plain).tangent
    torch.testing.assert_close(tangent, expected)


def test_a_recorder_before_dispatch_sees_ops():
    """make_fx(pre_dispatch=True): a kernel that it does not see would leave memory that nothing fills."""
    packing = Packing.from_lengths([5, 3])
    qkv = torch.randn(8, 3, 2, 16)
    with torch.no_grad():
        for x, op in (
            (qkv, lambda x: attention(x, packing)),
            (qkv.flatten(1), lambda x: pool(x, packing, "mean")),
        ):
            graph = make_fx(op, pre_dispatch=True)(x)
            torch.testing.assert_close(graph(x), op(x))


def test_a_zero_without_memory_is_not_read():
    packing = Packing.from_lengths([5, 3])
    zero = torch._efficientzerotensor(8, 64)
    assert torch.equal(pool(zero, packing, "mean"), torch.zeros(2, 64))
