"""What others set for a process or a thread changes nothing here: default dtype, default device, modes, threads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import backend
from fastbert.cpu.machine import Machine, host
from fastbert.errors import FastbertError
from fastbert.ops.attention import attention
from fastbert.ops.embedding import embedding
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.linear import linear
from fastbert.ops.linear_gelu import linear_gelu
from fastbert.ops.pooling import pool
from fastbert.packing import Packing
from fastbert.tasks.encode import TextEncoder

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "fastbert").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]

# What makes a tensor of nothing but numbers: its device is the default one unless it is named, and its dtype too, but
# where that is int64 whatever is set.
INTEGERS = {"arange", "randint", "randperm"}
FACTORIES = INTEGERS | {
    "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randn", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def unnamed(tree: ast.AST) -> list[str]:
    """Calls of torch's factories that leave dtype or device to what is set, which only a module's parameters may."""
    found = []
    parameters = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
        for inner in node.args
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in parameters and isinstance(node.func, ast.Attribute):
            called, module = node.func.attr, node.func.value
            if isinstance(module, ast.Name) and module.id == "torch" and called in FACTORIES:
                wanted = {"device"} if called in INTEGERS else {"device", "dtype"}
                if wanted - {keyword.arg for keyword in node.keywords}:
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_dtype_and_device_named(path: Path) -> None:
    assert not unnamed(ast.parse(path.read_text()))


def test_an_unnamed_one_is_seen() -> None:
    source = "torch.empty(3); torch.zeros(2, device=d); torch.arange(2); torch.arange(2, device=d); x.new_empty(2)"
    assert len(unnamed(ast.parse(source))) == 3


def native() -> bool:
    return isinstance(host(), Machine)


class Watching(TorchDispatchMode):
    """Sees every call of torch, and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Renaming(TorchFunctionMode):
    """What a framework of another team may do: every `torch.empty` without a device goes to meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs.setdefault("device", "meta")
        return func(*args, **kwargs)


@contextmanager
def put_back(put: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(before)


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "nothing": nullcontext,
    "float64 is the default dtype": lambda: put_back(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16 is the default dtype": lambda: put_back(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16 is the default dtype": lambda: put_back(torch.set_default_dtype, torch.float16, torch.float32),
    "meta is the default device": lambda: put_back(torch.set_default_device, "meta", None),
    "inside of torch.device": lambda: torch.device("meta"),
    "what is uninitialised is filled": lambda: put_back(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no gradient": torch.no_grad,
    "gradients": torch.enable_grad,
    "denormals are flushed": lambda: put_back(torch.set_flush_denormal, True, False),
    "products of medium precision": lambda: put_back(torch.set_float32_matmul_precision, "medium", "highest"),
    "one thread": lambda: put_back(torch.set_num_threads, 1, torch.get_num_threads()),
    "five threads": lambda: put_back(torch.set_num_threads, 5, torch.get_num_threads()),
    "a dispatch mode": Watching,
    "a function mode": Renaming,
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextEncoder]:
    folder = tiny_bert.make(tmp_path_factory.mktemp("tiny"))
    return {dtype: TextEncoder.from_folder(folder, dtype=dtype) for dtype in ("fp32", "int8")}


SHORT = ["the film was fine", "a dull plot", ""]
LONG = ["ada met grace hopper in paris and the story was lovely " * 3] * 20


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
def test_user_case_12_what_is_set_elsewhere_does_not_reach_encode(
    state: str, dtype: str, warm: bool, everywhere: bool, encoders: dict[str, TextEncoder]
) -> None:
    """Kept runs and fresh ones; where our products of floats are the fastest, and elsewhere."""
    with backend.use_backend("native") if everywhere and native() else nullcontext():  # as on a CPU where they are
        encoder = encoders[dtype]
        want = [encoder.encode(texts, max_length=40) for texts in (SHORT, LONG)]
        if not warm:
            encoder.model.encoder.kept.drop()
        with STATES[state]():
            got = [encoder.encode(texts, max_length=40) for texts in (SHORT, LONG)]
        again = [encoder.encode(texts, max_length=40) for texts in (SHORT, LONG)]
        for x, y, z in zip(want, got, again, strict=True):
            assert y.dtype == x.dtype and (x == z).all()
            if dtype == "int8" and state == "a dispatch mode":  # the torch path, where a number may take the next step
                assert (x * y).sum(1).min() > 0.999
            else:
                assert abs(x - y).max() < 1e-5


@pytest.mark.parametrize("state", STATES)
def test_user_case_12d_a_model_runs_wherever_its_tensors_are(state: str, encoders: dict[str, TextEncoder]) -> None:
    model = encoders["fp32"].model
    ids, mask = torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    packing, packed = Packing.from_mask(mask), torch.tensor([2, 7, 9, 3, 2, 5, 3])
    with torch.no_grad():
        want = model(ids, mask).last_hidden_state
    with STATES[state]():
        got, also = model(ids, mask).last_hidden_state, model(packed, packing=packing).last_hidden_state
    assert got.device.type == "cpu" and got.dtype == torch.float32
    assert (got.detach() - want).abs().max() < 1e-5
    assert (packing.unpack(also.detach()) - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_NUM_THREADS": "7", "OMP_MAX_ACTIVE_LEVELS": "0"},
        {"OMP_STACKSIZE": "64k"},
        {"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "true"},
    ],
    ids=lambda variables: " ".join(f"{name}={value}" for name, value in variables.items()),
)
def test_fewer_threads_than_were_asked_for(variables: dict[str, str], encoders: dict[str, TextEncoder]) -> None:
    """OpenMP may give any number: what is made for more of them is enough, and all work is done."""
    program = """
import torch
from fastbert.ops.attention import attention
from fastbert.packing import Packing
torch.set_num_threads(6)
generator = torch.Generator().manual_seed(0)
packing = Packing.from_lengths([3, 40, 17, 1, 29])
qkv = torch.randn(packing.tokens, 3, 4, 16, generator=generator)
out = attention(qkv, packing)
x = qkv.double()[3:43].permute(1, 2, 0, 3)
exact = torch.softmax(x[0] @ x[1].mT / 4, -1) @ x[2]
print(float((out[3:43].double() - exact.transpose(0, 1)).abs().max()))
"""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@pytest.mark.skipif(not native(), reason="needs kernels of this CPU")
def test_more_threads_than_when_a_call_was_made() -> None:
    from fastbert.cpu.attention import attention_forward
    from fastbert.cpu.program import Program

    machine, packing = host(), Packing.from_lengths([40] * 30)
    qkv = torch.randn(packing.tokens, 3, 4, 16)
    out, want = torch.zeros(packing.tokens, 4, 16), attention(qkv, packing)
    with put_back(torch.set_num_threads, 1, torch.get_num_threads()):
        call = attention_forward(machine, qkv, packing.cu_seqlens, 40, 0.25, out)
        torch.set_num_threads(8)
        program = Program([call])
        torch.set_num_threads(2)
        program.run()
    assert torch.equal(out, want)


class Wrapped(Tensor):
    """A subclass that means nothing by itself."""


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag


# The same numbers in other clothes.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated when it is read": negated,
    "the imaginary part of a conjugate": imaginary,
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "in the middle of a storage": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape),
    "a subclass": lambda x: x.as_subclass(Wrapped),
    "made in inference mode": lambda x: _in_inference_mode(x),
    "with a gradient": lambda x: x.clone().requires_grad_(),
}
# No numbers that are known here.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.flatten(1).to_sparse_csr() if x.dim() > 1 else x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "opaque": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: torch.complex(x, x),
    "of no dimensions": lambda x: x.sum(),
    "whole numbers": lambda x: x.long(),
}


def _in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


PACKING = Packing.from_lengths([5, 64, 11])
ROWS = PACKING.tokens
GENERATOR = torch.Generator().manual_seed(7)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


IDS = torch.arange(ROWS) % 9
# Each op as a function of one tensor, and that tensor.
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "attention, qkv": (lambda x: attention(x, PACKING), numbers(ROWS, 3, 2, 8)),
    "pool, x": (lambda x: pool(x, PACKING, "mean"), numbers(ROWS, 16)),
    "pool max, x": (lambda x: pool(x, PACKING, "max", normalise=True), numbers(ROWS, 16)),
    "layer_norm, x": (lambda x: layer_norm(x, numbers_of(16), numbers_of(16), eps=1e-5), numbers(ROWS, 16)),
    "layer_norm, weight": (lambda x: layer_norm(FIXED, x, numbers_of(16), eps=1e-5), numbers(16)),
    "layer_norm, residual": (
        lambda x: layer_norm(FIXED, numbers_of(16), numbers_of(16), residual=x, eps=1e-5),
        numbers(ROWS, 16),
    ),
    "linear, x": (lambda x: linear(x, TABLE, None), numbers(ROWS, 16)),
    "linear, weight": (lambda x: linear(FIXED, x, numbers_of(12)), numbers(12, 16)),
    "linear with a gradient, weight": (
        lambda x: linear(FIXED.clone().requires_grad_(), x, numbers_of(12)),
        numbers(12, 16),
    ),
    "linear, bias": (lambda x: linear(FIXED, TABLE, x), numbers(9)),
    "linear_gelu, x": (lambda x: linear_gelu(x, TABLE, None), numbers(ROWS, 16)),
    "embedding, word": (lambda x: looked_up(x, TABLE, numbers_of(16)), numbers(9, 16)),
    "embedding, position": (lambda x: looked_up(TABLE, x, numbers_of(16)), numbers(9, 16)),
    "embedding, weight": (lambda x: looked_up(TABLE, TABLE, x), numbers(16)),
    "unpack, packed": (lambda x: PACKING.unpack(x), numbers(ROWS, 16)),
    "pack, padded": (lambda x: PACKING.pack(x), numbers(3, 64, 4)),
}
FIXED, TABLE = numbers(ROWS, 16), numbers(9, 16)


def numbers_of(width: int) -> Tensor:
    return torch.linspace(0.5, 1.5, width)


def looked_up(word: Tensor, position: Tensor, weight: Tensor) -> Tensor:
    return embedding(IDS, IDS, None, word, position, TABLE[:2], weight, numbers_of(16), eps=1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_read_as_torch_reads_it(op: str, view: str) -> None:
    call, x = OPS[op]
    want = call(x).detach()
    seen = VIEWS[view](x)
    if seen.is_inference():
        with torch.no_grad():
            got = call(seen)
    else:
        got = call(seen)
    assert (got.detach().as_subclass(Tensor) - want).abs().max() < 1e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_tensor_of_another_kind_is_an_error_of_ours(op: str, kind: str) -> None:
    call, x = OPS[op]
    try:
        other = OTHERS[kind](x)
    except RuntimeError:
        pytest.skip(f"torch makes no such tensor of shape {tuple(x.shape)}")
    if op in ("unpack, packed", "pack, padded") and kind in ("complex", "whole numbers"):
        assert call(other).dtype == other.dtype
        return
    with pytest.raises(FastbertError):
        call(other)
