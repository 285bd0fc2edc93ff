"""GELU(x + bias) between the two products of the feed-forward, on packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contender, Contest, Operands, cases, differentiate, on_rows
from providers import compiled
from torch import Tensor
from workloads import ROWS

from fastbert import reference
from fastbert.kernels import cost
from fastbert.ops.bias_gelu import bias_gelu


def operands(case: Case) -> Operands:
    rows = (case.workload.tokens, case.workload.intermediate)
    return Operands.random(case, {"x": rows, "bias": rows[1:]}, rows)


def exact(case: Case, of: Operands) -> dict[str, Tensor]:
    return differentiate(case, of.to(torch.float64), reference.bias_gelu)


def plain(case: Case, of: Operands) -> dict[str, Tensor]:
    return differentiate(case, of, in_torch)


def costs(case: Case, of: Operands) -> list[cost.Cost]:
    shape = case.workload.tokens, case.workload.intermediate, case.torch_dtype
    return [cost.bias_gelu(*shape), cost.bias_gelu_backward(*shape)][: 1 + case.backward]


def in_torch(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def fastbert(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, bias_gelu)


def torch_eager(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, in_torch)


def torch_compile(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, compiled(in_torch))


PROVIDERS = {"fastbert": fastbert, "torch eager": torch_eager, "torch.compile": torch_compile}
CONTEST = Contest(PROVIDERS, operands, plain, exact, costs)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", cases("bias_gelu", ROWS, passes=("forward", "forward+backward")))
def test_bias_gelu(case: Case, provider: str, compete: Any) -> None:
    compete(CONTEST, case, provider)
