"""When an op calls its kernel's launcher straight."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.ops.bias_gelu import bias_gelu_forward
from fastbert.ops.common import launched


class LookingOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_launcher_is_called_straight_where_nobody_looks_on() -> None:
    x = torch.ones(2, 8)
    weight = torch.nn.Parameter(x)
    assert launched(bias_gelu_forward, x, None) is not bias_gelu_forward
    assert launched(bias_gelu_forward, x, weight) is bias_gelu_forward
    with torch.no_grad():
        assert launched(bias_gelu_forward, x, weight) is not bias_gelu_forward


@pytest.mark.parametrize("looking", ["mode", "vmap", "compile", "trace"])
def test_whoever_looks_on_sees_the_op(looking: str) -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(launched(bias_gelu_forward, x) is bias_gelu_forward)
        return x + 1

    x = torch.ones(2, 8)
    with LookingOn() if looking == "mode" else contextlib.nullcontext():
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
