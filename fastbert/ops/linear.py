"""linear: a matrix product, and weights laid out once for it while a long piece of work holds them still."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.ops.common import check_linear, onednn_fuses, runs_bare

# weight -> its copy in the layout its product likes best, inside `hold_weights` of this thread. There is no cache past
# such a block, because nothing tells for sure that a weight was changed: `.data` and fused optimizers leave its version
# as it was.
_held: ContextVar[MutableMapping[Tensor, Tensor] | None] = ContextVar("held", default=None)


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


def packed(weight: Tensor) -> Tensor:
    """bfloat16 `weight` for oneDNN's products: the copy laid out for them inside `hold_weights`, else as it is."""
    held = _held.get()
    if held is None:
        return weight
    if weight not in held:
        held[weight] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return held[weight]


def transposed(weight: Tensor) -> Tensor:
    """`weight^T`, `[in, out]`: a copy in that order inside `hold_weights`, which BLAS reads faster; else a view."""
    held = _held.get()
    if held is None:
        return weight.t()
    if weight not in held:
        held[weight] = weight.detach().t().contiguous()
    return held[weight]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`: floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """
    check_linear(x, weight, bias)
    if onednn_fuses(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, "none", [], "")
    if x.dtype == torch.float32 and bias is not None and runs_bare(x, weight, bias):
        return torch.addmm(bias, x, transposed(weight))
    return F.linear(x, weight, bias)
