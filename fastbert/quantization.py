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
from collections.abc import Callable
from typing import Any, Generic, Literal, NoReturn, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import backend, reference
from fastbert.backend import int8_unserved
from fastbert.config import Activation, EncoderConfig
from fastbert.encoder import Encoder
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import launch, target
from fastbert.layer import EncoderLayer
from fastbert.native.int8 import Int8Matrix, Int8Rows
from fastbert.ops import repeats
from fastbert.ops.attention import attention, prepare_attention
from fastbert.ops.common import native_machine, wants_gradient
from fastbert.ops.int8 import linear_int8, quantize_rows_int8
from fastbert.ops.layer_norm import in_float32
from fastbert.ops.quantize_rows import (
    QuantizedRows,
    bias_gelu_quantize,
    layer_norm_quantize,
    linear_quantized,
    prepare_bias_gelu_quantize,
    prepare_layer_norm_quantize,
    prepare_quantize_rows,
    quantize_rows,
)
from fastbert.packing import Packing

QuantizedDType = Literal["fp8", "int8"]
Model = TypeVar("Model", bound=nn.Module)
Quantized = TypeVar("Quantized", bound=nn.Module)


def quantize(model: Model, *, dtype: QuantizedDType | None = None) -> Model:
    """A copy of `model`, for inference, whose fastbert encoders multiply in 8 bits. All but their matrices is shared.

    Args:
        model: any module with a `fastbert.Encoder` in it, in eval mode.
        dtype: "int8" runs on a CPU, fast where it multiplies int8 (AVX512-VNNI), else slower than float32, with a
            warning; float32 rounds the least beside it.
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
    if dtype == "int8" and (slow := int8_unserved(next(model.parameters()).device)) is not None:
        warnings.warn(f"int8 is slower than float32 here: {slow}", stacklevel=2)
    encoders = {name: part for name, part in model.named_modules() if type(part) is Encoder}
    if not encoders:
        raise ArgumentError("model", type(model).__name__, "a module with a fastbert.Encoder in it")
    copies: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for name, encoder in encoders.items():
        if dtype == "fp8":
            _check_config(encoder.config)
        for parameter in encoder.parameters():
            _check_device(parameter, dtype)
        if not encoder.is_plain():
            got = "modules other than nn.Linear and nn.LayerNorm, or with hooks, or dropout that is on"
            raise ArgumentError(name or "model", got, "plain ones", "Merge adapters, and remove hooks, first.")
        copies[id(encoder)] = QuantizedEncoder(encoder, dtype)
    return copy.deepcopy(model, copies)


def in_int8(encoder: Encoder) -> bool:
    """Whether `quantize` made it, for int8."""
    return isinstance(encoder, QuantizedEncoder) and encoder.dtype == "int8"


def _check_config(config: EncoderConfig) -> None:
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(config, name)
        if width % 16:
            raise ArgumentError(name, width, "a multiple of 16, which products in fp8 need")


def _check_device(x: Tensor, dtype: QuantizedDType) -> None:
    """Raise BackendError unless the device of `x` multiplies so and writes its dtype."""
    if dtype == "int8":
        if x.device.type != "cpu":
            raise BackendError("quantize", f"a model on {x.device}", "one on the CPU, or dtype='fp8'")
        return
    unserved = launch.fp8_unserved(x.dtype, target.of(x.device))
    if unserved is not None:
        raise BackendError("quantize", unserved, "a bfloat16 model on an NVIDIA GPU from sm_89 on, or on the CPU")


class Fp8Linear(nn.Module):
    """The weight of an `nn.Linear` in e4m3, and its bias as it was."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        values, scale = reference.quantize_rows(weight.detach().float())
        # As integers, because `Module.to(dtype)` casts what is floating.
        self.register_buffer("values", values.view(torch.uint8))
        self.register_buffer("scale", scale.view(torch.int32))
        self.bias = bias

    def forward(self, x: QuantizedRows, dtype: torch.dtype, *, add_bias: bool) -> Tensor:
        """`[rows, in]` -> `[rows, out]` in `dtype`."""
        weight = QuantizedRows(self.values.view(torch.float8_e4m3fn), self.scale.view(torch.float32))
        return linear_quantized(x, weight, self.bias if add_bias else None, dtype)


class _QuantizedLayer(nn.Module, Generic[Quantized]):
    """An `EncoderLayer`'s parts under the names of `Parts`, its linear layers as `linear` makes them."""

    def __init__(self, layer: EncoderLayer, linear: Callable[[Tensor, Tensor], Quantized]) -> None:
        super().__init__()
        self.config = layer.config
        parts = cast(Any, layer.parts())
        weight, bias = layer.attention.self.joined()
        self.qkv = linear(weight, nn.Parameter(bias.detach().clone()))
        self.attention_output = linear(parts.attention_output.weight, parts.attention_output.bias)
        self.attention_norm = parts.attention_norm
        self.intermediate = linear(parts.intermediate.weight, parts.intermediate.bias)
        self.output = linear(parts.output.weight, parts.output.bias)
        self.output_norm = parts.output_norm


_APPROXIMATE: dict[Activation, reference.Approximate] = {"gelu": "none", "gelu_tanh": "tanh"}


class Fp8Layer(_QuantizedLayer[Fp8Linear]):
    """An `EncoderLayer` whose products are in fp8."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__(layer, Fp8Linear)

    def forward(
        self, x: Tensor, quantized: QuantizedRows, packing: Packing, bias: Tensor | None, read: Tensor | None
    ) -> tuple[Tensor, QuantizedRows]:
        """As `EncoderLayer.forward`, with the input and the result quantized beside them."""
        config = self.config
        if bias is None and read is None:
            prepared = self._run_prepared(x, quantized, packing)
            if prepared is not None:
                return prepared
        qkv = self.qkv(quantized, x.dtype, add_bias=True).view(-1, 3, config.num_heads, config.head_dim)
        context = attention(qkv, packing, bias=bias).flatten(1)
        if read is not None:
            context, x = context.index_select(0, read), x.index_select(0, read)
        x, quantized = _project_add_norm(quantize_rows(context), self.attention_output, x, self.attention_norm)
        return _project_add_norm(self._activate(quantized, x.dtype), self.output, x, self.output_norm)

    def _run_prepared(
        self, x: Tensor, quantized: QuantizedRows, packing: Packing
    ) -> tuple[Tensor, QuantizedRows] | None:
        """`forward` without options where the kernels serve all of it; else None. See `EncoderLayer._run_prepared`."""
        if backend.decide(x.device).path != "triton":
            return None
        config, modules = self.config, cast(dict[str, Any], self._modules)  # without nn.Module's slow ways
        linears = [modules[name] for name in ("qkv", "attention_output", "intermediate", "output")]
        norms = modules["attention_norm"], modules["output_norm"]
        options = config.num_heads, config.activation, *(norm.eps for norm in norms)
        weights: list[Any] = [linear._buffers[name] for linear in linears for name in ("values", "scale")]
        weights += [part._parameters["bias"] for part in (*linears, *norms)]
        weights += [norm._parameters["weight"] for norm in norms]
        kind = Fp8Layer, *options, *repeats.batch_kind(x, packing, config)
        states = x, *quantized, packing.cu_seqlens
        run = repeats.prepared(kind, states, tuple(weights), lambda: self._prepare(x, packing))
        return None if run is None else cast(tuple[Tensor, QuantizedRows], run(self, x, quantized, packing))

    def _prepare(self, x: Tensor, packing: Packing) -> repeats.Run | None:
        """`forward` without options as a function of a layer and its arguments; None: a kernel can't serve a part."""
        config, approximate = self.config, _APPROXIMATE.get(self.config.activation)
        heads, head_dim, dtype = config.num_heads, config.head_dim, x.dtype
        if approximate is None:
            return None
        attend = prepare_attention(x.new_empty((len(x), 3, heads, head_dim)), packing)
        quantize_context = prepare_quantize_rows(x)
        activate = prepare_bias_gelu_quantize(
            x.new_empty((len(x), config.intermediate_size)), self.intermediate.bias, approximate=approximate
        )
        add_context = prepare_layer_norm_quantize(x, x, self.attention_output.bias, eps=self.attention_norm.eps)
        add_output = prepare_layer_norm_quantize(x, x, self.output.bias, eps=self.output_norm.eps)
        if attend is None or quantize_context is None or activate is None or add_context is None or add_output is None:
            return None

        def run(layer: Fp8Layer, x: Tensor, quantized: QuantizedRows, packing: Packing) -> tuple[Tensor, QuantizedRows]:
            norm, output_norm = layer.attention_norm, layer.output_norm
            qkv = layer.qkv(quantized, dtype, add_bias=True).view(-1, 3, heads, head_dim)
            context = quantize_context(attend(qkv, packing).view(x.shape))
            product = layer.attention_output(context, dtype, add_bias=False)
            x, quantized = add_context(product, norm.weight, norm.bias, x, layer.attention_output.bias)
            wide = activate(layer.intermediate(quantized, dtype, add_bias=False), layer.intermediate.bias)
            product = layer.output(wide, dtype, add_bias=False)
            return add_output(product, output_norm.weight, output_norm.bias, x, layer.output.bias)

        return run

    def _activate(self, x: QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
        match self.config.activation:
            case "gelu" | "gelu_tanh" as activation:
                product = self.intermediate(x, dtype, add_bias=False)
                return bias_gelu_quantize(product, self.intermediate.bias, approximate=_APPROXIMATE[activation])
            case "relu":
                return quantize_rows(F.relu(self.intermediate(x, dtype, add_bias=True)))
            case "silu":
                return quantize_rows(F.silu(self.intermediate(x, dtype, add_bias=True)))


def _project_add_norm(
    x: QuantizedRows, linear: Fp8Linear, residual: Tensor, norm: nn.LayerNorm
) -> tuple[Tensor, QuantizedRows]:
    product = linear(x, residual.dtype, add_bias=False)
    return layer_norm_quantize(product, norm.weight, norm.bias, residual=residual, x_bias=linear.bias, eps=norm.eps)


class Int8Linear(nn.Module):
    """The weight of an `nn.Linear` in int8, and its bias as it was."""

    values: Tensor
    scale: Tensor
    sum: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        matrix = Int8Matrix.of(weight)
        self.register_buffer("values", matrix.values)
        # As integers, because `Module.to(dtype)` casts what is floating.
        for name in ("scale", "sum"):
            self.register_buffer(name, cast(Tensor, getattr(matrix, name)).view(torch.int32))
        self.bias = bias

    @property
    def matrix(self) -> Int8Matrix:
        """The weight."""
        return Int8Matrix(self.values, self.scale.view(torch.float32), self.sum.view(torch.float32))

    def forward(self, x: Int8Rows, dtype: torch.dtype, **after: Any) -> tuple[Tensor | None, Int8Rows | None]:
        """`ops.int8.linear_int8`."""
        return linear_int8(x, self.matrix, self.bias.float(), dtype, **after)


class Int8Layer(_QuantizedLayer[Int8Linear]):
    """An `EncoderLayer` whose products are in int8."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__(layer, Int8Linear)

    def forward(
        self, x: Tensor, quantized: Int8Rows, packing: Packing, bias: Tensor | None, read: Tensor | None
    ) -> tuple[Tensor, Int8Rows]:
        """As `EncoderLayer.forward`, with the input and the result quantized beside them."""
        config = self.config
        qkv, _ = self.qkv(quantized, attention_dtype(x))
        context = attention(qkv.view(-1, 3, config.num_heads, config.head_dim), packing, bias=bias).flatten(1)
        if read is not None:
            context, x = context.index_select(0, read), x.index_select(0, read)
        norm, output_norm = (in_float32(norm) for norm in (self.attention_norm, self.output_norm))
        x, quantized = self.attention_output(quantize_rows_int8(context), x.dtype, residual=x, norm=norm, int8=True)
        _, wide = self.intermediate(quantized, x.dtype, activation=config.activation, out=False, int8=True)
        return self.output(wide, x.dtype, residual=x, norm=output_norm, int8=True)


def attention_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 where the CPU multiplies it: its rounding is small beside that of int8."""
    machine = native_machine(x)
    return torch.bfloat16 if machine is not None and machine.bfloat16 else x.dtype


class QuantizedEncoder(Encoder):
    """An `Encoder` whose products are in 8 bits; made by `quantize`."""

    def __init__(self, encoder: Encoder, dtype: QuantizedDType) -> None:
        nn.Module.__init__(self)
        self.config = encoder.config
        self.dtype = dtype
        kind = Fp8Layer if dtype == "fp8" else Int8Layer
        self.layer = nn.ModuleList(kind(cast(EncoderLayer, layer)) for layer in encoder.layer)
        self.training = False

    def train(self, mode: bool = True) -> QuantizedEncoder:
        """Raise ArgumentError if `mode` is True."""
        if mode:
            raise ArgumentError("mode", mode, "False", "A quantized model can't be trained.")
        super().train(False)
        return self

    def is_plain(self) -> bool:
        """Always."""
        return True

    def drops(self) -> bool:
        """Never."""
        return False

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
        every: bool = True,
        unpack: bool = False,
    ) -> list[Tensor]:
        """As `Encoder.run`.

        Raises:
            BackendError: a gradient is asked for, or the device can't multiply so.
        """
        if wants_gradient(x):
            raise BackendError("quantize", "a gradient asked for", "torch.no_grad() around it")
        _check_device(x, self.dtype)
        states = [x if read is None or len(self.layer) else x.index_select(0, read)]
        quantized = quantize_rows(x) if self.dtype == "fp8" else quantize_rows_int8(x)
        for i, layer in enumerate(self.layer):
            x, quantized = layer(states[-1], quantized, packing, bias, read if i + 1 == len(self.layer) else None)
            states = [*states, x] if every else [x]
        if unpack:
            states[-1] = packing.unpack(states[-1])
        return states
