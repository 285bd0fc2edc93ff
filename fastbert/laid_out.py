"""The encoder laid out once for the kernels of this CPU, and run by them with nothing asked in between.

Models make it inside `ops.linear.hold_weights`. Where these products are not the fastest, they make `folding`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder, EncoderLayer
from fastbert.native.layout import laid_out
from fastbert.native.machine import Machine, multiplies_well
from fastbert.ops.common import native_machine, runs_bare
from fastbert.ops.layer_norm import in_float32
from fastbert.ops.linear import Buffers
from fastbert.packing import Packing


def serves(encoder: Encoder, x: Tensor) -> bool:
    """Whether it is meant for a run of `encoder` on `x`: a CPU whose kernels multiply well, no gradient, no dropout."""
    bare = not torch.is_grad_enabled() and runs_bare(x)  # first, for torch.compile, which can't read what follows
    if not bare or encoder.training or type(encoder) is not Encoder or not multiplies_well():
        return False
    config = encoder.config
    whole = config.head_dim % 8 == 0 and config.intermediate_size * x.itemsize % 4 == 0
    return whole and len(x) > 0 and native_machine(x) is not None


@dataclass(frozen=True, eq=False)
class _Product:
    """A linear layer: its weight as `native.layout.laid_out` gives it, its bias, and how many numbers it makes."""

    weight: Tensor
    bias: Tensor
    width: int

    @classmethod
    def of(cls, linear: nn.Linear) -> _Product:
        return cls(laid_out(linear.weight), linear.bias.detach().contiguous(), linear.out_features)


@dataclass(frozen=True, eq=False)
class _Layer:
    """An `EncoderLayer`'s parts under their names; of a norm weight and bias in float32, and eps."""

    qkv: _Product
    attention_output: _Product
    attention_norm: tuple[Tensor, Tensor, float]
    intermediate: _Product
    output: _Product
    output_norm: tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class LaidOutEncoder:
    """An encoder's weights, laid out by `lay_out`. It does not see them change."""

    machine: Machine
    config: EncoderConfig
    layers: list[_Layer]
    buffers: Buffers = field(default_factory=Buffers)

    def run(self, x: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """The last of what `Encoder.run` returns for these arguments."""
        from fastbert.native.attention import attention_forward
        from fastbert.native.linear import linear

        machine, config = self.machine, self.config
        heads, head_dim = config.num_heads, config.head_dim
        for layer in self.layers:
            qkv = self.buffers.room("qkv", x, layer.qkv.width)
            linear(machine, x, layer.qkv.weight, layer.qkv.bias, qkv)
            context = self.buffers.room("context", x, config.hidden_size)
            if packing.tokens < x.shape[0]:
                context[packing.tokens :] = 0
            attention_forward(
                machine,
                qkv.view(-1, 3, heads, head_dim),
                packing.cu_seqlens,
                packing.max_seqlen,
                head_dim**-0.5,
                context.view(-1, heads, head_dim),
            )
            if read is not None and layer is self.layers[-1]:
                context, x = context.index_select(0, read), x.index_select(0, read)
            total = self.buffers.room("attention_total", x, config.hidden_size)
            x = self._add_norm(context, layer.attention_output, x, layer.attention_norm, total)
            wide = self.buffers.room("intermediate", x, layer.intermediate.width)
            linear(machine, x, layer.intermediate.weight, layer.intermediate.bias, wide, activation=config.activation)
            # What is returned is the caller's; what the next layer reads is read no more when that writes its own.
            total = (
                torch.empty_like(x) if layer is self.layers[-1] else self.buffers.room("total", x, config.hidden_size)
            )
            x = self._add_norm(wide, layer.output, x, layer.output_norm, total)
        return x

    def _add_norm(
        self, x: Tensor, product: _Product, residual: Tensor, norm: tuple[Tensor, Tensor, float], total: Tensor
    ) -> Tensor:
        from fastbert.native.linear import linear
        from fastbert.native.row_wise import row_wise

        linear(self.machine, x, product.weight, product.bias, total, residual=residual)
        row_wise(self.machine, total, norm=norm, out=total)
        return total


def lay_out(encoder: Encoder, x: Tensor) -> LaidOutEncoder:
    """`encoder` for inputs as `x`, for which it `serves`."""
    machine = native_machine(x)
    assert machine is not None
    layers = [
        _Layer(
            qkv=_Product.of(layer.qkv),
            attention_output=_Product.of(layer.attention_output),
            attention_norm=in_float32(layer.attention_norm),
            intermediate=_Product.of(layer.intermediate),
            output=_Product.of(layer.output),
            output_norm=in_float32(layer.output_norm),
        )
        for layer in cast(list[EncoderLayer], list(encoder.layers))
    ]
    return LaidOutEncoder(machine, encoder.config, layers)
