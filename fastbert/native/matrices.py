"""Matrices as the kernels of a CPU read and write them: rows in int8, and weights laid out for products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Outputs of a product that are made together: two vectors with AVX-512, four with AVX2.
COLUMNS = 32


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """Rows in 8 bits, each with a scale and a zero point: `scale * (values - zero)`.

    Attributes:
        values: uint8 `[rows, width]`.
        scale, zero: float32 `[rows]`; zero is a whole number.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> Int8Rows:
        """Room for them."""
        return cls(torch.empty(rows, width, dtype=torch.uint8), *torch.empty(2, rows))

    def floats(self) -> Tensor:
        """What they stand for, float32 `[rows, width]`."""
        return self.scale[:, None] * (self.values.float() - self.zero[:, None])


@dataclass(frozen=True, eq=False)
class Matrix:
    """The weight of a linear layer, laid out for its products.

    Attributes:
        values: `[blocks of outputs, words of inputs, COLUMNS, inputs in a word of 32 bits]` in float32, bfloat16 or int8,
            so with 1, 2 or 4 inputs in a word; past the last output and the last input are zeros.
        width: outputs.
        scale: float32 `[out]`, for int8: what the values are multiplied with.
        sum: float32 `[out]`, for int8: scale * the sum of the values, which is what a zero point of 1 adds to a product.
    """

    values: Tensor
    width: int
    scale: Tensor | None = None
    sum: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Matrix:
        """`[out, in]` in float32 or bfloat16."""
        return cls(_laid_out(weight.detach()), len(weight))

    @classmethod
    def quantized(cls, weight: Tensor) -> Matrix:
        """`[out, in]` in int8; of each output the largest magnitude becomes 127."""
        exact = weight.detach().float()
        scale = exact.abs().amax(1).clamp_min(1e-30) / 127.0
        values = (exact / scale[:, None]).round().to(torch.int8)
        return cls(_laid_out(values), len(weight), scale, scale * values.sum(1, dtype=torch.int32))

    def plain(self) -> Tensor:
        """The values as `[in, out]`, the inputs filled up to a whole word."""
        blocks, words, _, inputs = self.values.shape
        return self.values.permute(1, 3, 0, 2).reshape(words * inputs, blocks * COLUMNS)[:, : self.width]


def _laid_out(values: Tensor) -> Tensor:
    inputs = 4 // values.itemsize
    padded = F.pad(values, (0, -values.shape[1] % inputs, 0, -len(values) % COLUMNS))
    return padded.unflatten(1, (-1, inputs)).unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous()
