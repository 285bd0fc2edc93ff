"""layer_norm and linear_layer_norm: checks, the paths of a CPU, and the Triton kernels as custom ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import backend
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import as_kernels_read, room
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import row_wise_choices
from fastbert.ops.common import (
    cast_states,
    check_dropout,
    check_linear,
    check_parameter,
    check_residual,
    check_rows,
    gradients,
    in_full,
    launcher,
    multiplies_bare,
    native_machine,
    observed,
    parameter,
    torch_differentiates,
    wants_gradient,
)
from fastbert.ops.dropout import drop
from fastbert.ops.fastest import FEW, onednn_fuses
from fastbert.ops.linear import product
from fastbert.ops.products import by_onednn
from fastbert.packing import Packing, check_dense


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float,
    unpack: Packing | None = None,
) -> Tensor:
    """LN(residual + dropout(x + x_bias)) over the columns of a packed hidden state, rounded once.

    Args:
        x: floating `[rows, hidden]`, any strides.
        weight, bias: `[hidden]`, in the dtype of `x` or float32.
        residual: `[rows, hidden]` in the dtype of `x`.
        x_bias: `[hidden]`, in the dtype of `x` or float32; the bias of the linear layer that made `x`.
        dropout: probability in [0, 1) that an element of `x + x_bias` is dropped. The mask is a pure function of
            (seed, row, column): see `reference.keep_mask`.
        seed: int64 tensor of one element on the device of `x`; needed when `dropout > 0`.
        eps: added to the variance.
        unpack: the layout of `x`, which has no slack then; the result is unpacked, on the Triton path in the same pass.

    Returns:
        `[rows, hidden]` in the dtype of `x`, under autocast in its dtype; with `unpack` `[batch, seqlen, hidden]`, 0 at
        padding. Sum and statistics are float32 (float64 for float64), the variance in two passes.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
        BackendError: the Triton path was forced and can't serve this call.
    """
    check_rows("x", x)
    if residual is None:
        (x,) = cast_states(x)
    else:
        check_dense("residual", residual)
        x, residual = cast_states(x, residual)
    _check(x, weight, bias, residual, x_bias, eps, unpack)
    check_dropout(dropout, seed, x)
    if backend.uses_triton("layer_norm", x, row_wise_choices.row_wise_unserved(x.shape[1], x.dtype)):
        tensors = (x, weight, bias, residual, x_bias)
        out_rows, out_size = (None, 0) if unpack is None else (unpack.indices, math.prod(unpack.padded_shape))
        out = launcher(layer_norm_forward, *tensors)(
            *tensors, dropout, seed, eps, out_rows, out_size, wants_gradient(*tensors)
        )[0]
        return out if unpack is None else out.unflatten(0, unpack.padded_shape)
    out = _layer_norm_torch(x, weight, bias, residual, x_bias, dropout, seed, eps)
    return out if unpack is None else unpack.unpack(out)


def linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float,
    unpack: Packing | None = None,
) -> Tensor:
    """LN(residual + dropout(x @ weight^T + x_bias)): the end of each half of an encoder layer.

    On a GPU bias, dropout, residual and LayerNorm are one kernel after the GEMM; on the CPU, without gradient and
    dropout, the GEMM adds to bias and residual.

    Args:
        x: floating `[rows, in]`.
        weight: `[hidden, in]`; x_bias: `[hidden]`.
        residual: `[rows, hidden]`; norm_weight, norm_bias: `[hidden]`.
        dropout, seed, eps, unpack: as in `layer_norm`.

    Returns:
        As `layer_norm`.

    Raises:
        ArgumentError, BackendError: as `layer_norm`.
    """
    check_linear(x, weight, x_bias)
    for name, given in (("residual", residual), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_dense(name, given)
    x, residual = cast_states(x, residual)
    check_dropout(dropout, seed, x)
    hidden = weight.shape[0]
    check_residual(residual, (x.shape[0], hidden), x)
    tensors = (x, weight, x_bias, residual, norm_weight, norm_bias)
    left: dict[str, Tensor | None] = {"residual": residual}
    if backend.uses_triton("linear_layer_norm", x, row_wise_choices.row_wise_unserved(hidden, x.dtype)):
        total, left = F.linear(x, weight), {"residual": residual, "x_bias": x_bias}
    elif dropout == 0.0 and onednn_fuses(*tensors):
        total, left = by_onednn(x, weight, x_bias, residual=residual), {}
    elif dropout == 0.0 and x.dtype == torch.float32 and x_bias is not None and multiplies_bare(*tensors):
        total, left = (residual + x_bias).addmm_(x, weight.t()), {}
    else:
        total = product(x, weight, x_bias)
    return layer_norm(total, norm_weight, norm_bias, dropout=dropout, seed=seed, eps=eps, unpack=unpack, **left)


def prepare_linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor], Tensor] | None:
    """Inference of `linear_layer_norm` as a function of tensors of one kind, see `run.prepared`; None: not served.

    Raises:
        ArgumentError, BackendError: as `layer_norm`.
    """
    from fastbert.kernels import layer_norm as kernel

    check_linear(x, weight, x_bias)
    product = x.new_empty((len(x), len(weight)))
    _check(product, norm_weight, norm_bias, residual, x_bias, eps, None)
    if not backend.uses_triton("linear_layer_norm", x, row_wise_choices.row_wise_unserved(len(weight), x.dtype)):
        return None
    start = kernel.prepare_layer_norm_forward(product, residual=residual, x_bias=x_bias, eps=eps)
    return lambda x, weight, x_bias, residual, norm_weight, norm_bias: start(
        F.linear(x, weight), norm_weight, norm_bias, residual, x_bias
    )[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    unpack: Packing | None,
) -> None:
    check_rows("x", x)
    hidden = x.shape[1]
    if hidden == 0:
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "at least one column")
    check_parameter("weight", weight, (hidden,), x)
    check_parameter("bias", bias, (hidden,), x)
    if residual is not None:
        check_residual(residual, (len(x), hidden), x)
    if x_bias is not None:
        check_parameter("x_bias", x_bias, (hidden,), x)
    check_eps(eps)
    if unpack is not None and (len(x), x.device) != (unpack.tokens, unpack.indices.device):
        given = f"{unpack.tokens} tokens on {unpack.indices.device}"
        raise ArgumentError("unpack", given, f"as many tokens as x has rows, {len(x)}, on {x.device}")


def norm_weights(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a plain LayerNorm; a bias of zeros where it has none."""
    parameters: dict[str, Any] = norm._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    return weight, torch.zeros_like(weight, requires_grad=False) if bias is None else bias


def in_float32(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    """Weight and bias of a LayerNorm in float32, and its eps, as the kernels of a CPU take them."""
    weight = parameter(norm.weight)
    bias = torch.zeros_like(weight) if norm.bias is None else parameter(norm.bias)
    return weight, bias, norm.eps


def check_eps(eps: float) -> None:
    """Raise ArgumentError unless `eps` can be added to a variance."""
    if not eps >= 0.0:
        raise ArgumentError("eps", eps, "a number that is not negative")


def _layer_norm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    eps: float,
) -> Tensor:
    dtype = x.dtype
    if seed is not None and dropout > 0.0:
        total = in_full(x) if x_bias is None else in_full(x) + x_bias
        x, x_bias = drop(total, seed, dropout), None
    return normalise(x, weight, bias, eps, dtype, residual=residual, x_bias=x_bias)


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """LN(x + x_bias + residual) in `dtype`: by kernels of this CPU where they serve, and else by torch."""
    given = (x, weight, bias, residual, x_bias)
    machine = native_machine(*given) if len(x) > FEW else None
    if machine is None or dtype not in machine.dtypes:
        return _normalised_torch(*given, eps, dtype)
    if wants_gradient(*given):
        return _NativeLayerNorm.apply(machine, eps, dtype, *given)  # type: ignore[no-untyped-call]
    return _normalised_native(machine, eps, dtype, *given)


def _normalised_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    total = x
    # Of float16 torch takes x * rstd - mean * rstd, which is off by thousands for a row of one value.
    if residual is not None or x_bias is not None or x.dtype == torch.float16:
        total = in_full(x)
    if x_bias is not None:
        total = total + x_bias
    if residual is not None:
        total = total + residual
    return F.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps).to(dtype)


def _normalised_native(
    machine: Machine,
    eps: float,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
) -> Tensor:
    from fastbert.cpu.row_wise import row_wise

    out = room(x.shape, dtype)
    row_wise(
        machine,
        as_kernels_read(x),
        bias=parameter(x_bias),
        residual=None if residual is None else as_kernels_read(residual),
        norm=(parameter(weight), parameter(bias), eps),
        out=out,
    ).run()
    return out


class _NativeLayerNorm(torch.autograd.Function):
    """LN(x + x_bias + residual) and its gradients by kernels of this CPU; the sum is made again, and not saved."""

    @staticmethod
    def forward(
        ctx: Any,
        machine: Machine,
        eps: float,
        dtype: torch.dtype,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        x_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, residual, x_bias)
        ctx.options = machine, eps, dtype
        return _normalised_native(machine, eps, dtype, x, weight, bias, residual, x_bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        machine, eps, dtype = ctx.options
        if torch_differentiates(dout) or observed():
            again = partial(_normalised_torch, eps=eps, dtype=dtype)
            return None, None, None, *gradients(again, given, dout)
        from fastbert.cpu.row_wise_backward import layer_norm_backward as kernel

        x, weight, _, residual, x_bias = given
        dx, (dweight, dbias, dx_bias) = kernel(
            machine,
            as_kernels_read(x),
            as_kernels_read(dout),
            parameter(weight),
            eps,
            bias=parameter(x_bias),
            residual=None if residual is None else as_kernels_read(residual),
        )
        made = zip((dx, dweight, dbias, dx, dx_bias), given, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(one.to(of.dtype) if needed else None for one, of, needed in made)


@torch.library.custom_op("fastbert::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    out_rows: Tensor | None,
    out_size: int,
    store_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.layer_norm.layer_norm_forward`. Returns (out, total, mean, rstd)."""
    from fastbert.kernels import layer_norm as kernel

    return kernel.layer_norm_forward(
        x,
        weight,
        bias,
        residual=residual,
        x_bias=x_bias,
        dropout=dropout,
        seed=seed,
        eps=eps,
        out_rows=out_rows,
        out_size=out_size,
        store_stats=store_stats,
    )


@layer_norm_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    out_rows: Tensor | None,
    out_size: int,
    store_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape if store_stats and _adds(residual, x_bias, dropout) else (0,))
    statistics = x.new_empty(len(x) if store_stats else 0, dtype=torch.float32)
    size = len(x) if out_rows is None else out_size
    return x.new_empty(size, x.shape[1]), total, statistics, torch.empty_like(statistics)


def _adds(residual: Tensor | None, x_bias: Tensor | None, dropout: float) -> bool:
    """Whether what is normalised differs from x, so that the forward stores it for the backward."""
    return residual is not None or x_bias is not None or dropout > 0.0


@torch.library.custom_op("fastbert::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dout: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: bool,
    x_bias: bool,
    dropout: float,
    seed: Tensor | None,
    out_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel; see `fastbert.kernels.layer_norm.layer_norm_backward`. Returns (dx, dresidual, dparameters)."""
    from fastbert.kernels import layer_norm as kernel

    return kernel.layer_norm_backward(
        dout, total, weight, mean, rstd, residual=residual, x_bias=x_bias, dropout=dropout, seed=seed, out_rows=out_rows
    )


@layer_norm_backward.register_fake
def _(
    dout: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: bool,
    x_bias: bool,
    dropout: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape)
    dresidual = torch.empty_like(dx) if residual and dropout > 0.0 else total.new_empty(0)
    return dx, dresidual, total.new_empty(3 if x_bias else 2, total.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, x_bias, dropout, seed, _, out_rows, _, store_stats = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(total, mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for the gradients of total, mean and rstd
    ctx.save_for_backward(total if _adds(residual, x_bias, dropout) else x, weight, mean, rstd, seed, out_rows)
    ctx.has_residual = residual is not None
    ctx.dbias_dtype = bias.dtype
    ctx.dx_bias_dtype = None if x_bias is None else x_bias.dtype
    ctx.dropout = dropout
    ctx.store_stats = store_stats


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    if not ctx.store_stats:
        raise BackendError(
            "layer_norm_forward", "a gradient asked for after store_stats=False", "store_stats=True in the forward"
        )
    total, weight, mean, rstd, seed, out_rows = ctx.saved_tensors
    has_x_bias = ctx.dx_bias_dtype is not None
    dx, dresidual, dparameters = layer_norm_backward(
        dout, total, weight, mean, rstd, ctx.has_residual, has_x_bias, ctx.dropout, seed, out_rows
    )
    dtypes = {weight.dtype, ctx.dbias_dtype, ctx.dx_bias_dtype or weight.dtype}
    dweight, dbias, *rest = dparameters.to(weight.dtype) if len(dtypes) == 1 else dparameters  # one cast for all
    if ctx.has_residual and ctx.dropout == 0.0:
        dresidual = dx
    return (
        dx,
        dweight.to(weight.dtype),
        dbias.to(ctx.dbias_dtype),
        dresidual if ctx.has_residual else None,
        rest[0].to(ctx.dx_bias_dtype) if has_x_bias else None,
        None,
        None,
        None,
        None,
        None,
        None,
    )


layer_norm_forward.register_autograd(_backward, setup_context=_save)
