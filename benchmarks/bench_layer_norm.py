"""LayerNorm at the end of each half of a layer: LN(residual + x + x_bias) on packed rows, without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contender, Contest, Operands, cases, differentiate, on_rows
from providers import compiled, on_gpu
from torch import Tensor
from workloads import ROWS

from fastbert import reference
from fastbert.kernels import cost
from fastbert.ops.layer_norm import layer_norm
from fastbert.rivals.runtimes import installed

EPS = 1e-12


def operands(case: Case) -> Operands:
    hidden = (case.workload.hidden,)
    rows = (case.workload.tokens, case.workload.hidden)
    leaves = {"x": rows, "residual": rows, "x_bias": hidden, "weight": hidden, "bias": hidden}
    return Operands.random(case, leaves, rows)


def exact(case: Case, of: Operands) -> dict[str, Tensor]:
    return differentiate(case, of.to(torch.float64), lambda **leaves: reference.layer_norm(**leaves, eps=EPS))


def costs(case: Case, of: Operands) -> list[cost.Cost]:
    shape = case.workload.tokens, case.workload.hidden, case.torch_dtype
    forward = cost.layer_norm(*shape, residual=True, x_bias=True, statistics=case.backward)
    return [forward, cost.layer_norm_backward(*shape, residual=True, x_bias=True)][: 1 + case.backward]


def in_torch(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + (x + x_bias), weight.shape, weight, bias, EPS)


def plain(case: Case, of: Operands) -> dict[str, Tensor]:
    return differentiate(case, of, in_torch)


def fastbert(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, lambda **leaves: layer_norm(**leaves, eps=EPS))


def torch_eager(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, in_torch)


def torch_compile(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, compiled(in_torch))


def liger(case: Case, of: Operands) -> Contender:
    function = installed("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    on_gpu(case)

    def forward(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function.apply(residual + (x + x_bias), weight, bias, EPS)

    return on_rows(case, of, forward)


def flash_attn(case: Case, of: Operands) -> Contender:
    layer_norm_fn: Any = installed("flash_attn.ops.triton.layer_norm").layer_norm_fn
    on_gpu(case)

    def forward(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm_fn(x + x_bias, weight, bias, residual=residual, eps=EPS)

    return on_rows(case, of, forward)


PROVIDERS = {
    "fastbert": fastbert,
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "Liger": liger,
    "flash-attn": flash_attn,
}
CONTEST = Contest(PROVIDERS, operands, plain, exact, costs)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", cases("layer_norm", ROWS, passes=("forward", "forward+backward")))
def test_layer_norm(case: Case, provider: str, compete: Any) -> None:
    compete(CONTEST, case, provider)
