"""Matrices in int8, as the kernels of a CPU read and write them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """Rows in int8, each with a scale and a zero point: `scale * (values - zero)`.

    Attributes:
        values: int8 `[rows, width]`.
        scale, zero: float32 `[rows]`; zero is a whole number.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """The weight of a linear layer in int8, a scale for each output.

    Attributes:
        values: int8 `[in, out]`.
        scale: float32 `[out]`.
        sum: float32 `[out]`, scale * the sum of the values: what a zero point of 1 adds to the product.
    """

    values: Tensor
    scale: Tensor
    sum: Tensor
