"""Products of float32 by TF32, where torch was asked for them: what is chosen, compiled, and how far off it is.

The interpreter multiplies in float32 whatever it is told, so here `tl.dot` does as NVIDIA's tensor cores do.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from processes import PYTHON
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastbert import backend, reference
from fastbert.config import EncoderConfig
from fastbert.kernels import precision, target
from fastbert.kernels.linear_gelu import linear_gelu_forward
from fastbert.model.layer import EncoderLayer
from fastbert.ops.attention import attention
from fastbert.packing import Packing
from fastbert.testing import assert_close

ASKED = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


@pytest.fixture(autouse=True)
def torch_forgets() -> Iterator[None]:
    as_at_the_start()
    yield
    as_at_the_start()


def as_at_the_start() -> None:
    torch.set_float32_matmul_precision("highest")
    for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        place.fp32_precision = "none"  # type: ignore[assignment]  # the stubs know it of one of the three


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """How float32 was multiplied since, in the kernels."""
    found: set[str] = set()
    upstream: Callable[..., TensorHandle] = InterpreterBuilder.create_dot

    def dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, how: Any, most: int) -> TensorHandle:
        if a.dtype.scalar != tl.float32:
            return upstream(self, a, b, acc, how, most)
        found.add(how.name.lower())
        if how.name == "IEEE":
            return upstream(self, a, b, acc, how, most)
        zero, big_a, big_b = np.zeros_like(acc.data), to_tf32(a.data), to_tf32(b.data)
        if how.name == "TF32":
            return TensorHandle(by_tensor_cores(big_a, big_b, acc.data), tl.float32)
        small = by_tensor_cores(a.data - big_a, big_b, zero)  # as Triton's pass F32DotTC, which adds acc last
        small = by_tensor_cores(big_a, b.data - big_b, small)
        return TensorHandle(by_tensor_cores(big_a, big_b, small) + acc.data, tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return found


def to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest of 10 bits, as `cvt.rna.tf32`."""
    return cut(x, 0x1000)


def cut(x: np.ndarray, more: int = 0) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(more)) & np.uint32(0xFFFFE000)).view(np.float32)


def exponent(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, -200, np.frexp(x)[1] - 1)


def by_tensor_cores(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """`a @ b + acc` of TF32 on sm_80, whose sums lose most: MMA-Sim's model (arXiv 2511.10909).

    Four products and the sum so far are cut to 24 bits below the largest exponent and added, the sum is cut to float32.
    """
    a, b, out = cut(a).astype(np.float64), cut(b).astype(np.float64).T, acc.astype(np.float64)
    for start in range(0, a.shape[1], 4):
        x, y = a[:, None, start : start + 4], b[None, :, start : start + 4]
        step = np.exp2(np.maximum((exponent(x) + exponent(y)).max(-1), exponent(out)) - 24)
        out = (np.trunc(x * y / step[..., None]).sum(-1) + np.trunc(out / step)) * step
        step = np.exp2(exponent(out) - 23.0)
        out = np.trunc(out / step) * step
    return out.astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", target.KNOWN)
def test_what_is_chosen(arch: str, dtype: torch.dtype) -> None:
    for asked, how in ASKED.items():
        expected = how if dtype == torch.float32 and not arch.startswith("gfx") else "ieee"
        assert precision.float32_precision(dtype, asked, target.KNOWN[arch]) == expected


def set_cuda(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def allow() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda: None, "highest"),
        (lambda: torch.set_float32_matmul_precision("high"), "high"),
        (lambda: torch.set_float32_matmul_precision("medium"), "medium"),
        (allow, "high"),
        (lambda: set_cuda("tf32"), "high"),
        (lambda: set_cuda("ieee"), "highest"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "high"),
    ],
    ids=["nothing", "high", "medium", "allow_tf32", "tf32", "ieee", "tf32 everywhere"],
)
def test_each_way_to_ask_torch_is_heard(ask: Callable[[], None], answer: str) -> None:
    ask()
    assert precision.float32_asked() == answer


def both_ways(x: torch.Tensor, packing: Packing, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = x.clone().requires_grad_()
    out = attention(qkv, packing)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    return out.detach(), gradient


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_attention_as_asked(head_dim: int, asked: str, multiplied: set[str]) -> None:
    """Three products of TF32 hold the error rule, forward and backward; one does not, by far."""
    generator = torch.Generator().manual_seed(head_dim)
    packing = Packing.from_lengths([50, 17, 1])
    qkv, dout = (
        torch.randn(packing.tokens, *shape, generator=generator) for shape in ((3, 1, head_dim), (1, head_dim))
    )
    torch.set_float32_matmul_precision(asked)
    with backend.use_backend("triton"):
        got = both_ways(qkv, packing, dout)
    assert multiplied == {ASKED[asked]}
    wide = qkv.double().requires_grad_()
    with backend.use_backend("torch"):
        plain = both_ways(qkv, packing, dout)
        out, _ = reference.attention(wide, packing, scale=head_dim**-0.5)
    exact = out.detach(), torch.autograd.grad(out, wide, dout.double())[0]
    for what, one, other, right in zip(("out", "gradient"), got, plain, exact, strict=True):
        if asked != "medium":
            assert_close(one, other, right, what=what)
        else:
            off = (one - right).square().mean().sqrt() / right.square().mean().sqrt()
            assert 1e-4 < off < 2e-3, what


def test_a_linear_layer_with_gelu_as_asked(multiplied: set[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 96, generator=generator), torch.randn(24, 96, generator=generator) * 0.1
    exact = torch.nn.functional.gelu(x.double() @ weight.double().t())
    plain = torch.nn.functional.gelu(x @ weight.t())
    for asked, how in ASKED.items():
        torch.set_float32_matmul_precision(asked)
        out, _ = linear_gelu_forward(x, weight, None)
        assert multiplied == {how}
        multiplied.clear()
        if asked != "medium":
            assert_close(out, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_prepared_layer_hears_of_a_change(dtype: torch.dtype, multiplied: set[str]) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(EncoderConfig(hidden_size=32, num_heads=2, intermediate_size=48)).eval().to(dtype)
    x, packing = torch.randn(8, 32, dtype=dtype), Packing.from_lengths([3, 5])
    with backend.use_backend("triton"), torch.no_grad():
        for asked in ("highest", "high", "highest", "medium"):
            torch.set_float32_matmul_precision(asked)
            layer(x, packing)
            assert multiplied == ({ASKED[asked]} if dtype == torch.float32 else set())
            multiplied.clear()


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.static) for arch in ("sm_80", "sm_100"))]
)
def test_each_is_compiled_to_its_instructions(arch: str) -> None:
    """Heads of 64: the forward and its gradient spill nowhere; TF32 is multiplied by tensor cores, thrice or once."""
    script = Path(__file__).with_name("precisions.py")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([*PYTHON, str(script), arch], capture_output=True, text=True, env=clean)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert set(kernels) == set(ASKED)
    for name, of_highest in kernels["highest"].items():
        assert of_highest == {"spills": 0, "products": 0}, name
        high, medium = kernels["high"][name], kernels["medium"][name]
        assert high["spills"] == medium["spills"] == 0, name
        assert high["products"] == 3 * medium["products"] > 0, name
