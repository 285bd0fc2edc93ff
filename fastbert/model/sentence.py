"""From the rows of a text to its embedding: pooling, and what a sentence-transformers model has behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.errors import ArgumentError
from fastbert.ops.pooling import pool
from fastbert.packing import Packing

# sentence-transformers' names. A weighted mean weighs the first token 1, the second 2, and so on.
Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

# By the names of torch's modules, as they are when made without arguments.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
    "LeakyReLU": F.leaky_relu,
    "ELU": F.elu,
    "Softplus": F.softplus,
    "Hardtanh": F.hardtanh,
}

# How alike embeddings float32 [n, width] and [m, width] are, float32 [n, m]: by sentence-transformers' names.
SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: F.normalize(a) @ F.normalize(b).T,
    "dot": lambda a, b: a @ b.T,
    # by a product of matrices the distance of near ones would be lost in rounding
    "euclidean": lambda a, b: -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1.0),
}


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear layer and an activation.

    Attributes:
        weight: float32 `[out, in]`.
        bias: float32 `[out]`, or None.
        activation: a key of `ACTIVATIONS`.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """float32 `[batch, in]` -> `[batch, out]`."""
        return ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Each row less its mean, over its deviation, scaled and shifted; eps is that of torch's module, 1e-5.

    Attributes:
        weight: float32 `[width]`.
        bias: float32 `[width]`.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """float32 `[batch, width]` -> the same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Truncate:
    """The first columns.

    Attributes:
        columns: how many; an embedding of fewer stays as it is.
    """

    columns: int

    def __call__(self, x: Tensor) -> Tensor:
        """float32 `[batch, width]` -> `[batch, min(width, columns)]`."""
        return x[:, : self.columns]


@dataclass(frozen=True, eq=False)
class Embedder:
    """What makes embeddings of a model's last hidden states.

    Attributes:
        pooling: how the rows of a text become one; several are put side by side.
        layers: what follows, float32 `[batch, width]` -> `[batch, width']` each: `Dense`, `LayerNorm`, `Truncate`, or
            `F.normalize`, which divides each row by its length; one of zeros stays so.
    """

    pooling: tuple[Mode, ...] = ("mean",)
    layers: tuple[Callable[[Tensor], Tensor], ...] = ()

    def width(self, hidden_size: int) -> int:
        """Columns of an embedding.

        Raises:
            ArgumentError: a layer reads another number of columns than it gets.
        """
        width = hidden_size * len(self.pooling)
        for layer in self.layers:
            if isinstance(layer, Dense | LayerNorm):
                reads = layer.weight.shape[-1]
                if reads != width:
                    after = f"the {reads} that the {type(layer).__name__} after it reads"
                    raise ArgumentError("pooling", f"{width} columns", after)
                width = len(layer.weight)
            elif isinstance(layer, Truncate):
                width = min(width, layer.columns)
        return width

    def __call__(self, states: Tensor, packing: Packing) -> Tensor:
        """Packed rows `[tokens, hidden]` -> float32 `[batch, width]`."""
        first, layers = self.pooling[0], self.layers
        if len(self.pooling) == 1 and first in ("cls", "max", "mean"):
            normalise = layers[:1] == (F.normalize,)
            x = pool(states, packing, first, normalise=normalise).float()  # in one kernel
            layers = layers[1:] if normalise else layers
        else:
            x = torch.cat([_pooled(states, packing, mode) for mode in self.pooling], dim=1)
        for layer in layers:
            x = layer(x)
        return x


def _pooled(states: Tensor, packing: Packing, mode: Mode) -> Tensor:
    """float32 `[batch, hidden]`; zeros for a sequence without tokens."""
    if mode in ("cls", "max", "mean"):
        return pool(states, packing, mode).float()
    total = torch.zeros((packing.batch, states.shape[1]), dtype=torch.float32, device=states.device)
    if packing.tokens == 0:
        return total
    lengths = packing.lengths.unsqueeze(1)
    if mode == "mean_sqrt_len_tokens":
        return pool(states, packing, "mean").float() * lengths.sqrt()
    if mode == "lasttoken":
        rows = (packing.cu_seqlens[1:] - 1).clamp(min=0)
        return states.index_select(0, rows).float() * (lengths > 0)
    weights = torch.arange(1, packing.tokens + 1, dtype=torch.float32, device=states.device)
    numbers = torch.arange(packing.batch, dtype=torch.int64, device=states.device)
    sequence = torch.repeat_interleave(numbers, packing.lengths, output_size=packing.tokens)
    weights -= packing.cu_seqlens[sequence]
    total.index_add_(0, sequence, states[: packing.tokens].float() * weights.unsqueeze(1))
    return total / (lengths * (lengths + 1) / 2).clamp(min=1)
