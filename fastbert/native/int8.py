"""Matrices in int8, as the kernels of a CPU read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.native.layout import COLUMNS, laid_out


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
        scale, zero = torch.empty(2, rows)
        return cls(torch.empty(rows, width, dtype=torch.uint8), scale, zero)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scale and zero, as a kernel takes them."""
        return self.values, self.scale, self.zero

    def floats(self) -> Tensor:
        """What they stand for, float32 `[rows, width]`."""
        return self.scale[:, None] * (self.values.float() - self.zero[:, None])


# `Int8Rows.parts` of none.
NO_ROWS = (None, None, None)


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """The weight of a linear layer in int8, a scale for each output.

    Attributes:
        values: int8 `[blocks of outputs, words of inputs, COLUMNS, 4]`, see `layout.laid_out`.
        scale: float32 `[out]`.
        sum: float32 `[out]`, scale * the sum of the values: what a zero point of 1 takes off a product.
    """

    values: Tensor
    scale: Tensor
    sum: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Matrix:
        """`[out, in]`, floating; of each output the largest magnitude becomes 127."""
        exact = weight.detach().float()
        scale = exact.abs().amax(1).clamp_min(1e-30) / 127.0
        values = (exact / scale[:, None]).round().to(torch.int8)
        total = scale * values.sum(1, dtype=torch.int32)
        return cls(laid_out(values), scale, total)

    def plain(self) -> Tensor:
        """The values as `[in, out]`, the inputs filled up to a multiple of 4."""
        blocks, words, *_ = self.values.shape
        return self.values.permute(1, 3, 0, 2).reshape(words * 4, blocks * COLUMNS)[:, : len(self.scale)]
