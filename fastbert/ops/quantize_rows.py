"""quantize_rows, the ops that end in it, and the product that begins with it: rows in e4m3 with one scale each.

On a GPU LayerNorm and GELU write them in passing. On a CPU all is rounded to e4m3 as there, and multiplied in float32,
to test accuracy; it is slow. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import backend, reference
from fastbert.kernels import precision, row_wise_choices
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.common import check_rows, launcher
from fastbert.ops.layer_norm import layer_norm
from fastbert.reference import Approximate


class QuantizedRows(NamedTuple):
    """A matrix whose rows are about `values * scale`.

    Attributes:
        values: float8_e4m3fn `[rows, width]`.
        scale: float32 `[rows]`.
    """

    values: Tensor
    scale: Tensor


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Each row of `x`, floating `[rows, width]`, scaled so that its largest magnitude is 448, the largest of e4m3.

    Raises:
        ArgumentError: `x` is no such tensor.
        BackendError: the Triton path was forced and can't serve this call.
    """
    check_rows("x", x)
    if backend.uses_triton("quantize_rows", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        return QuantizedRows(*launcher(quantize_rows_forward, x)(x))
    return QuantizedRows(*reference.quantize_rows(x.float()))


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor, x_bias: Tensor, eps: float
) -> tuple[Tensor, QuantizedRows]:
    """`layer_norm`, and beside its result the same quantized before it is rounded.

    Raises:
        ArgumentError, BackendError: as `layer_norm`.
    """
    if backend.uses_triton("layer_norm_quantize", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        tensors = (x, weight, bias, residual, x_bias)
        out, values, scale = launcher(layer_norm_quantize_forward, *tensors)(*tensors, eps)
        return out, QuantizedRows(values, scale)
    out = layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, eps=eps)
    return out, quantize_rows(out)


def bias_gelu_quantize(x: Tensor, bias: Tensor, *, approximate: Approximate = "none") -> QuantizedRows:
    """`bias_gelu`, quantized before it is rounded.

    Raises:
        ArgumentError, BackendError: as `bias_gelu`.
    """
    if backend.uses_triton("bias_gelu_quantize", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        return QuantizedRows(*launcher(bias_gelu_quantize_forward, x, bias)(x, bias, approximate))
    return quantize_rows(bias_gelu(x, bias, approximate=approximate))


def linear_quantized(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x @ weight^T + bias`, `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]` in `dtype`.

    Summed in float32, or on a GPU in what `precision.fp8_sums_fast` allows.
    """
    if x.values.is_cuda:
        return torch._scaled_mm(
            x.values,
            weight.values.t(),
            x.scale[:, None],
            weight.scale[None, :],
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=precision.fp8_sums_fast(x.values.shape[1]),
        )
    out = (x.values.float() @ weight.values.float().t()) * x.scale[:, None] * weight.scale
    return (out if bias is None else out + bias).to(dtype)


def prepare_quantize_rows(x: Tensor) -> Callable[[Tensor], QuantizedRows] | None:
    """`quantize_rows` as a function of tensors of one kind, see `run.prepared`; None: the kernel can't serve it."""
    from fastbert.kernels import quantize_rows as kernel

    check_rows("x", x)
    if not backend.uses_triton("quantize_rows", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        return None
    start = kernel.prepare_quantize_rows(x)
    return lambda x: QuantizedRows(*start(x))


def prepare_layer_norm_quantize(
    x: Tensor, residual: Tensor, x_bias: Tensor, *, eps: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, QuantizedRows]] | None:
    """`layer_norm_quantize` as a function of x, weight, bias, residual and x_bias; as `prepare_quantize_rows`."""
    from fastbert.kernels import layer_norm as kernel

    if not backend.uses_triton("layer_norm_quantize", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        return None
    start = kernel.prepare_layer_norm_forward(x, residual=residual, x_bias=x_bias, eps=eps, quantize=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x_bias: Tensor) -> tuple[Tensor, QuantizedRows]:
        quantized = QuantizedRows(*_empty(x))
        return start(x, weight, bias, residual, x_bias, None, None, *quantized)[0], quantized

    return run


def prepare_bias_gelu_quantize(
    x: Tensor, bias: Tensor, *, approximate: Approximate = "none"
) -> Callable[[Tensor, Tensor], QuantizedRows] | None:
    """`bias_gelu_quantize` as a function of x and bias; as `prepare_quantize_rows`."""
    from fastbert.kernels import bias_gelu as kernel

    if not backend.uses_triton("bias_gelu_quantize", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        return None
    start = kernel.prepare_bias_gelu_quantize(x, bias, approximate=approximate)
    return lambda x, bias: QuantizedRows(*start(x, bias))


@torch.library.custom_op("fastbert::quantize_rows_forward", mutates_args=())
def quantize_rows_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.quantize_rows.quantize_rows`. Returns (values, scale)."""
    from fastbert.kernels import quantize_rows as kernel

    return kernel.quantize_rows(x)


@quantize_rows_forward.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x)


@torch.library.custom_op("fastbert::layer_norm_quantize_forward", mutates_args=())
def layer_norm_quantize_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.layer_norm.layer_norm_forward`. Returns (out, values, scale)."""
    from fastbert.kernels import layer_norm as kernel

    values, scale = _empty(x)
    out, *_ = kernel.layer_norm_forward(
        x, weight, bias, residual=residual, x_bias=x_bias, eps=eps, quantized=(values, scale)
    )
    return out, values, scale


@layer_norm_quantize_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_empty(x)


@torch.library.custom_op("fastbert::bias_gelu_quantize_forward", mutates_args=())
def bias_gelu_quantize_forward(x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.bias_gelu.bias_gelu_quantize`. Returns (values, scale)."""
    from fastbert.kernels import bias_gelu as kernel

    return kernel.bias_gelu_quantize(x, bias, approximate=approximate)


@bias_gelu_quantize_forward.register_fake
def _(x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return _empty(x)


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], dtype=torch.float32)
