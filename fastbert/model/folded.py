"""The encoder folded for much text on a CPU in float32: no bias is left to add, and no large buffer is made twice.

A row that LayerNorm makes is y = z * w + b, and its z add up to 0. So with any shift of b, the same for all rows,

    probe . (y + shift) = sum of z / n + sum of (b + shift) / (n * w) = 1        with probe = 1 / (n * w),

once the shift is such that the second sum is 1. A matrix that multiplies these rows may then hold its own bias: as the
outer product of bias and probe. It is an identity of the weights, no approximation; only the rounding differs.

The shift is the bias of the next linear layer that ends in a residual sum, so that this layer adds to its residual in
place; and one constant for all columns, which the LayerNorm after that sum takes out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import backend
from fastbert.config import Activation, EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.layer import EncoderLayer
from fastbert.ops.attention_torch import attend
from fastbert.ops.common import multiplies_bare
from fastbert.ops.fastest import fastest
from fastbert.ops.linear import Buffers
from fastbert.packing import Packing
from fastbert.run.steps import Steps, layer_steps

_ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": torch.ops.aten.silu_,
}


# On an AMD CPU MKL adds up a product of 1 to 11 rows and `[in, out]` weights in one chain: thrice the rounding error.
FEWEST_ROWS = 16


def unserved(encoder: Encoder, x: Tensor) -> str | None:
    """Why folding is not for a run of `encoder` on `x`; None where it is."""
    if torch.is_grad_enabled() or not multiplies_bare(x):  # first, for torch.compile, which can't read what follows
        return "a gradient, autocast, a compiler or another device"
    if x.dtype != torch.float32:
        return f"rows of {x.dtype}"
    if len(x) < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    if backend.decide(x.device).path == "triton" or fastest(x.dtype, len(x), "laid out") != "blas":
        return "products that another path makes faster"
    if encoder.training or not len(encoder.layer) or encoder.in_eight_bits() is not None or not encoder.is_plain():
        return "training, products in 8 bits, or a part that is not an nn.Linear or nn.LayerNorm without hooks"
    config = encoder.config
    usual = _usual_steps(config.hidden_size, config.num_heads, config.activation)
    if any(steps is not usual for steps, _ in encoder.layers()):
        return "other steps than those of BERT's layer"
    if config.no_bias or not config.norm_bias:
        return "parts without a bias"
    return None


@cache
def _usual_steps(hidden_size: int, num_heads: int, activation: Activation) -> Steps:
    """Those of BERT's layer, of these sizes."""
    return layer_steps(EncoderConfig(hidden_size=hidden_size, num_heads=num_heads, activation=activation))


@dataclass(frozen=True, eq=False)
class _FoldedLayer:
    """An `EncoderLayer`'s parts under their names; matrices are `[in, out]`, the order that BLAS reads fastest."""

    qkv: Tensor
    attention_output: Tensor
    attention_norm: Callable[[Tensor], Tensor]
    intermediate: Tensor
    output: Tensor
    output_norm: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FoldedEncoder:
    """An encoder's weights, folded by `fold`. It does not see them change.

    Attributes:
        shift: `[hidden]`, added to the rows that come in.
        buffers: memory that stays in the caches.
    """

    config: EncoderConfig
    shift: Tensor
    layers: list[_FoldedLayer]
    buffers: Buffers = field(default_factory=Buffers)

    def run(self, x: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """The last of what `Encoder.run` returns for these arguments; `x` is overwritten."""
        packing.check_rows("x", x)
        config = self.config
        heads, head_dim = config.num_heads, config.head_dim
        x.add_(self.shift)
        for layer in self.layers:
            qkv = torch.mm(x, layer.qkv, out=self.buffers.room("qkv", len(x), layer.qkv.shape[1], x.dtype))
            context = self.buffers.room("context", len(x), layer.attention_output.shape[1], x.dtype)
            attend(qkv.view(-1, 3, heads, head_dim), packing, head_dim**-0.5, context.view(-1, heads, head_dim))
            if read is not None and layer is self.layers[-1]:
                context, x = context.index_select(0, read), x.index_select(0, read)
            x = layer.attention_norm(x.addmm_(context, layer.attention_output))
            wide = self.buffers.room("intermediate", len(x), layer.intermediate.shape[1], x.dtype)
            torch.mm(x, layer.intermediate, out=wide)
            x = layer.output_norm(x.addmm_(_ACTIVATE[config.activation](wide), layer.output))
        return x


def fold(encoder: Encoder, norm: nn.LayerNorm) -> FoldedEncoder | None:
    """`encoder`, whose input `norm` makes, folded; None where its rounding would suffer.

    That is where weights of a LayerNorm are so near 0 that the 1 which the probe reads comes from numbers that cancel:
    their magnitudes must not add up to more than 4, which is two bits. They are at 1.0 to 1.3 in MiniLM and in a BERT.
    """
    layers = [cast("dict[str, Any]", cast("EncoderLayer", layer).parts()) for layer in encoder.layer]
    joined = [
        cast("tuple[Tensor, Tensor]", cast("EncoderLayer", layer).attention.self.joined()) for layer in encoder.layer
    ]
    norms = [norm]  # the last of them makes the rows that come out, which are not shifted
    for layer in layers:
        norms += [layer["attention_norm"], layer["output_norm"]]
    products = [product for layer in layers for product in (layer["attention_output"], layer["output"])]
    shifts = [_shift(made, product) for made, product in zip(norms, products, strict=False)]
    for made, shift in zip(norms, shifts, strict=False):
        if not (_probe(made).abs() * (made.bias.abs() + shift.abs())).sum() <= 4.0:
            return None
    shifts.append(torch.zeros_like(norms[-1].bias))
    folded = [
        _FoldedLayer(
            qkv=_absorb(*joined[i], norms[2 * i], shifts[2 * i]),
            attention_output=_transposed(layer["attention_output"].weight),
            attention_norm=_shifted(layer["attention_norm"], shifts[2 * i + 1]),
            intermediate=_absorb(
                layer["intermediate"].weight, layer["intermediate"].bias, layer["attention_norm"], shifts[2 * i + 1]
            ),
            output=_transposed(layer["output"].weight),
            output_norm=_shifted(layer["output_norm"], shifts[2 * i + 2]),
        )
        for i, layer in enumerate(layers)
    ]
    return FoldedEncoder(encoder.config, shifts[0].float(), folded)


def _shift(norm: nn.LayerNorm, product: nn.Linear) -> Tensor:
    """float64 `[hidden]`, added to the rows that `norm` makes, to which then `product` is added."""
    probe, bias = _probe(norm), product.bias.double()
    return bias + (1 - probe @ (norm.bias + bias)) / probe.sum()


def _probe(norm: nn.LayerNorm) -> Tensor:
    return 1 / (norm.weight.numel() * norm.weight.double())


def _absorb(weight: Tensor, bias: Tensor, norm: nn.LayerNorm, shift: Tensor) -> Tensor:
    """The matrix, `[in, out]`, that gives on shifted rows what a linear layer gives on the rows that `norm` makes."""
    weight = weight.double()
    bias = bias.double() - weight @ shift
    return _transposed((weight + torch.outer(bias, _probe(norm))).float())


def _transposed(weight: Tensor) -> Tensor:
    return weight.detach().t().contiguous()


def _shifted(norm: nn.LayerNorm, shift: Tensor) -> Callable[[Tensor], Tensor]:
    bias = (norm.bias.double() + shift).float()
    return lambda x: F.layer_norm(x, bias.shape, norm.weight, bias, norm.eps)
