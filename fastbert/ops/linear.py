"""linear: a matrix product, and weights laid out once for it while a long piece of work holds them still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.native.layout import laid_out
from fastbert.native.machine import Machine, multiplies_well
from fastbert.native.memory import room
from fastbert.ops.common import check_linear, native_machine, observed, onednn_fuses, onednn_rows, wants_gradient
from fastbert.ops.watch import Watch
from fastbert.reference import Approximate

T = TypeVar("T")

# Rows from which on a product is worth its weight's being laid out: MiniLM's, on Zen 5.
LEAST_ROWS = 64

# What was made of a weight or a module, by the source and then by what it is for.
Made = MutableMapping[Any, dict[str, Any]]

# Inside `hold_weights` of this thread.
_held: ContextVar[Made | None] = ContextVar("held", default=None)


class Layouts:
    """What `hold_weights` made of a model's weights, kept until one of them changes; see `ops.watch`."""

    def __init__(self, model: nn.Module) -> None:
        self._watch = Watch(model)
        self._made: Made = WeakIdKeyDictionary()

    def current(self) -> Made:
        """All that was made of the weights as they are."""
        if self._watch.changed():
            self._made = WeakIdKeyDictionary()
        return self._made


class Buffers(threading.local):
    """Memory for intermediate results that is used again by every layer and batch; each thread has its own."""

    def __init__(self) -> None:
        self._of_name: dict[str, Tensor] = {}

    def room(self, name: str, x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[rows of x, width]`, in the dtype of x unless told; what had this name before is overwritten."""
        rows, buffer = x.shape[0], self._of_name.get(name)
        if buffer is None or buffer.shape[0] < rows:
            with torch.inference_mode(False):  # what is made inside could not be written to outside
                buffer = self._of_name[name] = room((rows, width), x.dtype if dtype is None else dtype)
        return buffer[:rows]


@contextmanager
def hold_weights(layouts: Layouts | None = None) -> Iterator[None]:
    """Inside the block each weight is laid out for its CPU product when it is first used, and not again.

    No weight may be changed inside; it costs their memory once more. With `layouts` what is made is kept for the next
    block, without them it is worth it for many batches.
    """
    token = _held.set(WeakIdKeyDictionary() if layouts is None else layouts.current())
    try:
        yield
    finally:
        _held.reset(token)


def held(source: Tensor | nn.Module, purpose: str, make: Callable[[], T]) -> T | None:
    """What `make()` makes of `source`: once inside `hold_weights`; None outside, where it would not pay."""
    made = _held.get()
    if made is None:
        return None
    if source not in made:
        made[source] = {}
    if purpose not in made[source]:
        made[source][purpose] = make()
    return cast(T, made[source][purpose])


def packed(weight: Tensor) -> Tensor:
    """`weight` for oneDNN's products: the copy laid out for them inside `hold_weights`, else as it is."""
    laid_out = held(weight, "oneDNN", lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
    return weight if laid_out is None else laid_out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`: floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """
    check_linear(x, weight, bias)
    if onednn_fuses(x, weight, bias):
        return by_onednn(x, weight, bias)
    return product(x, weight, bias)


def by_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gelu: Approximate | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer and GELU or a residual sum, `[rows, out]`, on tensors for which `onednn_fuses`."""
    rows = len(x)
    bias = None if bias is None else bias.contiguous()  # oneDNN's form reads it as if it were
    slack = onednn_rows(rows) - rows
    if slack:
        x, residual = with_slack(x, slack), None if residual is None else with_slack(residual, slack)
    if residual is not None:
        made = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed(weight), bias, "add")
    else:
        after: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
        made = torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, *after)
    return made[:rows] if slack else made


class Linear(nn.Linear):
    """An `nn.Linear`, of rows by oneDNN where that is for them: a pooler's or a head's, of any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if x.dim() == 2 and onednn_fuses(x, self.weight, self.bias):
            return by_onednn(x, self.weight, self.bias)
        return super().forward(x)


def with_slack(x: Tensor, rows: int) -> Tensor:
    """`x` with so many rows of zeros after its own."""
    return F.pad(x, (0, 0, 0, rows))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` unchecked; where it is recorded by kernels of this CPU, if they are faster than its BLAS."""
    machine = native_machine(x, weight, bias)
    recorded = wants_gradient(x, weight, bias) and not torch.is_autocast_enabled("cpu")
    exact = x.dtype == weight.dtype == torch.float32
    if machine is not None and recorded and exact and len(x) >= LEAST_ROWS and multiplies_well():
        return _Linear.apply(machine, x, weight, bias)  # type: ignore[no-untyped-call]
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer and its gradients by kernels of this CPU; its weight is laid out anew each time."""

    @staticmethod
    def forward(ctx: Any, machine: Machine, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.machine = machine
        return _by_kernel(machine, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, of_x, of_weight, of_bias = ctx.needs_input_grad
        dbias = dout.sum(0) if of_bias else None
        if torch.is_grad_enabled() or observed():  # a gradient of the gradient may be asked for: torch knows it
            return None, dout @ weight if of_x else None, dout.t() @ x if of_weight else None, dbias
        dx = _by_kernel(ctx.machine, dout, weight.t(), None) if of_x else None
        return None, dx, _weight_gradient(ctx.machine, x, dout) if of_weight else None, dbias


def _by_kernel(machine: Machine, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastbert.native import linear as kernel

    bias = x.new_zeros(len(weight)) if bias is None else _as_kernels_read(bias)
    out = room((len(x), len(weight)), x.dtype)
    kernel.linear(machine, _as_kernels_read(x), laid_out(weight, machine.columns), bias, out).run()
    return out


def _weight_gradient(machine: Machine, x: Tensor, dout: Tensor) -> Tensor:
    from fastbert.native import weight_gradient as kernel

    dweight = room((dout.shape[1], x.shape[1]), x.dtype).zero_()
    kernel.weight_gradient(machine, _as_kernels_read(x), _as_kernels_read(dout), dweight).run()
    return dweight


def _as_kernels_read(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous()  # a gradient may come negated
