"""linear: a matrix product, and weights laid out once for it while a long piece of work holds them still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.ops.common import check_linear, onednn_fuses

T = TypeVar("T")

# What was made of a weight or a module inside `hold_weights` of this thread. There is no cache past such a block,
# because nothing tells for sure that a weight was changed: `.data` and fused optimizers leave its version as it was.
_held: ContextVar[MutableMapping[Any, Any] | None] = ContextVar("held", default=None)


@contextmanager
def hold_weights() -> Iterator[None]:
    """Inside the block each weight is laid out for its CPU product when it is first used, and not again.

    Worth it for many batches on a CPU. No weight may be changed inside; it costs their memory once more.
    """
    token = _held.set(WeakIdKeyDictionary())
    try:
        yield
    finally:
        _held.reset(token)


def held(source: Tensor | nn.Module, make: Callable[[], T]) -> T | None:
    """What `make()` makes of `source`: once inside `hold_weights`; None outside, where it would not pay."""
    made = _held.get()
    if made is None:
        return None
    if source not in made:
        made[source] = make()
    return cast(T, made[source])


def packed(weight: Tensor) -> Tensor:
    """bfloat16 `weight` for oneDNN's products: the copy laid out for them inside `hold_weights`, else as it is."""
    laid_out = held(weight, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
    return weight if laid_out is None else laid_out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`: floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """
    check_linear(x, weight, bias)
    if onednn_fuses(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)
