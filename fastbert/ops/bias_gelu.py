"""bias_gelu: checks, the torch path, and the Triton kernels as custom ops."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend
from fastbert.errors import ArgumentError
from fastbert.kernels import choices
from fastbert.ops.common import cast_states, check_parameter, check_rows, launcher
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
    if bias is None and not gated:
        return F.gelu(x, approximate=approximate)
    total = x.to(torch.promote_types(x.dtype, torch.float32))  # half types are rounded once, at the end
    if bias is not None:
        total = total + bias
    if not gated:
        return F.gelu(total, approximate=approximate).to(x.dtype)
    z, gate = total.chunk(2, 1)
    return (F.gelu(z, approximate=approximate) * gate).to(x.dtype)


def check_approximate(approximate: str) -> None:
    """Raise ArgumentError unless it names a form of GELU."""
    if approximate not in get_args(Approximate):
        raise ArgumentError("approximate", repr(approximate), "'none' or 'tanh'")


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
