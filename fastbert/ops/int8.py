"""int8: products of int8 rows and int8 weights on a CPU, and all that follows one of them in a pass.

Rows have a scale and a zero point each, weights a scale for each output; a product is summed exactly, in int32. Nothing
here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import Activation
from fastbert.cpu.int8 import Int8Matrix, Int8Rows
from fastbert.cpu.memory import room
from fastbert.ops.common import check_rows, native_machine
from fastbert.ops.linear_activation import activated


def quantize_rows_int8(x: Tensor) -> Int8Rows:
    """Each row of `x`, floating `[rows, width]`, in 255 equal steps from its least to its greatest number, 0 included.

    Raises:
        ArgumentError: `x` is no such tensor.
    """
    check_rows("x", x)
    machine = native_machine(x)
    if machine is None:
        return _quantized(x.float())
    from fastbert.cpu import row_wise as kernel

    made = Int8Rows.empty(*x.shape)
    kernel.row_wise(machine, x.contiguous(), out_int8=made).run()
    return made


def linear_int8(
    x: Int8Rows,
    weight: Int8Matrix,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    out: bool = True,
    int8: bool = False,
) -> tuple[Tensor | None, Int8Rows | None]:
    """`x @ weight + bias`, then activation, + residual and LayerNorm, those that are asked for.

    Args:
        x: `[rows, in]`; weight: `[out, in]`; bias: float32 `[out]`; residual: floating `[rows, out]`.
        dtype: of the result.
        norm: LayerNorm's weight and bias, float32 `[out]`, and its eps.
        out, int8: whether the result is wanted in `dtype`, and whether in int8, quantized before it is rounded.
    """
    rows, depth = x.values.shape
    machine = native_machine(x.scale, x.values, x.zero, bias, residual, *(norm or ())[:2])
    if machine is not None and machine.int8 and dtype in machine.dtypes and depth % 4 == 0:
        from fastbert.cpu import linear_int8 as kernel
        from fastbert.cpu.program import Program

        shape = rows, len(weight.scale)
        made = room(shape, dtype) if out else None
        quantized = Int8Rows.empty(*shape) if int8 else None
        calls = kernel.linear_int8(
            machine, x, weight, bias, activation=activation, residual=residual, norm=norm, out=made, out_int8=quantized
        )
        Program(calls).run()
        return made, quantized
    total = (x.floats() @ weight.plain()[:depth].float()) * weight.scale + bias
    total = activated(total, activation)
    if residual is not None:
        total = total + residual.float()
    if norm is not None:
        norm_weight, norm_bias, eps = norm
        total = F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
    return total.to(dtype) if out else None, _quantized(total) if int8 else None


def _quantized(x: Tensor) -> Int8Rows:
    low, high = x.amin(1).clamp_max(0.0), x.amax(1).clamp_min(0.0)
    step = (high - low) / 255.0
    step = torch.where(step < 1e-30, 1.0, step)
    zero = (-low / step).round()
    made = Int8Rows.empty(*x.shape)
    made.values.copy_(torch.addcmul(zero[:, None], x, 1.0 / step[:, None]).round().clamp(0.0, 255.0))
    made.scale.copy_(step)
    made.zero.copy_(zero)
    return made
