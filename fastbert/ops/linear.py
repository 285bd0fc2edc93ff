"""linear: a matrix product, and weights laid out once for oneDNN while a long piece of work holds them still."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.ops.common import check_linear, onednn_fuses

# weight -> its copy in oneDNN's layout, inside `hold_weights` of this thread. There is no cache beyond such a block,
# because nothing tells for sure that a weight was changed: `.data` and fused optimizers leave its version as it was.
_held: ContextVar[MutableMapping[Tensor, Tensor] | None] = ContextVar("held", default=None)


@contextmanager
def hold_weights() -> Iterator[None]:
    """Inside the block each weight is laid out for oneDNN when it is first used, and not again.

    Worth it for many batches on a CPU. No weight may be changed inside; it costs their memory once more.
    """
    token = _held.set(WeakIdKeyDictionary())
    try:
        yield
    finally:
        _held.reset(token)


def packed(weight: Tensor) -> Tensor:
    """`weight` for oneDNN's products: the copy laid out for them inside `hold_weights`, else as it is."""
    held = _held.get()
    if held is None:
        return weight
    if weight not in held:
        held[weight] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return held[weight]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`: floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """
    check_linear(x, weight, bias)
    if onednn_fuses(x, weight, bias) and packed(weight) is not weight:
        return torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)
