"""`fastbert.quantize`: a model whose encoders multiply in 8 bits, for inference: fp8 on a GPU, int8 on a CPU.

In fp8 a layer's four products take e4m3 on both sides: weights with a scale for each output channel, activations with a
scale for each token. LayerNorm and GELU write their results quantized. Attention's output is quantized by a kernel of
its own, because a token's scale spans the heads, and a program of attention owns one head.

In int8 weights have a scale for each output channel, activations a scale and a zero point for each token; sums are
exact, in int32. A product and all that follows it, to the next one's int8, is one kernel.

Residuals, LayerNorm, attention and the heads of a model compute as before.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from fastbert.backend import int8_unserved
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.model.encoder import Encoder
from fastbert.model.layer import Layer
from fastbert.run.eight_bits import EightBitLinear, Fp8Linear, Int8Linear
from fastbert.run.parts import SelfAttention, weights

QuantizedDType = Literal["fp8", "int8"]
Model = TypeVar("Model", bound=nn.Module)

KINDS: dict[QuantizedDType, type[EightBitLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}


def quantize(model: Model, *, dtype: QuantizedDType | None = None) -> Model:
    """A copy of `model`, for inference, whose fastbert encoders multiply in 8 bits. All but their matrices is shared.

    Args:
        model: any module with a `fastbert.Encoder` in it, in eval mode.
        dtype: "int8" runs on a CPU, by kernels where it has AVX2 or AVX-512, fastest with VNNI; elsewhere it is slower
            than float32, with a warning. float32 rounds the least beside it.
            "fp8", for e4m3, runs on NVIDIA GPUs from sm_89 on, in bfloat16; on a CPU it computes the same numbers
            slowly, to test accuracy. By default what the device of the model runs fast: int8 on a CPU, else fp8.

    Raises:
        ArgumentError: `dtype` is not known; or `model` has no encoder, is in training mode, or has widths that are not
            multiples of 16 (fp8).
        BackendError: the device can't, or the model is not in bfloat16 (fp8 on a GPU); also later, where the copy was
            moved to one that can't, or a gradient is asked for.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", f"a {type(model).__name__}", "a module with a fastbert.Encoder in it")
    if dtype is None:
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        dtype = "int8" if on_cpu else "fp8"
    if dtype not in get_args(QuantizedDType):
        raise ArgumentError("dtype", repr(dtype), "'fp8' or 'int8'")
    if model.training:
        raise ArgumentError("model", "a model in training mode", "one in eval mode", "Call model.eval() first.")
    if dtype == "int8":
        _warn_of_int8(model)
    kind = KINDS[dtype]
    return _replaced(model, kind, lambda part, weight, bias: kind(weight, bias))


def with_scales(model: Model, scales: Mapping[str, Tensor]) -> Model:
    """`quantize` to int8 of weights that are whole numbers times known scales; the whole numbers stay what they are.

    Args:
        model: in eval mode.
        scales: of each weight that the layers of its encoder multiply by, by its name: float32 `[out]`.

    Raises:
        ArgumentError: a weight has none; else as `quantize`.
        BackendError: as `quantize`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _warn_of_int8(model)

    def make(part: nn.Module, weight: Tensor, bias: Tensor | None) -> EightBitLinear:
        mine = [names[id(one)] for one in own_weights(part)]
        if lacking := [name for name in mine if name not in scales]:
            raise ArgumentError("scales", f"none for {lacking[0]}", "one for each weight of the layers")
        return Int8Linear(weight, bias, torch.cat([scales[name] for name in mine]))

    return _replaced(model, Int8Linear, make)


def _warn_of_int8(model: nn.Module) -> None:
    if (slow := int8_unserved(next(model.parameters()).device)) is not None:
        warnings.warn(f"int8 is slower than float32 here: {slow}", stacklevel=3)


def _replaced(
    model: Model, kind: type[EightBitLinear], make: Callable[[nn.Module, Tensor, Tensor | None], EightBitLinear]
) -> Model:
    """A copy of a model, with what `make` gives of each linear part of its encoders, its weight and its bias."""
    parts = model.named_modules()
    encoders = {name: part for name, part in parts if type(part) is Encoder and part.in_eight_bits() is None}
    if not encoders:
        raise ArgumentError("model", type(model).__name__, "a module with a fastbert.Encoder in it")
    copies: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for name, encoder in encoders.items():
        if kind is Fp8Linear:
            _check_config(encoder.config)
        for parameter in encoder.parameters():
            kind.check_device(parameter)
        if encoder.is_frozen():
            raise ArgumentError(name or "model", "a frozen model", "one that was loaded without frozen=True")
        if not encoder.is_plain():
            got = "modules other than nn.Linear and nn.LayerNorm, or with hooks, or dropout that is on"
            raise ArgumentError(name or "model", got, "plain ones", "Merge adapters, and remove hooks, first.")
        for part in multiplied(encoder):
            weight, bias = weights(part)
            if bias is not None and not isinstance(bias, nn.Parameter):  # that of a SelfAttention
                bias = nn.Parameter(bias.detach().clone())
            copies[id(part)] = make(part, weight, bias)
    return copy.deepcopy(model, copies)


def multiplied(encoder: Encoder) -> Iterator[nn.Module]:
    """The linear parts of each layer, those of a SelfAttention as one."""
    for layer in encoder.layer:
        yield from (part for part in cast(Layer, layer).parts().values() if not isinstance(part, nn.LayerNorm))


def own_weights(part: nn.Module) -> list[nn.Parameter]:
    """The parameters that are the weight of a linear part, one after another."""
    linears = part.linears() if isinstance(part, SelfAttention) else [part]
    return [cast(nn.Parameter, linear.weight) for linear in linears]


def in_int8(encoder: Encoder) -> bool:
    """Whether `quantize` made it, for int8."""
    return isinstance(encoder.in_eight_bits(), Int8Linear)


def _check_config(config: EncoderConfig) -> None:
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(config, name)
        if width % 16:
            raise ArgumentError(name, width, "a multiple of 16, which products in fp8 need")
