"""bias_gelu: checks, the paths of a CPU, and the Triton kernels as custom ops."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend
from fastbert.config import Activation
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import as_kernels_read, room
from fastbert.errors import ArgumentError
from fastbert.kernels import choices
from fastbert.ops.common import (
    cast_states,
    check_parameter,
    check_rows,
    gradients,
    in_full,
    launcher,
    native_machine,
    observed,
    parameter,
    torch_differentiates,
    wants_gradient,
)
from fastbert.ops.fastest import FEW
from fastbert.reference import Approximate


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: Approximate = "none", gated: bool = False) -> Tensor:
    """GELU(x + bias), rounded once.

    Args:
        x: floating `[rows, width]`, gated `[rows, 2 * width]`, any strides.
        bias: as many as x has columns, in the dtype of `x` or float32.
        approximate: "none" for `z * Phi(z)` (BERT's), "tanh" for its tanh approximation.
        gated: multiply the GELU of the first half of the columns by the second half (GeGLU, ModernBERT's).

    Returns:
        `[rows, width]` in the dtype of `x`, under autocast in its dtype.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
        BackendError: the Triton path was forced and can't serve this call.
    """
    check_rows("x", x)
    (x,) = cast_states(x)
    check_approximate(approximate)
    if gated and x.shape[1] % 2:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "an even number of columns: GELU's input, then the gate")
    if bias is not None:
        check_parameter("bias", bias, (x.shape[1],), x)
    if backend.uses_triton("bias_gelu", x, choices.dtype_unserved(x.dtype)):
        return launcher(bias_gelu_forward, x, bias)(x, bias, approximate, gated)
    machine = native_machine(x, bias) if len(x) > FEW else None
    if machine is None:
        return _bias_gelu_torch(x, bias, approximate, gated)
    if wants_gradient(x, bias):
        return _NativeBiasGelu.apply(machine, approximate, gated, x, bias)  # type: ignore[no-untyped-call]
    return _bias_gelu_native(machine, approximate, gated, x, bias)


def check_approximate(approximate: str) -> None:
    """Raise ArgumentError unless it names a form of GELU."""
    if approximate not in get_args(Approximate):
        raise ArgumentError("approximate", repr(approximate), "'none' or 'tanh'")


def _bias_gelu_torch(x: Tensor, bias: Tensor | None, approximate: Approximate, gated: bool) -> Tensor:
    if bias is None and not gated:
        return F.gelu(x, approximate=approximate)
    total = in_full(x)
    if bias is not None:
        total = total + bias
    if not gated:
        return F.gelu(total, approximate=approximate).to(x.dtype)
    z, gate = total.chunk(2, 1)
    return (F.gelu(z, approximate=approximate) * gate).to(x.dtype)


def _bias_gelu_native(
    machine: Machine, approximate: Approximate, gated: bool, x: Tensor, bias: Tensor | None
) -> Tensor:
    from fastbert.cpu.row_wise import row_wise

    out = room((len(x), x.shape[1] // 2 if gated else x.shape[1]), x.dtype)
    activation: Activation = "gelu" if approximate == "none" else "gelu_tanh"
    row_wise(machine, as_kernels_read(x), bias=parameter(bias), activation=activation, gated=gated, out=out).run()
    return out


class _NativeBiasGelu(torch.autograd.Function):
    """bias_gelu and its gradients by kernels of this CPU."""

    @staticmethod
    def forward(
        ctx: Any, machine: Machine, approximate: Approximate, gated: bool, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.options = machine, approximate, gated
        return _bias_gelu_native(machine, approximate, gated, x, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        machine, approximate, gated = ctx.options
        if torch_differentiates(dout) or observed():
            again = gradients(lambda x, bias: _bias_gelu_torch(x, bias, approximate, gated), (x, bias), dout)
            return None, None, None, *again
        from fastbert.cpu.row_wise_backward import bias_gelu_backward as kernel

        dx, dbias = kernel(
            machine, as_kernels_read(x), as_kernels_read(dout), parameter(bias), approximate, gated=gated
        )
        return None, None, None, dx, None if dbias is None else dbias.to(bias.dtype)


@torch.library.custom_op("fastbert::bias_gelu_forward", mutates_args=())
def bias_gelu_forward(x: Tensor, bias: Tensor | None, approximate: str, gated: bool = False) -> Tensor:
    """The Triton kernel; see `fastbert.kernels.bias_gelu.bias_gelu_forward`."""
    from fastbert.kernels import bias_gelu as kernel

    return kernel.bias_gelu_forward(x, bias, approximate=approximate, gated=gated)


@bias_gelu_forward.register_fake
def _(x: Tensor, bias: Tensor | None, approximate: str, gated: bool = False) -> Tensor:
    return x.new_empty(len(x), x.shape[1] // 2 if gated else x.shape[1])


@torch.library.custom_op("fastbert::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.bias_gelu.bias_gelu_backward`. Returns (dx, dbias)."""
    from fastbert.kernels import bias_gelu as kernel

    return kernel.bias_gelu_backward(dout, x, bias, approximate=approximate, gated=gated)


@bias_gelu_backward.register_fake
def _(dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str, gated: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate, ctx.gated = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = bias_gelu_backward(dout, x, bias, ctx.approximate, ctx.gated)
    return dx, None if bias is None else dbias.to(bias.dtype), None, None


bias_gelu_forward.register_autograd(_backward, setup_context=_save)
