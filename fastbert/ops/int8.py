"""int8: products of int8 rows and int8 weights on a CPU, and all that follows one of them in a pass.

Rows have a scale and a zero point each, weights a scale for each output; a product is summed exactly, in int32. Nothing
here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import Activation
from fastbert.native.rows import Int8Matrix, Int8Rows
from fastbert.ops.common import check_rows, native_machine

_ACTIVATE = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def quantize_weight(weight: Tensor) -> Int8Matrix:
    """`[out, in]` -> int8 `[in, out]`; of each output the largest magnitude becomes 127."""
    exact = weight.detach().float()
    scale = exact.abs().amax(1).clamp_min(1e-30) / 127.0
    values = (exact / scale[:, None]).round().to(torch.int8)
    return Int8Matrix(values.t().contiguous(), scale, scale * values.sum(1, dtype=torch.int32))


def quantize_rows_int8(x: Tensor) -> Int8Rows:
    """Each row of `x`, floating `[rows, width]`, in 255 equal steps from its least to its greatest number, 0 included.

    Raises:
        ArgumentError: `x` is no such tensor.
    """
    check_rows("x", x)
    machine = native_machine(x)
    if machine is None:
        return _quantized(x.float())
    from fastbert.native import row_wise as kernel

    made = kernel.row_wise(machine, x.contiguous(), int8=True)
    assert made is not None
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
    """`x @ weight + bias`, its activation, + residual, and LayerNorm, those that are asked for: `[rows, in]` -> `[rows, out]`.

    Args:
        dtype: of the result.
        norm: LayerNorm's weight and bias, float32 `[out]`, and its eps.
        out, int8: whether the result is wanted in `dtype`, and whether in int8, quantized before it is rounded.
    """
    product = torch._int_mm(x.values, weight.values)
    machine = native_machine(x.scale)
    if machine is not None and dtype in machine.dtypes:
        from fastbert.native import row_wise as kernel

        made = torch.empty(product.shape, dtype=dtype) if out else None
        quantized = kernel.row_wise(
            machine,
            product,
            scaled=(x, weight),
            bias=bias,
            activation=activation,
            residual=residual,
            norm=norm,
            out=made,
            int8=int8,
        )
        return made, quantized
    total = x.scale[:, None] * (product * weight.scale - x.zero[:, None] * weight.sum) + bias
    if activation is not None:
        total = _ACTIVATE[activation](total)
    if residual is not None:
        total = total + residual
    if norm is not None:
        total = F.layer_norm(total, norm[0].shape, *norm)
    return total.to(dtype) if out else None, _quantized(total) if int8 else None


def _quantized(x: Tensor) -> Int8Rows:
    low, high = x.amin(1).clamp_max(0.0), x.amax(1).clamp_min(0.0)
    scale = (high - low) / 255.0
    scale = torch.where(scale < 1e-30, 1.0, scale)
    zero = (-low / scale - 128.0).round()
    values = torch.addcmul(zero[:, None], x, 1.0 / scale[:, None]).round().clamp(-128.0, 127.0)
    return Int8Rows(values.to(torch.int8), scale, zero)
