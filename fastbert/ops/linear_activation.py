"""linear_activation: a linear layer and any of the activations after it; GELU goes to `linear_gelu`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastbert.config import Activation
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.linear import linear
from fastbert.ops.linear_gelu import linear_gelu, prepare_linear_gelu
from fastbert.reference import Approximate

ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# The activations that the kernels of GELU know, by their word for it.
APPROXIMATE: dict[Activation, Approximate] = {"gelu": "none", "gelu_tanh": "tanh"}


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None, *, gated: bool = False
) -> Tensor:
    """activation(x @ weight^T + bias): floating `[rows, in]`, `[out, in]`, `[out]` -> `[rows, out]`.

    Where `gated`, the activation of the first half of the outputs, times the second: `[rows, out / 2]`.

    Raises:
        ArgumentError, BackendError: as `linear_gelu`.
    """
    approximate = None if activation is None else APPROXIMATE.get(activation)
    if gated:
        if approximate is not None:
            return bias_gelu(linear(x, weight, None), bias, approximate=approximate, gated=True)
        return activated(linear(x, weight, bias), activation, gated=True)
    if approximate is not None:
        return linear_gelu(x, weight, bias, approximate=approximate)
    return activated(linear(x, weight, bias), activation)


def activated(x: Tensor, activation: Activation | None, *, gated: bool = False) -> Tensor:
    """torch's activation of `x`; None leaves it as it is. Where `gated`, of its first half, times the second."""
    made, gate = x.chunk(2, 1) if gated else (x, None)
    made = made if activation is None else ACTIVATE[activation](made)
    return made if gate is None else made * gate


def prepare_linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """Inference, not gated, as a function of tensors of one kind, see `run.prepared`; None: it can't be served.

    Raises:
        ArgumentError, BackendError: as `linear_gelu`.
    """
    if activation is not None and activation in APPROXIMATE:
        return prepare_linear_gelu(x, weight, bias, approximate=APPROXIMATE[activation])
    if activation is None:
        return F.linear
    return lambda x, weight, bias: activated(F.linear(x, weight, bias), activation)
