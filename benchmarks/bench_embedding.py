"""The input of the encoder, LN(word + position + token type 0), on packed ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contender, Contest, Operands, cases, differentiate, on_rows
from providers import compiled, random_ids
from torch import Tensor
from workloads import POSITIONS, ROWS, VOCABULARY

from fastbert import reference
from fastbert.kernels import cost
from fastbert.ops.embedding import embedding
from fastbert.packing import Packing

EPS = 1e-12


@dataclass(frozen=True)
class Ids:
    """int64 `[tokens]` each."""

    words: Tensor
    positions: Tensor


def operands(case: Case) -> Operands:
    hidden = case.workload.hidden
    leaves = {
        "word": (VOCABULARY, hidden),
        "position": (POSITIONS, hidden),
        "token_type": (2, hidden),
        "weight": (hidden,),
        "bias": (hidden,),
    }
    packing = Packing.from_lengths(case.workload.lengths, device=case.device)
    fixed = Ids(random_ids(case.workload, case.device), packing.columns)
    return Operands.random(case, leaves, (case.workload.tokens, hidden), fixed)


def exact(case: Case, of: Operands) -> dict[str, Tensor]:
    def forward(**leaves: Tensor) -> Tensor:
        return reference.embedding(of.fixed.words, of.fixed.positions, None, **leaves, eps=EPS)

    return differentiate(case, of.to(torch.float64), forward)


def plain(case: Case, of: Operands) -> dict[str, Tensor]:
    return torch_eager(case, of).run()


def costs(case: Case, of: Operands) -> list[cost.Cost]:
    shape = case.workload.tokens, case.workload.hidden, case.torch_dtype
    entries = len(of.fixed.words.unique()) + case.workload.max_seqlen + 1
    forward = cost.embedding(*shape, entries=entries, token_types=False)
    tables = VOCABULARY + POSITIONS + 2
    backward = cost.embedding_backward(*shape, entries=entries, table_entries=tables, token_types=False)
    return [forward, backward][: 1 + case.backward]


def in_torch(
    words: Tensor, positions: Tensor, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    total = F.embedding(words, word) + token_type[0] + F.embedding(positions, position)
    return F.layer_norm(total, weight.shape, weight, bias, EPS)


def fastbert(case: Case, of: Operands) -> Contender:
    ids = of.fixed
    return on_rows(case, of, lambda **leaves: embedding(ids.words, ids.positions, None, **leaves, eps=EPS))


def torch_eager(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, lambda **leaves: in_torch(of.fixed.words, of.fixed.positions, **leaves))


def torch_compile(case: Case, of: Operands) -> Contender:
    forward = compiled(in_torch)
    return on_rows(case, of, lambda **leaves: forward(of.fixed.words, of.fixed.positions, **leaves))


PROVIDERS = {"fastbert": fastbert, "torch eager": torch_eager, "torch.compile": torch_compile}
CONTEST = Contest(PROVIDERS, operands, plain, exact, costs)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", cases("embedding", ROWS, passes=("forward", "forward+backward")))
def test_embedding(case: Case, provider: str, compete: Any) -> None:
    compete(CONTEST, case, provider)
