"""`fastbert.quantize`: a model whose encoders multiply in fp8, for inference.

A layer's four products take e4m3 on both sides: weights with a scale for each output channel, activations with a scale
for each token. LayerNorm and GELU write their results quantized. Attention's output is quantized by a kernel of its
own, because a token's scale spans the heads, and a program of attention owns one head. Residuals, LayerNorm, attention
and the heads of a model compute as before.
"""

from __future__ import annotations

import copy
from typing import Literal, NoReturn, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import reference
from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder, EncoderLayer
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import launch, target
from fastbert.ops.attention import attention
from fastbert.ops.common import wants_gradient
from fastbert.ops.quantize_rows import (
    QuantizedRows,
    bias_gelu_quantize,
    layer_norm_quantize,
    linear_quantized,
    quantize_rows,
)
from fastbert.packing import Packing

QuantizedDType = Literal["fp8"]
Model = TypeVar("Model", bound=nn.Module)


def quantize(model: Model, *, dtype: QuantizedDType) -> Model:
    """A copy of `model`, for inference, whose fastbert encoders multiply in 8 bits. All but their matrices is shared.

    It runs on NVIDIA GPUs from sm_89 on, in bfloat16. On a CPU it computes the same numbers slowly, to test accuracy.

    Args:
        model: any module with a `fastbert.Encoder` in it, in eval mode.
        dtype: "fp8" for e4m3.

    Raises:
        ArgumentError: `dtype` is not known; or `model` has no encoder, is in training mode, or has widths that are not
            multiples of 16.
        BackendError: the GPU can't, or the model is not in bfloat16 there; also later, where the copy was moved to one
            that can't, or a gradient is asked for.
    """
    if dtype not in get_args(QuantizedDType):
        raise ArgumentError("dtype", repr(dtype), "'fp8'")
    if model.training:
        raise ArgumentError("model", "a model in training mode", "one in eval mode", "Call model.eval() first.")
    made: Model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    encoders = {name: part for name, part in made.named_modules() if type(part) is Encoder}
    if not encoders:
        raise ArgumentError("model", type(model).__name__, "a module with a fastbert.Encoder in it")
    for name, encoder in encoders.items():
        _check_config(encoder.config)
        for parameter in encoder.parameters():
            _check_device(parameter)
        if name == "":
            return QuantizedEncoder(encoder)  # type: ignore[return-value]  # the model is the encoder
        made.set_submodule(name, QuantizedEncoder(encoder))
    return made


def _check_config(config: EncoderConfig) -> None:
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(config, name)
        if width % 16:
            raise ArgumentError(name, width, "a multiple of 16, which products in fp8 need")


def _check_device(x: Tensor) -> None:
    """Raise BackendError unless the device of `x` multiplies in fp8 and writes its dtype."""
    unserved = launch.fp8_unserved(x.dtype, target.of(x.device))
    if unserved is not None:
        raise BackendError("quantize", unserved, "a bfloat16 model on an NVIDIA GPU from sm_89 on, or on the CPU")


class QuantizedLinear(nn.Module):
    """The weight of an `nn.Linear` in e4m3, and its bias as it was."""

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scale = reference.quantize_rows(linear.weight.detach().float())
        # As integers, because `Module.to(dtype)` casts what is floating.
        self.register_buffer("values", values.view(torch.uint8))
        self.register_buffer("scale", scale.view(torch.int32))
        self.bias = linear.bias

    def forward(self, x: QuantizedRows, dtype: torch.dtype, *, add_bias: bool) -> Tensor:
        """`[rows, in]` -> `[rows, out]` in `dtype`."""
        weight = QuantizedRows(self.values.view(torch.float8_e4m3fn), self.scale.view(torch.float32))
        return linear_quantized(x, weight, self.bias if add_bias else None, dtype)


class QuantizedLayer(nn.Module):
    """An `EncoderLayer` whose products are in fp8."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.config = layer.config
        self.qkv = QuantizedLinear(layer.qkv)
        self.attention_output = QuantizedLinear(layer.attention_output)
        self.attention_norm = layer.attention_norm
        self.intermediate = QuantizedLinear(layer.intermediate)
        self.output = QuantizedLinear(layer.output)
        self.output_norm = layer.output_norm

    def forward(
        self, x: Tensor, quantized: QuantizedRows, packing: Packing, bias: Tensor | None, read: Tensor | None
    ) -> tuple[Tensor, QuantizedRows]:
        """As `EncoderLayer.forward`, with the input and the result quantized beside them."""
        config = self.config
        qkv = self.qkv(quantized, x.dtype, add_bias=True).view(-1, 3, config.num_heads, config.head_dim)
        context = attention(qkv, packing, bias=bias).flatten(1)
        if read is not None:
            context, x = context.index_select(0, read), x.index_select(0, read)
        x, quantized = _project_add_norm(quantize_rows(context), self.attention_output, x, self.attention_norm)
        return _project_add_norm(self._activate(quantized, x.dtype), self.output, x, self.output_norm)

    def _activate(self, x: QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
        match self.config.activation:
            case "gelu" | "gelu_tanh" as activation:
                product = self.intermediate(x, dtype, add_bias=False)
                approximate: reference.Approximate = "none" if activation == "gelu" else "tanh"
                return bias_gelu_quantize(product, self.intermediate.bias, approximate=approximate)
            case "relu":
                return quantize_rows(F.relu(self.intermediate(x, dtype, add_bias=True)))
            case "silu":
                return quantize_rows(F.silu(self.intermediate(x, dtype, add_bias=True)))


def _project_add_norm(
    x: QuantizedRows, linear: QuantizedLinear, residual: Tensor, norm: nn.LayerNorm
) -> tuple[Tensor, QuantizedRows]:
    product = linear(x, residual.dtype, add_bias=False)
    return layer_norm_quantize(product, norm.weight, norm.bias, residual=residual, x_bias=linear.bias, eps=norm.eps)


class QuantizedEncoder(Encoder):
    """An `Encoder` whose products are in fp8; made by `quantize`."""

    def __init__(self, encoder: Encoder) -> None:
        nn.Module.__init__(self)
        self.config = encoder.config
        self.layers = nn.ModuleList(QuantizedLayer(cast(EncoderLayer, layer)) for layer in encoder.layers)
        self.training = False

    def train(self, mode: bool = True) -> QuantizedEncoder:
        """Raise ArgumentError if `mode` is True."""
        if mode:
            raise ArgumentError("mode", mode, "False", "A quantized model can't be trained.")
        super().train(False)
        return self

    def to_hf_state_dict(self) -> NoReturn:
        """Raise ArgumentError: the weights are not Hugging Face's any more."""
        raise ArgumentError("encoder", "a quantized one", "the encoder that it was made of")

    def run(
        self,
        x: Tensor,
        packing: Packing,
        bias: Tensor | None = None,
        read: Tensor | None = None,
        *,
        unpack: bool = False,
    ) -> list[Tensor]:
        """As `Encoder.run`.

        Raises:
            BackendError: a gradient is asked for, or the device can't multiply in fp8.
        """
        if wants_gradient(x):
            raise BackendError("quantize", "a gradient asked for", "torch.no_grad() around it")
        _check_device(x)
        states = [x if read is None or len(self.layers) else x.index_select(0, read)]
        quantized = quantize_rows(x)
        for i, layer in enumerate(self.layers):
            x, quantized = layer(states[-1], quantized, packing, bias, read if i + 1 == len(self.layers) else None)
            states.append(x)
        if unpack:
            states[-1] = packing.unpack(states[-1])
        return states
