"""Linear layers whose weights are in 8 bits, for inference: what `fastbert.quantize` puts in the place of `nn.Linear`.

Both take rows in their own format and make, of one product, what follows it: activation, residual sum, LayerNorm, the
result in floats, and the result in the format for the next product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastbert import reference
from fastbert.config import Activation
from fastbert.cpu.int8 import PAIR, Int8Matrix, Int8Rows, pair_sums
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.kernels import precision, target
from fastbert.ops.common import native_machine, wants_gradient
from fastbert.ops.int8 import linear_int8, quantize_rows_int8
from fastbert.ops.layer_norm import in_float32, layer_norm
from fastbert.ops.linear_activation import APPROXIMATE, activated
from fastbert.ops.quantize_rows import (
    QuantizedRows,
    bias_gelu_quantize,
    layer_norm_quantize,
    linear_quantized,
    quantize_rows,
)
from fastbert.run.parts import norm_weights

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
    """The weight of an `nn.Linear` in 8 bits, with a scale for each output, and its bias as it was."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    @staticmethod
    @abstractmethod
    def check_device(x: Tensor) -> None:
        """Raise BackendError unless the device of `x` multiplies so, into its dtype."""

    def check(self, x: Tensor) -> None:
        """Raise BackendError unless the device of `x` multiplies so, and no gradient is asked for."""
        if wants_gradient(x):
            raise BackendError("quantize", "a gradient asked for", "torch.no_grad() around it")
        self.check_device(x)

    @abstractmethod
    def quantize(self, x: Tensor) -> Rows:
        """Floating `[rows, in]` in the format that this layer takes."""

    @abstractmethod
    def forward(self, x: Any, dtype: torch.dtype, after: After) -> tuple[Tensor | None, Any]:
        """`x @ W^T + b` and what is `after` it, `[rows, in]` -> `[rows, out]`.

        Args:
            x: made by `quantize`, or by such a layer.
            dtype: of the floats.
        """

    def train(self, mode: bool = True) -> EightBitLinear:
        """Raise ArgumentError if `mode` is True."""
        if mode:
            raise ArgumentError("mode", mode, "False", "A quantized model can't be trained.")
        super().train(False)
        return self


def fp8_product(x: QuantizedRows, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear_quantized` by the `values` and `scale` of an Fp8Linear, which keeps them as integers."""
    weight = QuantizedRows(values.view(torch.float8_e4m3fn), scale.view(torch.float32))
    return linear_quantized(x, weight, bias, dtype)


class Fp8Linear(EightBitLinear):
    """The weight in e4m3: for NVIDIA GPUs; on a CPU it computes the same numbers slowly."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, scale = reference.quantize_rows(weight.detach().float())
        # As integers, because `Module.to(dtype)` casts what is floating.
        self.register_buffer("values", values.view(torch.uint8))
        self.register_buffer("scale", scale.view(torch.int32))
        self.bias = bias
        self.training = False

    @staticmethod
    def check_device(x: Tensor) -> None:
        """See EightBitLinear."""
        unserved = precision.fp8_unserved(x.dtype, target.of(x.device))
        if unserved is not None:
            raise BackendError("quantize", unserved, "a bfloat16 model on an NVIDIA GPU from sm_89 on, or on the CPU")

    def quantize(self, x: Tensor) -> QuantizedRows:
        """See EightBitLinear."""
        return quantize_rows(x)

    def product(self, x: QuantizedRows, dtype: torch.dtype, *, add_bias: bool) -> Tensor:
        """`[rows, in]` -> `[rows, out]` in `dtype`."""
        return fp8_product(x, self.values, self.scale, self.bias if add_bias else None, dtype)

    def forward(self, x: QuantizedRows, dtype: torch.dtype, after: After) -> tuple[Tensor | None, QuantizedRows | None]:
        """See EightBitLinear. LayerNorm after a residual sum, and GELU, quantize in passing."""
        activation, residual, norm, out, quantized = after
        plain = activation is None and self.bias is not None
        if plain and quantized and norm is not None and residual is not None:
            product = self.product(x, dtype, add_bias=False)
            return layer_norm_quantize(
                product, *norm_weights(norm), residual=residual, x_bias=cast(Tensor, self.bias), eps=norm.eps
            )
        gelu = activation in APPROXIMATE and self.bias is not None and residual is None and norm is None
        if gelu and quantized and not out:
            product = self.product(x, dtype, add_bias=False)
            approximate = APPROXIMATE[cast(Activation, activation)]
            return None, bias_gelu_quantize(product, cast(Tensor, self.bias), approximate=approximate)
        made = activated(self.product(x, dtype, add_bias=True), activation)
        if norm is not None:
            made = layer_norm(made, *norm_weights(norm), residual=residual, eps=norm.eps)
        elif residual is not None:
            made = made + residual
        return made if out else None, quantize_rows(made) if quantized else None


class Int8Linear(EightBitLinear):
    """The weight in int8: for CPUs."""

    sum: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        super().__init__()
        matrix, self.depth = Int8Matrix.of(weight, scale), weight.shape[1]
        self.register_buffer("values", matrix.values)
        # As integers, because `Module.to(dtype)` casts what is floating.
        for name in ("scale", "sum"):
            self.register_buffer(name, cast(Tensor, getattr(matrix, name)).view(torch.int32))
        self.bias = bias
        self.training = False

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Raise CheckpointError for values that some machine would not sum exactly."""
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
            return torch.zeros(len(self.scale), dtype=torch.float32, device=self.scale.device)
        return self.bias.detach().float().contiguous()

    @staticmethod
    def check_device(x: Tensor) -> None:
        """See EightBitLinear."""
        if x.device.type != "cpu":
            raise BackendError("quantize", f"a model on {x.device}", "one on the CPU, or dtype='fp8'")

    def quantize(self, x: Tensor) -> Int8Rows:
        """See EightBitLinear."""
        return quantize_rows_int8(x)

    def forward(self, x: Int8Rows, dtype: torch.dtype, after: After) -> tuple[Tensor | None, Int8Rows | None]:
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


def attention_dtype(part: nn.Module, x: Tensor) -> torch.dtype:
    """Of queries, keys and values that `part` makes: that of `x`, but after int8 bfloat16, where the CPU multiplies it.

    Its rounding is small beside that of int8.
    """
    machine = native_machine(x) if isinstance(part, Int8Linear) else None
    return torch.bfloat16 if machine is not None and machine.bfloat16 else x.dtype
