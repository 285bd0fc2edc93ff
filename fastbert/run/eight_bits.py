"""Linear layers whose weights are in 8 bits, for inference: what `fastbert.quantize` puts in the place of `nn.Linear`.

Both take rows in their own format and make, of one product, what follows it: activation, residual sum, LayerNorm, the
result in floats, and the result in the format for the next product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastbert import reference
from fastbert.config import Activation
from fastbert.cpu.int8 import COLUMNS, PAIR, Int8Matrix, Int8Rows, pair_sums
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.kernels import precision, target
from fastbert.ops.common import described, native_machine, parameter, wants_gradient
from fastbert.ops.int8 import linear_int8, quantize_rows_int8
from fastbert.ops.layer_norm import in_float32, layer_norm, norm_weights
from fastbert.ops.linear_activation import APPROXIMATE, activated
from fastbert.ops.quantize_rows import (
    QuantizedRows,
    bias_gelu_quantize,
    layer_norm_quantize,
    linear_quantized,
    quantize_rows,
)

# Rows of 8 bits.
Rows: TypeAlias = QuantizedRows | Int8Rows


class After(NamedTuple):
    """What is made of a product: `norm(residual + activation(product))`, those that there are, and in which forms.

    Attributes:
        out, quantized: whether it is wanted in floats, and as the next product takes it.
    """

    activation: Activation | None = None
    residual: Tensor | None = None
    norm: nn.LayerNorm | None = None
    out: bool = True
    quantized: bool = False


class EightBitLinear(nn.Module, ABC):
    """An `nn.Linear` for inference, whose weight is in 8 bits, with a scale for each output; its bias is as it was.

    Called by itself it is what an `nn.Linear` is, `[..., in]` -> `[..., out]`. Executors that make of a product what
    follows it take `product`.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shared = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", shared)
        self.training = False

    @classmethod
    @abstractmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> EightBitLinear:
        """Of the weight and bias of an `nn.Linear`, `[out, in]` and `[out]`, floating."""

    @staticmethod
    @abstractmethod
    def joined(parts: Sequence[Any]) -> EightBitLinear:
        """One that has the outputs of all `parts`, which are of one kind; a copy."""

    @property
    def can_lie_together(self) -> bool:
        """Whether what `joined` makes of such ones has the memory of each in one piece."""
        return True

    @staticmethod
    @abstractmethod
    def check_device(x: Tensor) -> None:
        """Raise BackendError unless the device of `x` multiplies so, into its dtype."""

    def check(self, x: Tensor) -> None:
        """Raise BackendError unless the device of `x` multiplies so, and no gradient or trace is asked for."""
        if wants_gradient(x):
            raise BackendError("quantize", "a gradient asked for", "torch.no_grad() around it")
        if torch._C._is_tracing():
            raise BackendError("quantize", "torch.jit.trace", "torch.export, or the model that it was made of")
        self.check_device(x)

    @abstractmethod
    def quantize(self, x: Tensor) -> Rows:
        """Floating `[rows, in]` in the format that this layer takes."""

    @abstractmethod
    def product(self, x: Any, dtype: torch.dtype, after: After) -> tuple[Tensor | None, Any]:
        """`x @ W^T + b` and what is `after` it, `[rows, in]` -> `[rows, out]`.

        Args:
            x: made by `quantize`, or by such a layer.
            dtype: of the floats.
        """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of `x`.

        Raises:
            ArgumentError: `x` is not floating, or of another width.
            BackendError: see `check`.
        """
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise ArgumentError("x", described(x), f"a floating tensor of shape [..., {self.in_features}]")
        self.check(x)
        out, _ = self.product(self.quantize(x.reshape(-1, self.in_features)), x.dtype, After())
        return cast("Tensor", out).view(*x.shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> EightBitLinear:
        """Raise ArgumentError if `mode` is True."""
        if mode:
            raise ArgumentError("mode", mode, "False", "A quantized model can't be trained.")
        super().train(False)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Raise CheckpointError for the weight of an `nn.Linear`, which `strict=False` would pass over."""
        if f"{prefix}weight" in state_dict:
            mend = "Load it into the model that this one was made of, and quantize that."
            raise CheckpointError(f"{prefix}weight", "a weight in floats", "the state dict of a quantized model", mend)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """As that of an `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def fp8_product(x: QuantizedRows, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear_quantized` by the `values` and `scale` of an Fp8Linear, which keeps them as integers."""
    weight = QuantizedRows(values.view(torch.float8_e4m3fn), scale.view(torch.float32))
    return linear_quantized(x, weight, bias, dtype)


class Fp8Linear(EightBitLinear):
    """The weight in e4m3: for NVIDIA GPUs; on a CPU it computes the same numbers slowly."""

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """`values` and `scale` as integers, because `Module.to(dtype)` casts what is floating."""
        super().__init__(values.shape[1], len(values), bias)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Fp8Linear:
        """See EightBitLinear."""
        values, scale = reference.quantize_rows(weight.detach().float())
        return cls(values.view(torch.uint8), scale.view(torch.int32), bias)

    @staticmethod
    def joined(parts: Sequence[Fp8Linear]) -> Fp8Linear:
        """See EightBitLinear."""
        values, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "scale"))
        return Fp8Linear(values, scale, _joined_bias(parts))

    @staticmethod
    def check_device(x: Tensor) -> None:
        """See EightBitLinear."""
        unserved = precision.fp8_unserved(x.dtype, target.of(x.device))
        if unserved is not None:
            raise BackendError("quantize", unserved, "a bfloat16 model on an NVIDIA GPU from sm_89 on, or on the CPU")

    def quantize(self, x: Tensor) -> QuantizedRows:
        """See EightBitLinear."""
        return quantize_rows(x)

    def _product(self, x: QuantizedRows, dtype: torch.dtype, *, add_bias: bool) -> Tensor:
        """`[rows, in]` -> `[rows, out]` in `dtype`."""
        return fp8_product(x, self.values, self.scale, self.bias if add_bias else None, dtype)

    def product(self, x: QuantizedRows, dtype: torch.dtype, after: After) -> tuple[Tensor | None, QuantizedRows | None]:
        """See EightBitLinear. LayerNorm after a residual sum, and GELU, quantize in passing."""
        activation, residual, norm, out, quantized = after
        plain = activation is None and self.bias is not None
        if plain and quantized and norm is not None and residual is not None:
            product = self._product(x, dtype, add_bias=False)
            return layer_norm_quantize(
                product, *norm_weights(norm), residual=residual, x_bias=cast("Tensor", self.bias), eps=norm.eps
            )
        gelu = activation in APPROXIMATE and self.bias is not None and residual is None and norm is None
        if gelu and quantized and not out:
            product = self._product(x, dtype, add_bias=False)
            approximate = APPROXIMATE[cast("Activation", activation)]
            return None, bias_gelu_quantize(product, cast("Tensor", self.bias), approximate=approximate)
        made = activated(self._product(x, dtype, add_bias=True), activation)
        if norm is not None:
            made = layer_norm(made, *norm_weights(norm), residual=residual, eps=norm.eps)
        elif residual is not None:
            made = made + residual
        return made if out else None, quantize_rows(made) if quantized else None


class Int8Linear(EightBitLinear):
    """The weight in int8: for CPUs."""

    sum: Tensor

    def __init__(self, matrix: Int8Matrix, in_features: int, bias: Tensor | None) -> None:
        super().__init__(in_features, len(matrix.scale), bias)
        self.register_buffer("values", matrix.values)
        # As integers, because `Module.to(dtype)` casts what is floating.
        self.register_buffer("scale", matrix.scale.view(torch.int32))
        self.register_buffer("sum", matrix.sum.view(torch.int32))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """See EightBitLinear."""
        return cls(Int8Matrix.of(weight), weight.shape[1], bias)

    @staticmethod
    def joined(parts: Sequence[Int8Linear]) -> Int8Linear:
        """See EightBitLinear."""
        matrix = Int8Matrix.joined([part.matrix for part in parts])
        return Int8Linear(matrix, parts[0].in_features, _joined_bias(parts))

    @property
    def can_lie_together(self) -> bool:
        """See EightBitLinear: blocks of outputs are of one of them."""
        return self.out_features % COLUMNS == 0

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Raise CheckpointError for values that some machine would not sum exactly, too."""
        name = f"{prefix}values"
        values = state_dict.get(name)
        if isinstance(values, Tensor) and values.shape == self.values.shape:
            largest = int(pair_sums(values).max())
            if largest > PAIR:
                raise CheckpointError(name, f"two weights that sum to {largest}", f"at most {PAIR}", "Quantize anew.")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def matrix(self) -> Int8Matrix:
        """The weight."""
        return Int8Matrix(self.values, self.scale.view(torch.float32), self.sum.view(torch.float32))

    @property
    def bias_in_float32(self) -> Tensor:
        """The bias as the kernels take it, 0 where there is none."""
        if self.bias is None:
            return torch.zeros(self.out_features, dtype=torch.float32, device=self.scale.device)
        return parameter(self.bias)

    @staticmethod
    def check_device(x: Tensor) -> None:
        """See EightBitLinear."""
        if x.device.type != "cpu":
            raise BackendError("quantize", f"a model on {x.device}", "one on the CPU, or dtype='fp8'")

    def quantize(self, x: Tensor) -> Int8Rows:
        """See EightBitLinear."""
        return quantize_rows_int8(x)

    def product(self, x: Int8Rows, dtype: torch.dtype, after: After) -> tuple[Tensor | None, Int8Rows | None]:
        """See EightBitLinear; all of it in one kernel."""
        activation, residual, norm, out, quantized = after
        return linear_int8(
            x,
            self.matrix,
            self.bias_in_float32,
            dtype,
            activation=activation,
            residual=residual,
            norm=None if norm is None else in_float32(norm),
            out=out,
            int8=quantized,
        )


def _joined_bias(parts: Sequence[EightBitLinear]) -> Tensor | None:
    """Of parts that all have one, or none."""
    biases = [part.bias for part in parts if part.bias is not None]
    return torch.cat(biases) if biases else None


def int8_attention_dtype(x: Tensor) -> torch.dtype:
    """Of queries, keys and values that a product in int8 makes: bfloat16, where the CPU multiplies it, or that of `x`.

    Its rounding is small beside that of int8.
    """
    machine = native_machine(x)
    return torch.bfloat16 if machine is not None and machine.bfloat16 else x.dtype
