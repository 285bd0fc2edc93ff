"""The encoder laid out once for the kernels of this CPU, and run by them with nothing asked in between.

Models make it inside `ops.linear.hold_weights`. Where these products are not the fastest, they make `folding`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder, EncoderLayer
from fastbert.native.layout import laid_out_together
from fastbert.native.machine import Machine, multiplies_well
from fastbert.ops.common import native_machine, runs_bare
from fastbert.ops.layer_norm import in_float32
from fastbert.ops.linear import Buffers
from fastbert.packing import Packing

if TYPE_CHECKING:
    from fastbert.native.code import Launch, Program

# Tokens: BERT's longest sequence. Up to it the way from launch to launch is worth being prepared.
SHORT = 512
# Of so many sizes.
KEPT_RUNS = 64


def serves(encoder: Encoder, x: Tensor) -> bool:
    """Whether it is meant for a run of `encoder` on `x`: a CPU whose kernels multiply well, no gradient, no dropout."""
    bare = not torch.is_grad_enabled() and runs_bare(x)  # first, for torch.compile, which can't read what follows
    if not bare or encoder.training or type(encoder) is not Encoder or not multiplies_well():
        return False
    config = encoder.config
    whole = config.head_dim % 8 == 0 and config.intermediate_size * x.itemsize % 4 == 0
    return whole and len(x) > 0 and config.num_layers > 0 and native_machine(x) is not None


@dataclass(frozen=True, eq=False)
class _Product:
    """A linear layer: its weight as `native.layout.laid_out` gives it, its bias, and how many numbers it makes."""

    weight: Tensor
    bias: Tensor
    width: int


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
class _Run:
    """A `Program` and the memory it is tied to.

    Attributes:
        x, cu_seqlens: what it reads, to be filled before it runs.
        out: what it writes.
    """

    x: Tensor
    cu_seqlens: Tensor
    out: Tensor
    program: Program


class _Runs(threading.local):
    """The runs of little text that were used last, by their sizes; each thread has its own."""

    def __init__(self) -> None:
        self._of_sizes: dict[tuple[int, ...], _Run] = {}

    def get(self, sizes: tuple[int, ...], make: Callable[[], _Run]) -> _Run:
        run = self._of_sizes.pop(sizes, None) or make()
        self._of_sizes[sizes] = run  # as the last one
        if len(self._of_sizes) > KEPT_RUNS:
            del self._of_sizes[next(iter(self._of_sizes))]
        return run


@dataclass(frozen=True, eq=False)
class LaidOutEncoder:
    """An encoder's weights, laid out by `lay_out`. It does not see them change."""

    machine: Machine
    config: EncoderConfig
    layers: list[_Layer]
    buffers: Buffers = field(default_factory=Buffers)
    runs: _Runs = field(default_factory=_Runs)

    def run(self, x: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """The last of what `Encoder.run` returns for these arguments."""
        from fastbert.native.code import Program

        if read is None and len(x) == packing.tokens <= SHORT:
            return self._run_again(x, packing)
        context = self.buffers.room("context", x, self.config.hidden_size)
        context[packing.tokens :] = 0
        launches, states = self._before_last_transform(x, packing.cu_seqlens, packing.max_seqlen)
        if read is not None:
            Program(launches).run()
            launches, context, states = [], context.index_select(0, read), states.index_select(0, read)
        out = torch.empty_like(states)
        Program(launches + self._transform(self.layers[-1], context, states, out)).run()
        return out

    def _run_again(self, x: Tensor, packing: Packing) -> Tensor:
        """`run` of little text: what was prepared for the same sizes is a single call."""
        sizes = len(x), packing.batch, packing.max_seqlen, torch.get_num_threads()
        run = self.runs.get(sizes, lambda: self._prepared(x, packing))
        run.x.copy_(x)
        run.cu_seqlens.copy_(packing.cu_seqlens)
        run.program.run()
        return run.out.clone()

    def _prepared(self, x: Tensor, packing: Packing) -> _Run:
        from fastbert.native.code import Program

        with torch.inference_mode(False):  # what is made inside could not be written to outside
            own, cu_seqlens, out = torch.empty_like(x), torch.empty_like(packing.cu_seqlens), torch.empty_like(x)
        context = self.buffers.room("context", x, self.config.hidden_size)
        launches, states = self._before_last_transform(own, cu_seqlens, packing.max_seqlen)
        return _Run(own, cu_seqlens, out, Program(launches + self._transform(self.layers[-1], context, states, out)))

    def _before_last_transform(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[list[Launch], Tensor]:
        """All up to the last layer's attention, which is left in "context"; and the input of that layer."""
        states, context = (self.buffers.room(name, x, self.config.hidden_size) for name in ("states", "context"))
        launches = []
        for layer in self.layers[:-1]:
            launches += [*self._attend(layer, x, cu_seqlens, max_seqlen), *self._transform(layer, context, x, states)]
            x = states
        return launches + self._attend(self.layers[-1], x, cu_seqlens, max_seqlen), x

    def _attend(self, layer: _Layer, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Launch]:
        """From x to "context"."""
        from fastbert.native.attention import attention_forward
        from fastbert.native.linear import linear

        heads, head_dim = self.config.num_heads, self.config.head_dim
        qkv = self.buffers.room("qkv", x, layer.qkv.width)
        context = self.buffers.room("context", x, self.config.hidden_size).view(-1, heads, head_dim)
        of_heads = qkv.view(-1, 3, heads, head_dim)
        return [
            linear(self.machine, x, layer.qkv.weight, layer.qkv.bias, qkv),
            attention_forward(self.machine, of_heads, cu_seqlens, max_seqlen, head_dim**-0.5, context),
        ]

    def _transform(self, layer: _Layer, context: Tensor, x: Tensor, out: Tensor) -> list[Launch]:
        """What follows attention; `out` may be `x`."""
        from fastbert.native.linear import linear

        machine, intermediate = self.machine, layer.intermediate
        attended = self.buffers.room("attended", x, self.config.hidden_size)
        wide = self.buffers.room("wide", x, intermediate.width)
        activation = self.config.activation
        return [
            *self._add_norm(context, layer.attention_output, x, layer.attention_norm, attended),
            linear(machine, attended, intermediate.weight, intermediate.bias, wide, activation=activation),
            *self._add_norm(wide, layer.output, attended, layer.output_norm, out),
        ]

    def _add_norm(
        self, x: Tensor, product: _Product, residual: Tensor, norm: tuple[Tensor, Tensor, float], out: Tensor
    ) -> list[Launch]:
        from fastbert.native.linear import linear
        from fastbert.native.row_wise import row_wise

        return [
            linear(self.machine, x, product.weight, product.bias, out, residual=residual),
            row_wise(self.machine, out, norm=norm, out=out),
        ]


def lay_out(encoder: Encoder, x: Tensor) -> LaidOutEncoder:
    """`encoder` for inputs as `x`, for which it `serves`."""
    machine = native_machine(x)
    assert machine is not None
    layers = cast(list[EncoderLayer], list(encoder.layers))
    linears = [
        linear for layer in layers for linear in (layer.qkv, layer.attention_output, layer.intermediate, layer.output)
    ]
    weights = laid_out_together([linear.weight for linear in linears])
    products = iter(
        [
            _Product(weight, linear.bias.detach().contiguous(), linear.out_features)
            for weight, linear in zip(weights, linears, strict=True)
        ]
    )
    return LaidOutEncoder(
        machine,
        encoder.config,
        [
            _Layer(
                qkv=next(products),
                attention_output=next(products),
                attention_norm=in_float32(layer.attention_norm),
                intermediate=next(products),
                output=next(products),
                output_norm=in_float32(layer.output_norm),
            )
            for layer in layers
        ],
    )
