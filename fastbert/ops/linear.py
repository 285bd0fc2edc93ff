"""linear: a matrix product that oneDNN runs on weights it has laid out once, where no gradient is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.ops.common import check_linear, onednn_fuses


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`: floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Raises:
        ArgumentError: a shape, dtype or device is wrong.
    """
    check_linear(x, weight, bias)
    if onednn_fuses(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, packed(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)


# parameter -> (what it was when it was packed, the packed copy). Weak: a packed copy lives as long as its parameter.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed(weight: Tensor) -> Tensor:
    """`weight` in the layout that oneDNN's products read fastest; made anew when the parameter has changed.

    Only parameters are worth it; any other tensor comes back as it is, and so does a parameter made under
    `torch.inference_mode`, which does not count its changes.
    """
    if not isinstance(weight, nn.Parameter) or weight.is_inference():
        return weight
    state = (weight.data_ptr(), weight._version, weight.dtype)
    known = _packed.get(weight)
    if known is None or known[0] != state:
        known = (state, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        _packed[weight] = known
    return known[1]
