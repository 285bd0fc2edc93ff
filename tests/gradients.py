"""What the tests of gradients share: random upstream gradients, the error rule for each gradient, few programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import backend
from fastbert.testing import assert_close


def gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Gradients of `run(*leaves)` for each leaf under the upstream gradient `dout`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = run(*leaves)
    return list(torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def check_gradients(
    path: str,
    run: Callable[..., Tensor],
    plainly: Callable[..., Tensor],
    exactly: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    dout: Tensor,
) -> dict[str, Tensor]:
    """Hold each gradient of `run` to the error rule, and give them by name.

    `plainly` gets the leaves in the dtype of `dout`, `exactly` in float64.
    """
    names, tensors = list(leaves), list(leaves.values())
    with backend.use_backend(path):
        ours = gradients(run, tensors, dout)
    plain = gradients(plainly, [tensor.to(dout.dtype) for tensor in tensors], dout)
    exact = gradients(exactly, [tensor.double() for tensor in tensors], dout.double())
    for name, leaf, got, rough, wanted in zip(names, tensors, ours, plain, exact, strict=True):
        assert got.dtype == leaf.dtype, name
        assert_close(got, rough.to(got.dtype), wanted, what=f"{path} d{name}")
    return dict(zip(names, ours, strict=True))


def limit_programs(monkeypatch: pytest.MonkeyPatch, choices: ModuleType, choice: str, programs: int) -> None:
    """Make the choice `choice` of `choices` use at most this many programs, so that each strides over several rows."""
    choose = getattr(choices, choice)

    def fewer(*args: Any, **options: Any) -> Any:
        return replace(choose(*args, **options), PROGRAMS=programs)

    monkeypatch.setattr(choices, choice, fewer)
