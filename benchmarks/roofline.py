"""The roofline: what this machine can do at best, measured, and what that leaves an op to take at least.

Ceilings are the best of several tries of plain library calls: copying a buffer that no cache holds, and matrix products
of BERT's shapes. A floor is the time that the op's FLOPs or its least bytes (`kernels/cost.py`) take there, whichever
is longer. On a CPU a small op can be faster than its floor, because the caches held its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from measure import DeviceTimer
from workloads import POSITIONS, VOCABULARY, Workload

from fastbert.backend import onednn_multiplies_bfloat16
from fastbert.errors import ArgumentError
from fastbert.kernels import cost
from fastbert.kernels.cost import Cost
from fastbert.rivals.turns import Timer, cpu_seconds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COPY_BYTES = 2**29  # of each of two buffers: more than any cache
GEMMS = [(768, 2304), (768, 3072), (3072, 768), (1024, 4096)]  # in and out of BERT-base's layers, one of BERT-large's
GEMM_ROWS = {"cpu": 1024, "cuda": 16384}
TRIES = 3


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best.

    Attributes:
        copy_gb_per_s: bytes read and written, both counted, in 1e9 a second.
        gemm_gflops: FLOPs of a matrix product, in 1e9 a second, by name of the dtype; a dtype that is not there, the
            machine's libraries have no product for.
    """

    copy_gb_per_s: float
    gemm_gflops: dict[str, float]


@dataclass(frozen=True)
class Floor:
    """The least time something can take, and what it would spend it on."""

    seconds: float
    bound: Literal["memory", "compute"]


@cache
def ceilings(device: torch.device) -> Ceilings:
    """Measured when first asked for, and kept: a few seconds.

    Raises:
        ArgumentError: the device is neither a CPU nor a GPU that this torch can use.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ArgumentError(
            "device", str(device), f"cpu{', or a GPU' if torch.cuda.is_available() else ': this torch sees no GPU'}"
        )
    seconds = DeviceTimer(device) if device.type == "cuda" else cpu_seconds
    copied = 2 * COPY_BYTES / _copy_seconds(device, seconds) / 1e9
    rates: dict[str, float] = {}
    for name in (*DTYPES, "int8"):
        if name == "fp16" and device.type == "cpu":
            continue  # no benchmark computes in it on a CPU
        best = 0.0
        rows = GEMM_ROWS[device.type]
        for columns, out in GEMMS:
            for product in _products(name, rows, columns, out, device):
                product()
                took = min(seconds(product, 1) for _ in range(TRIES))
                best = max(best, 2 * rows * columns * out / took)
        if best:
            rates[name] = best / 1e9
    return Ceilings(copied, rates)


def _copy_seconds(device: torch.device, seconds: Timer) -> float:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return min(seconds(lambda: target.copy_(source), 1) for _ in range(TRIES))


def _products(name: str, rows: int, columns: int, out: int, device: torch.device) -> Iterator[Callable[[], Any]]:
    """The library calls for one product; none where the dtype has none."""
    if name == "int8":
        a = torch.ones(rows, columns, dtype=torch.int8, device=device)
        b = torch.ones(out, columns, dtype=torch.int8, device=device).t()
        yield lambda: torch._int_mm(a, b)
        return
    x = torch.randn(rows, columns, device=device).to(DTYPES[name])
    weight = torch.randn(out, columns, device=device).to(DTYPES[name])
    yield lambda: F.linear(x, weight)
    served = torch.backends.mkldnn.is_available() if name == "fp32" else onednn_multiplies_bfloat16()
    if device.type == "cpu" and served:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)
        yield lambda: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


def floor(cost: Cost, dtype: str, ceilings: Ceilings) -> Floor:
    """The least time for an op's FLOPs in this dtype and its bytes.

    Raises:
        ArgumentError: the ceilings have no rate for the dtype.
    """
    if dtype not in ceilings.gemm_gflops:
        raise ArgumentError(
            "dtype", repr(dtype), f"one whose products were measured: {', '.join(ceilings.gemm_gflops)}"
        )
    memory = cost.min_bytes / ceilings.copy_gb_per_s / 1e9
    compute = cost.flops / ceilings.gemm_gflops[dtype] / 1e9
    return Floor(compute, "compute") if compute > memory else Floor(memory, "memory")


def floor_of_all(costs: Iterable[Cost], dtype: str, ceilings: Ceilings) -> Floor:
    """The floors of ops that run one after another, added up; bound by what takes more of it."""
    seconds = {"memory": 0.0, "compute": 0.0}
    for one in costs:
        least = floor(one, dtype, ceilings)
        seconds[least.bound] += least.seconds
    return Floor(sum(seconds.values()), "compute" if seconds["compute"] > seconds["memory"] else "memory")


def adamw(parameters: int) -> Cost:
    """A step of AdamW in float32: parameter, gradient and two moments are read, all but the gradient written."""
    return Cost(flops=14 * parameters, min_bytes=7 * 4 * parameters)


def model_costs(workload: Workload, dtype: torch.dtype, *, words: int, backward: bool) -> list[Cost]:
    """The ops of a BERT without dropout: embeddings, and in each layer four products, attention, GELU, two LayerNorms.

    Args:
        words: how many different words the batch has.
        backward: whether gradients of all parameters are made too.
    """
    tokens, hidden, inner = workload.tokens, workload.hidden, workload.intermediate
    heads = workload.heads, workload.head_dim
    products = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    entries = words + workload.max_seqlen + 1
    layer = [
        *(cost.linear(tokens, columns, out, dtype) for columns, out in products),
        cost.attention(workload.lengths, *heads, dtype, lse=backward),
        cost.bias_gelu(tokens, inner, dtype),
        *[cost.layer_norm(tokens, hidden, dtype, residual=True, x_bias=True, statistics=backward)] * 2,
    ]
    embeddings = [cost.embedding(tokens, hidden, dtype, entries=entries, token_types=False)]
    if backward:
        layer += [
            *(cost.linear_backward(tokens, columns, out, dtype) for columns, out in products),
            cost.attention_backward(workload.lengths, *heads, dtype),
            cost.bias_gelu_backward(tokens, inner, dtype),
            *[cost.layer_norm_backward(tokens, hidden, dtype, residual=True, x_bias=True)] * 2,
        ]
        tables = VOCABULARY + max(POSITIONS, workload.max_seqlen) + 2
        embeddings.append(
            cost.embedding_backward(tokens, hidden, dtype, entries=entries, table_entries=tables, token_types=False)
        )
    return embeddings + layer * workload.layers
