"""What the ops share: their checks, and whether kernels may run on some tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from fastbert import backend
from fastbert.cpu.machine import Machine, host
from fastbert.cpu.memory import as_kernels_read, is_plain
from fastbert.errors import ArgumentError
from fastbert.packing import check_dense


def check_rows(name: str, x: Tensor) -> None:
    """Raise ArgumentError unless `x` is a floating `[rows, width]` tensor."""
    check_dense(name, x)
    if x.dim() != 2 or not x.is_floating_point():
        raise ArgumentError(name, f"{x.dtype} of shape {tuple(x.shape)}", "a floating [rows, width] tensor")


def check_residual(residual: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    """Raise ArgumentError unless `residual` has this shape and the dtype and device of `x`."""
    check_dense("residual", residual)
    if tuple(residual.shape) != shape or (residual.dtype, residual.device) != (x.dtype, x.device):
        raise ArgumentError("residual", described(residual), f"{x.dtype} of shape {shape} on {x.device}, as x")


def check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise ArgumentError unless `parameter` has this shape, is beside `x`, and has its dtype or float32."""
    check_dense(name, parameter)
    fits = parameter.dtype in (x.dtype, torch.float32)
    if not fits or tuple(parameter.shape) != shape or parameter.device != x.device:
        raise ArgumentError(name, described(parameter), f"{x.dtype} or torch.float32 of shape {shape} on {x.device}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ArgumentError unless `x @ weight^T + bias` is defined for `[rows, in]`, `[out, in]` and `[out]`.

    All have one dtype, except under autocast, which casts them.
    """
    check_rows("x", x)
    check_dense("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not _beside(weight, x):
        raise ArgumentError("weight", described(weight), f"{x.dtype} of shape [out, {x.shape[1]}] on {x.device}")
    if bias is not None:
        check_dense("bias", bias)
    if bias is not None and (bias.shape != weight.shape[:1] or not _beside(bias, x)):
        raise ArgumentError("bias", described(bias), f"{x.dtype} of shape [{weight.shape[0]}] on {x.device}")


def _beside(other: Tensor, x: Tensor) -> bool:
    dtypes = {other.dtype, x.dtype}
    cast = dtypes <= {torch.float32, torch.bfloat16, torch.float16} and autocasts(x)
    return (len(dtypes) == 1 or cast) and other.device == x.device


def check_dropout(dropout: float, seed: Tensor | None, x: Tensor) -> None:
    """Raise ArgumentError unless `dropout` is a probability and, where it is on, `seed` is one int64 beside `x`."""
    if not 0.0 <= dropout < 1.0:
        raise ArgumentError("dropout", dropout, "a probability in [0, 1)")
    if dropout > 0.0:
        if seed is None:
            raise ArgumentError("seed", None, "an int64 tensor of one element", "Dropout needs a seed.")
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ArgumentError("seed", described(seed), f"an int64 tensor of one element on {x.device}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; torch knows none for meta."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def cast_states(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Hidden states in the dtype of autocast where it is on for their device, as torch casts those of its own products.

    float64 stays, as it does there. Parameters are not meant for this: kernels take float32 ones beside half states.

    Returns:
        `x` and the others, those that are None left out.
    """
    states = [state for state in (x, *others) if state is not None]
    if not autocasts(x):
        return tuple(states)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(state if state.dtype == torch.float64 else state.to(dtype) for state in states)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# The key that modes of make_fx(pre_dispatch=True) set.
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def observed() -> bool:
    """Whether something has to see torch's own ops.

    That is torch.compile, an exporter, a tracer, a dispatch mode, one of functorch's transforms, or forward-mode AD.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def torch_differentiates(dout: Tensor) -> bool:
    """Whether a backward has to be of ops that torch differentiates: a gradient of the gradient may be asked for, or
    many gradients at once (`is_grads_batched`), of which `dout` shows one, whose numbers are nowhere.
    """
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dout)


def runs_bare(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors may do without torch's own ops: launch a kernel straight, overwrite what it made.

    It may where neither autograd nor whatever has `observed` them needs to see those, and all tensors are plain.
    """
    return not wants_gradient(*tensors) and not observed() and _all_plain(tensors)


def multiplies_bare(x: Tensor, *others: Tensor | None) -> bool:
    """`runs_bare` for a linear layer on a CPU: autocast, which casts what torch multiplies, must be off too."""
    return x.device.type == "cpu" and runs_bare(x, *others) and not autocasts(x)


def launcher(op: CustomOpDef, *tensors: Tensor | None) -> Callable[..., Any]:
    """What runs `op` on these tensors: its kernel's launcher where it `runs_bare`, else `op`, by torch's dispatch."""
    return op._init_fn if runs_bare(*tensors) else op


def _all_plain(tensors: Iterable[Tensor | None]) -> bool:
    return all(tensor is None or is_plain(tensor) for tensor in tensors)


def native_machine(x: Tensor, *others: Tensor | None) -> Machine | None:
    """The CPU whose own kernels may run on `x`, which autograd does not record, and others; None where they don't."""
    if (
        x.device.type != "cpu"
        or backend.decide(x.device).path != "native"
        or observed()
        or not _all_plain((x, *others))
    ):
        return None
    machine = host()
    return machine if isinstance(machine, Machine) and x.dtype in machine.dtypes else None


def in_full(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that: half types are computed with so, and rounded once."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@overload
def parameter(x: Tensor) -> Tensor: ...
@overload
def parameter(x: Tensor | None) -> Tensor | None: ...
def parameter(x: Tensor | None) -> Tensor | None:
    """A parameter as the kernels of a CPU read it, in float32."""
    return None if x is None else as_kernels_read(x.detach().float())


def gradients(
    function: Callable[..., Tensor], given: Sequence[Tensor | None], dout: Tensor
) -> tuple[Tensor | None, ...]:
    """Of what a torch.autograd.Function saved, by torch, which knows the gradients of gradients and what observes it.

    Args:
        function: the same as the Function computes, in torch's ops.
    """
    with torch.enable_grad():
        views = [None if x is None else x.view_as(x) for x in given]  # apart, where one tensor is given twice
        out = function(*views)
    wanted = [view for view in views if view is not None and view.requires_grad]
    made = iter(torch.autograd.grad(out, wanted, dout.to(out.dtype), create_graph=torch.is_grad_enabled()))
    return tuple(next(made) if view is not None and view.requires_grad else None for view in views)


def described(x: Tensor) -> str:
    """A tensor in an error's words."""
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
