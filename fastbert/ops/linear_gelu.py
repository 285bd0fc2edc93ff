"""linear_gelu: checks, the torch path, and on a GPU the form that the launch table names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend
from fastbert.errors import BackendError
from fastbert.kernels import choices, linear_gelu_choices, target
from fastbert.ops.bias_gelu import bias_gelu, bias_gelu_backward, check_approximate
from fastbert.ops.common import (
    cast_states,
    check_linear,
    launcher,
    multiplies_bare,
    native_machine,
    wants_gradient,
)
from fastbert.ops.fastest import onednn_fuses
from fastbert.ops.linear import linear
from fastbert.ops.products import by_onednn
from fastbert.reference import Approximate


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: Approximate = "none") -> Tensor:
    """GELU(x @ weight^T + bias): the first half of the feed-forward.

    On a GPU `linear_gelu_choices.linear_gelu` names the form: bias and GELU as one kernel after the GEMM, inside a
    GEMM of ours, or inside cuBLASLt's. On the CPU, without gradient, oneDNN applies both inside the GEMM in bfloat16,
    and GELU overwrites the product in float32.

    Args:
        x: floating `[rows, in]`.
        weight: `[out, in]`; bias: `[out]`.
        approximate: as in `bias_gelu`.

    Returns:
        `[rows, out]` in the dtype of `x`, under autocast in its dtype.

    Raises:
        ArgumentError, BackendError: as `bias_gelu`.
    """
    check_linear(x, weight, bias)
    check_approximate(approximate)
    if backend.uses_triton("linear_gelu", x, choices.dtype_unserved(x.dtype)):
        return _linear_gelu_triton(x, weight, bias, approximate)
    if onednn_fuses(x, weight, bias):
        return by_onednn(x, weight, bias, gelu=approximate)
    product = linear(x, weight, bias)
    if multiplies_bare(x, weight, bias) and native_machine(product) is None:
        return torch.ops.aten.gelu_(product, approximate=approximate)
    return bias_gelu(product, None, approximate=approximate)


def prepare_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: Approximate = "none"
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """Inference as a function of tensors of one kind, see `run.prepared`; None: the kernels can't serve it.

    Raises:
        ArgumentError, BackendError: as `linear_gelu`.
    """
    from fastbert.kernels import bias_gelu as kernel

    check_linear(x, weight, bias)
    check_approximate(approximate)
    if not backend.uses_triton("linear_gelu", x, choices.dtype_unserved(x.dtype)):
        return None
    if _form(x, weight, approximate, gradient=False) != "fused pass":
        return lambda x, weight, bias: _linear_gelu_triton(x, weight, bias, approximate)
    product = x.new_empty((len(x), len(weight)))
    start = kernel.prepare_bias_gelu_forward(product, bias, approximate=approximate)
    return lambda x, weight, bias: start(F.linear(x, weight), bias)


def _form(x: Tensor, weight: Tensor, approximate: Approximate, *, gradient: bool) -> choices.Form:
    (rows, depth), width = x.shape, weight.shape[0]
    here = target.of(x.device)
    return linear_gelu_choices.linear_gelu(
        rows, width, depth, x.dtype, approximate=approximate, gradient=gradient, target=here
    ).form


def _linear_gelu_triton(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximate) -> Tensor:
    (x,) = cast_states(x)
    gradient = wants_gradient(x, weight, bias)
    match _form(x, weight, approximate, gradient=gradient):
        case "epilogue":
            forward = launcher(linear_gelu_forward, x, weight, bias)
            return forward(x, *cast_states(weight), bias, approximate, store_product=gradient)[0]
        case "cublaslt" if bias is not None and approximate == "tanh" and not gradient:
            return torch.ops.aten._addmm_activation(*cast_states(bias, x), cast_states(weight)[0].t(), use_gelu=True)
        case _:
            return bias_gelu(F.linear(x, weight), bias, approximate=approximate)


@torch.library.custom_op("fastbert::linear_gelu_forward", mutates_args=())
def linear_gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, store_product: bool
) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.linear_gelu.linear_gelu_forward`. Returns (out, product)."""
    from fastbert.kernels import linear_gelu as kernel

    return kernel.linear_gelu_forward(x, weight, bias, approximate=approximate, store_product=store_product)


@linear_gelu_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, store_product: bool) -> tuple[Tensor, Tensor]:
    width = weight.shape[0]
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0] if store_product else 0, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.approximate, ctx.store_product = inputs
    _, product = output
    ctx.mark_non_differentiable(product)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of the product
    ctx.save_for_backward(x, weight, bias, product)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    if not ctx.store_product:
        raise BackendError(
            "linear_gelu_forward", "a gradient asked for after store_product=False", "store_product=True in the forward"
        )
    x, weight, bias, product = ctx.saved_tensors
    dproduct, dbias = bias_gelu_backward(dout, product, bias, ctx.approximate)
    return (
        dproduct @ weight if ctx.needs_input_grad[0] else None,
        dproduct.t() @ x if ctx.needs_input_grad[1] else None,
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
    )


linear_gelu_forward.register_autograd(_backward, setup_context=_save)
