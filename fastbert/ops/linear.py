"""linear: a matrix product, by BLAS, oneDNN or a kernel of this CPU."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import room
from fastbert.ops.common import (
    autocasts,
    check_linear,
    native_machine,
    observed,
    torch_differentiates,
    wants_gradient,
)
from fastbert.ops.fastest import FEW, fastest, onednn_fuses
from fastbert.ops.products import by_kernel, by_onednn, weight_gradient

T = TypeVar("T")


class Buffers(threading.local):
    """Memory for intermediate results that is used again by every layer and batch; each thread has its own."""

    def __init__(self) -> None:
        self._of_name: dict[str, Tensor] = {}

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """`[rows, width]`; what had this name before is overwritten."""
        buffer = self._of_name.get(name)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] != width or buffer.dtype != dtype:
            with torch.inference_mode(False):  # what is made inside could not be written to outside
                buffer = self._of_name[name] = room((rows, width), dtype)
        return buffer[:rows]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`: floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """
    check_linear(x, weight, bias)
    if onednn_fuses(x, weight, bias):
        return by_onednn(x, weight, bias)
    return product(x, weight, bias)


class Linear(nn.Linear):
    """An `nn.Linear`, of rows by oneDNN where that is for them: a pooler's or a head's, of any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if x.dim() == 2 and onednn_fuses(x, self.weight, self.bias):
            return by_onednn(x, self.weight, self.bias)
        return super().forward(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` unchecked; where it is recorded by kernels of this CPU, if they are faster than its BLAS."""
    machine = native_machine(x, weight, bias)
    recorded = wants_gradient(x, weight, bias) and not autocasts(x)
    exact = x.dtype == weight.dtype == torch.float32
    if machine is not None and recorded and exact and len(x) > FEW and fastest(x.dtype, len(x), "recorded") == "own":
        return _Linear.apply(machine, x, weight, bias)  # type: ignore[no-untyped-call]
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer and its gradients by kernels of this CPU; its weight is laid out anew each time."""

    @staticmethod
    def forward(ctx: Any, machine: Machine, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.machine = machine
        return by_kernel(machine, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, of_x, of_weight, of_bias = ctx.needs_input_grad
        dbias = dout.sum(0) if of_bias else None
        if torch_differentiates(dout) or observed():
            return None, dout @ weight if of_x else None, dout.t() @ x if of_weight else None, dbias
        dx = by_kernel(ctx.machine, dout, weight.t(), None) if of_x else None
        return None, dx, weight_gradient(ctx.machine, x, dout) if of_weight else None, dbias
