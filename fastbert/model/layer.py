"""One encoder layer over packed tokens. Its modules have Hugging Face's names, so that what is said by name holds.

State dicts, PEFT, freezing, optimizer groups and hooks name modules and parameters as in a transformers `BertLayer`.
What it computes is said by its steps (`run.steps`), which executors read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.config import Convolution, Disentangled, EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.model.masks import read_mask
from fastbert.packing import Packing
from fastbert.run import eager, prepared
from fastbert.run.eager import Registers
from fastbert.run.eight_bits import EightBitLinear
from fastbert.run.parts import Group, SelfAttention, in_eight_bits, is_plain, linears_of
from fastbert.run.steps import OWN, PROJECTIONS, Parts, Product, Steps, layer_steps


class Output(Group):
    """The modules of a product that ends in a residual sum and a LayerNorm."""

    def __init__(self, inputs: int, config: EncoderConfig, part: str) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size, bias=part not in config.no_bias)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.eps, bias=config.norm_bias)
        self.dropout = nn.Dropout(config.hidden_dropout) if part in config.dropped else nn.Identity()


class Attention(Group):
    """The modules of attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config, "attention_output")
        if config.disentangled is not None:
            self.position_dropout = nn.Dropout(config.hidden_dropout)
            for term in () if config.disentangled.shared else config.disentangled.terms:
                self.add_module(PROJECTIONS[term], nn.Linear(config.hidden_size, config.hidden_size))


class Intermediate(Group):
    """The module of the first product of the feed-forward."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        columns = config.intermediate_size * (2 if config.gated else 1)
        self.dense = nn.Linear(config.hidden_size, columns, bias="intermediate" not in config.no_bias)
        self.dropout = nn.Dropout(config.hidden_dropout) if "intermediate" in config.dropped else None


class ConvolutionGroup(Group):
    """The modules of the convolution after the first layer."""

    def __init__(self, asked: Convolution, config: EncoderConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, asked.width
        self.conv = nn.Conv1d(hidden, hidden, width, padding=width // 2, groups=asked.groups)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.eps, bias=config.norm_bias)
        self.dropout = nn.Dropout(config.hidden_dropout)


class Layer(nn.Module, ABC):
    """A layer that is computed by its steps.

    Attributes:
        steps: what it computes.
        gradient_checkpointing: whether the forward pass is computed again in the backward pass, by
            `_gradient_checkpointing_func`; transformers' `gradient_checkpointing_enable()` sets both.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Its modules by their names in the steps."""

    @abstractmethod
    def dropouts(self) -> tuple[float, ...]:
        """Probabilities of the steps that drop, in their order, 0 where a dropout is off.

        Raises:
            ArgumentError: a dropout module was replaced by another kind.
        """

    def is_plain(self) -> bool:
        """Whether ops may read the weights of its products, in 8 bits too, and their norms; see `parts.is_plain`."""
        parts, products = self.parts(), [step for step in self.steps.of if isinstance(step, Product)]
        read = [parts[name] for step in products for name in (step.part, step.norm) if name is not None]
        return all(is_plain(part) or in_eight_bits(part) for part in read)

    def in_eight_bits(self) -> EightBitLinear | None:
        """The first of its linear layers that multiplies in 8 bits, which all do or none."""
        first = linears_of(self.parts()["qkv"])[0]
        return first if isinstance(first, EightBitLinear) else None

    def multiplied(self) -> Iterator[nn.Module]:
        """The modules with the weights of its products."""
        parts = self.parts()
        for step in self.steps.of:
            yield from linears_of(parts[step.part]) if isinstance(step, Product) else ()

    def quantized(self, make: Callable[[nn.Module], EightBitLinear]) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each of `multiplied`, which are plain, and what `make` gives to take its place."""
        for linear in self.multiplied():
            yield linear, make(linear)

    def forward(
        self,
        x: Tensor,
        attention_mask: Packing | Tensor | None,
        bias: Tensor | None = None,
        seeds: Tensor | None = None,
        read: Tensor | None = None,
        unpack: bool = False,
        registers: Registers | None = None,
    ) -> Tensor:
        """`[rows, hidden]` -> `[rows, hidden]`; or `[batch, seqlen, hidden]`, as a transformers `BertLayer`'s.

        Args:
            attention_mask: the packing of packed rows; of padded ones it, or any form in `masks.read_mask`.
            bias: added to the attention scores; see `ops.attention`.
            seeds: int64 `[steps.drops]`, one seed for each dropout; None when dropout is off.
            read: int64 `[reads]`, the rows of the output that are wanted; all by default. All rows are attended to, but
                only these go through what comes after attention. The hidden dropouts then draw for these rows alone.
            unpack: give the output in the padded layout; not together with `read`.
            registers: what the layer before left, `x` among it; written.

        Returns:
            `[rows, hidden]`, or `[reads, hidden]`: the rows that the whole output would have there; unpacked
            `[batch, seqlen, hidden]`.
        """
        packing = attention_mask
        if x.dim() == 3:
            if not isinstance(packing, Packing):
                packing, bias = read_mask(packing, x.shape[0], x.shape[1], x.device)
            x, unpack = packing.pack(x), True
        if not isinstance(packing, Packing):
            raise ArgumentError("attention_mask", type(packing).__name__, "the Packing of these packed rows")
        registers = Registers({}) if registers is None else registers
        registers.floats["x"] = x  # which a hook of torch.distributed's may have replaced
        for name in self.steps.carried:
            if name not in registers.floats:
                raise ArgumentError("registers", f"no {name}", f"{name} in them: its encoder calls this layer")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            carried = [registers.floats[name] for name in self.steps.carried]
            made = self._checkpoint()(self._run_again, packing, bias, seeds, read, unpack, *carried)
            registers.floats = dict(zip(self.steps.carried, made, strict=True))
            return registers.floats["x"]
        return self._run(registers, packing, bias, seeds, read, unpack)

    def _run_again(
        self,
        packing: Packing,
        bias: Tensor | None,
        seeds: Tensor | None,
        read: Tensor | None,
        unpack: bool,
        *carried: Tensor,
    ) -> tuple[Tensor, ...]:
        """As `_run`, of and to tensors, which those look at that compute it again."""
        registers = Registers(dict(zip(self.steps.carried, carried, strict=True)))
        self._run(registers, packing, bias, seeds, read, unpack)
        return tuple(registers.floats[name] for name in self.steps.carried)

    def _checkpoint(self) -> Callable[..., Any]:
        if self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func
        from functools import partial

        from torch.utils.checkpoint import checkpoint

        return partial(checkpoint, use_reentrant=False)

    def _run(
        self,
        registers: Registers,
        packing: Packing,
        bias: Tensor | None,
        seeds: Tensor | None,
        read: Tensor | None,
        unpack: bool,
    ) -> Tensor:
        steps, parts = self.steps, self.parts()
        bare = bias is None and seeds is None and read is None and not unpack
        if bare and prepared.run(steps, parts, registers, packing):
            backend.take("prepared")
            return registers.floats["x"]
        backend.take("eager")
        dropouts = () if seeds is None else tuple(zip(self.dropouts(), seeds.split(1), strict=True))
        return eager.run(steps, parts, registers, packing, bias=bias, dropouts=dropouts, read=read, unpack=unpack)


class EncoderLayer(Layer):
    """One layer: attention, then the feed-forward, each followed by residual + LayerNorm.

    Where a LayerNorm comes first, those of this layer are that before the feed-forward and that before what follows.

    Args:
        config: of the encoder.
        i: its number.
        shared: the parts that all layers share, by their names: those of tables of distances.
    """

    def __init__(self, config: EncoderConfig, i: int = 0, shared: Parts | None = None) -> None:
        super().__init__(layer_steps(config, i))
        self.config = config
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config, "output")
        if config.convolution is not None and i == 0:
            self.convolution = ConvolutionGroup(config.convolution, config)
        for name, part in (shared or {}).items():
            self.add_module(name, part)

    def parts(self) -> dict[str, nn.Module]:
        """Its modules by their names in the steps, without nn.Module's slow way to an attribute."""
        modules: dict[str, Any] = self._modules
        attention, output = modules["attention"]._modules, modules["output"]._modules
        projected = attention["output"]._modules
        parts: dict[str, nn.Module] = {
            "qkv": attention["self"],
            "attention_output": projected["dense"],
            "attention_norm": projected["LayerNorm"],
            "intermediate": modules["intermediate"]._modules["dense"],
            "output": output["dense"],
            "output_norm": output["LayerNorm"],
        }
        if "convolution" in modules:
            of_convolution = modules["convolution"]._modules
            parts |= {"convolution": of_convolution["conv"], "convolution_norm": of_convolution["LayerNorm"]}
        if "relative" in modules:
            parts["relative"] = modules["relative"]
            if self.config.disentangled is not None:
                parts |= self._of_positions(self.config.disentangled)
        return parts

    def _of_positions(self, asked: Disentangled) -> dict[str, nn.Module]:
        """The parts of `Attend.disentangled` but the table."""
        modules: dict[str, Any] = self._modules
        attention = modules["attention"]._modules
        parts: dict[str, nn.Module] = {"relative_norm": modules["relative_norm"]} if asked.normalised else {}
        for term in asked.terms:
            name = PROJECTIONS[term]
            parts[name] = attention["self"]._modules[OWN[term]] if asked.shared else attention[name]
        return parts

    def dropouts(self) -> tuple[float, ...]:
        """In the order of its steps; of relative positions, the activation and a convolution where it has such ones."""
        modules: dict[str, Any] = self._modules
        attention, intermediate = modules["attention"]._modules, modules["intermediate"]._modules
        places = [attention["self"]._modules["dropout"], attention["output"]._modules["dropout"]]
        if self.config.disentangled is not None:
            places.insert(1, attention["position_dropout"])
        if (of_activation := intermediate.get("dropout")) is not None:
            places.append(of_activation)
        places.append(modules["output"]._modules["dropout"])
        if "convolution" in modules:
            places.append(modules["convolution"]._modules["dropout"])
        return tuple(map(probability, places))


def probability(dropout: nn.Module | None) -> float:
    """With which a dropout module drops; 0 where it is off.

    Raises:
        ArgumentError: it is of another kind.
    """
    if type(dropout) is nn.Dropout:
        return dropout.p if dropout.training else 0.0
    if isinstance(dropout, nn.Identity):
        return 0.0
    raise ArgumentError("dropout", type(dropout).__name__, "nn.Dropout, or nn.Identity for none")
