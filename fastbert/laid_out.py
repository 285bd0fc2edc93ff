"""The encoder laid out once for the kernels of this CPU, and run by them with nothing asked in between.

Models make it inside `ops.linear.hold_weights`. Where its products of floats are not the fastest, they make
`folding`'s.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastbert.encoder import Encoder
from fastbert.layer import EncoderLayer
from fastbert.native.int8 import Int8Rows
from fastbert.native.layout import laid_out_together
from fastbert.native.machine import Machine, multiplies_well
from fastbert.native.memory import room
from fastbert.ops.attention import WIDEST_HEAD
from fastbert.ops.common import native_machine, runs_bare
from fastbert.ops.layer_norm import in_float32
from fastbert.ops.linear import Buffers
from fastbert.packing import Packing
from fastbert.quantization import Int8Layer, Int8Linear, QuantizedEncoder, attention_dtype

if TYPE_CHECKING:
    from fastbert.native.code import Launch, Program

# Tokens up to which a run is worth being kept: there Python would take a twentieth of its time or more.
SHORT = 256
# So many sizes are; each holds its input and its result.
KEPT_RUNS = 32


def serves(encoder: Encoder, x: Tensor) -> bool:
    """Whether it is meant for a run of `encoder` on `x`: a CPU whose kernels multiply well, no gradient, no dropout."""
    bare = not torch.is_grad_enabled() and runs_bare(x)  # first, for torch.compile, which can't read what follows
    if not bare or encoder.training or len(x) == 0 or not encoder.layer or not encoder.is_plain():
        return False
    machine, config = native_machine(x), encoder.config
    if machine is None or config.head_dim > WIDEST_HEAD:
        return False
    if isinstance(encoder, QuantizedEncoder):
        whole = config.hidden_size % 4 == 0 and config.intermediate_size % 4 == 0
        return encoder.dtype == "int8" and machine.int8 and whole
    whole = config.intermediate_size * x.itemsize % 4 == 0
    return type(encoder) is Encoder and whole and multiplies_well()


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


class LaidOut(ABC):
    """An encoder whose weights lie as the kernels take them. It does not see them change."""

    def __init__(self, machine: Machine, encoder: Encoder) -> None:
        self.machine, self.config, self.num_layers = machine, encoder.config, len(encoder.layer)
        self.buffers, self.runs = Buffers(), _Runs()

    def run(self, x: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """The last of what `Encoder.run` returns for these arguments."""
        from fastbert.native.code import Program

        packing.check_rows("x", x)
        if read is None and len(x) == packing.tokens <= SHORT:
            return self._run_again(x, packing)
        context = self._context(x)
        context[packing.tokens :] = 0
        launches, states = self._before_last_transform(x, packing.cu_seqlens, packing.max_seqlen)
        if read is not None:
            Program(launches).run()
            launches, context, states = [], context.index_select(0, read), states.index_select(0, read)
        out = room(states.shape, states.dtype)
        Program(launches + self._transform(self.num_layers - 1, context, states, out)).run()
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
            own, out = room(x.shape, x.dtype), room(x.shape, x.dtype)
            cu_seqlens = room(packing.cu_seqlens.shape, torch.int32)
        launches, states = self._before_last_transform(own, cu_seqlens, packing.max_seqlen)
        launches += self._transform(self.num_layers - 1, self._context(x), states, out)
        return _Run(own, cu_seqlens, out, Program(launches))

    def _before_last_transform(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[list[Launch], Tensor]:
        """All up to the last layer's attention, which is left in `_context`; and the input of that layer."""
        from fastbert.native.attention import attention_forward

        machine, config = self.machine, self.config
        states, context = self.buffers.room("states", x, config.hidden_size), self._context(x)
        qkv = self.buffers.room("qkv", x, 3 * config.hidden_size, context.dtype)
        heads = qkv.view(-1, 3, config.num_heads, config.head_dim)
        contexts, scale = context.view(-1, config.num_heads, config.head_dim), config.head_dim**-0.5
        launches = []
        for layer in range(self.num_layers):
            if layer > 0:
                launches += self._transform(layer - 1, context, x, states)
                x = states
            launches += self._project(layer, x, qkv)
            launches.append(attention_forward(machine, heads, cu_seqlens, max_seqlen, scale, contexts))
        return launches, x

    def _context(self, x: Tensor) -> Tensor:
        """Where attention leaves its result."""
        return self.buffers.room("context", x, self.config.hidden_size, self._attention_dtype(x))

    @abstractmethod
    def _attention_dtype(self, x: Tensor) -> torch.dtype:
        """Of queries, keys and values."""

    @abstractmethod
    def _project(self, layer: int, x: Tensor, qkv: Tensor) -> list[Launch]:
        """From a layer's input to its queries, keys and values."""

    @abstractmethod
    def _transform(self, layer: int, context: Tensor, x: Tensor, out: Tensor) -> list[Launch]:
        """What follows a layer's attention; `out` may be `x`."""


@dataclass(frozen=True, eq=False)
class _Product:
    """A linear layer: its weight as `native.layout.laid_out` gives it, and its bias."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class _Layer:
    """An `EncoderLayer`'s parts under their names; of a norm weight and bias in float32, and eps."""

    qkv: _Product
    attention_output: _Product
    attention_norm: tuple[Tensor, Tensor, float]
    intermediate: _Product
    output: _Product
    output_norm: tuple[Tensor, Tensor, float]


class LaidOutEncoder(LaidOut):
    """An `Encoder`, in float32 or bfloat16."""

    def __init__(self, machine: Machine, encoder: Encoder) -> None:
        super().__init__(machine, encoder)
        layers = cast(list[EncoderLayer], list(encoder.layer))
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for layer in layers:
            parts = cast(Any, layer.parts())
            linears = parts.attention_output, parts.intermediate, parts.output
            weight, bias = layer.attention.self.joined()
            weights += [weight, *(linear.weight for linear in linears)]
            biases += [bias, *(linear.bias for linear in linears)]
        biases = [bias.detach().contiguous() for bias in biases]
        products = iter(
            [_Product(*both) for both in zip(laid_out_together(weights, machine.columns), biases, strict=True)]
        )
        self.layers = [
            _Layer(
                qkv=next(products),
                attention_output=next(products),
                attention_norm=in_float32(parts.attention_norm),
                intermediate=next(products),
                output=next(products),
                output_norm=in_float32(parts.output_norm),
            )
            for parts in (cast(Any, layer.parts()) for layer in layers)
        ]

    def _attention_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def _project(self, layer: int, x: Tensor, qkv: Tensor) -> list[Launch]:
        from fastbert.native.linear import linear

        product = self.layers[layer].qkv
        return [linear(self.machine, x, product.weight, product.bias, qkv)]

    def _transform(self, layer: int, context: Tensor, x: Tensor, out: Tensor) -> list[Launch]:
        from fastbert.native.linear import linear

        machine, config, parts = self.machine, self.config, self.layers[layer]
        attended = self.buffers.room("attended", x, config.hidden_size)
        wide = self.buffers.room("wide", x, config.intermediate_size)
        product = parts.intermediate
        return [
            *self._add_norm(context, parts.attention_output, x, parts.attention_norm, attended),
            linear(machine, attended, product.weight, product.bias, wide, activation=config.activation),
            *self._add_norm(wide, parts.output, attended, parts.output_norm, out),
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


class LaidOutInt8Encoder(LaidOut):
    """A `QuantizedEncoder` in int8. A layer's input is there twice, the second time in int8."""

    def __init__(self, machine: Machine, encoder: QuantizedEncoder) -> None:
        super().__init__(machine, encoder)
        self.layers = [
            (layer, in_float32(layer.attention_norm), in_float32(layer.output_norm))
            for layer in cast(list[Int8Layer], list(encoder.layer))
        ]

    def _attention_dtype(self, x: Tensor) -> torch.dtype:
        return attention_dtype(x)

    def _project(self, layer: int, x: Tensor, qkv: Tensor) -> list[Launch]:
        from fastbert.native.row_wise import row_wise

        quantized = self._int8_room("states in int8", x, self.config.hidden_size)
        product = self._linear(self.layers[layer][0].qkv, quantized, out=qkv)
        return product if layer > 0 else [row_wise(self.machine, x, out_int8=quantized), *product]

    def _transform(self, layer: int, context: Tensor, x: Tensor, out: Tensor) -> list[Launch]:
        from fastbert.native.row_wise import row_wise

        config, (parts, attention_norm, output_norm) = self.config, self.layers[layer]
        attended = self.buffers.room("attended", x, config.hidden_size)
        contexts, attended_int8, states = (
            self._int8_room(name, x, config.hidden_size)
            for name in ("context in int8", "attended in int8", "states in int8")
        )
        wide = self._int8_room("wide", x, config.intermediate_size)
        return [
            row_wise(self.machine, context, out_int8=contexts),
            *self._linear(
                parts.attention_output, contexts, residual=x, norm=attention_norm, out=attended, out_int8=attended_int8
            ),
            *self._linear(parts.intermediate, attended_int8, activation=config.activation, out_int8=wide),
            *self._linear(parts.output, wide, residual=attended, norm=output_norm, out=out, out_int8=states),
        ]

    def _linear(self, linear: Int8Linear, x: Int8Rows, **after: Any) -> list[Launch]:
        from fastbert.native.linear_int8 import linear_int8

        return linear_int8(self.machine, x, linear.matrix, linear.bias.detach().float().contiguous(), **after)

    def _int8_room(self, name: str, x: Tensor, width: int) -> Int8Rows:
        values = self.buffers.room(name, x, width, torch.uint8)
        return Int8Rows(
            values, *(self.buffers.room(f"{name}: {part}", x, 1, torch.float32).view(-1) for part in ("scale", "zero"))
        )


def lay_out(encoder: Encoder, x: Tensor) -> LaidOut | None:
    """`encoder` for inputs as `x`, for which it `serves`; None where a parameter is no plain tensor."""
    machine = native_machine(x, *encoder.parameters())
    if machine is None:
        return None
    if isinstance(encoder, QuantizedEncoder):
        return LaidOutInt8Encoder(machine, encoder)
    return LaidOutEncoder(machine, encoder)
