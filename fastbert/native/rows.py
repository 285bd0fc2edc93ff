"""Matrices in int8, as the kernels of a CPU read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns that a product in int8 works on at a time: 24 vectors of sums, and 8 registers for all else.
ROWS, COLUMNS = 12, 32
# Rows of a task of it: twice that, so that a weight is read half as often from the caches far away.
TASK_ROWS = 2 * ROWS


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
        """Room for rows; memory goes on behind it for `TASK_ROWS` more, which a product reads and forgets."""
        values = torch.empty(rows + TASK_ROWS, width, dtype=torch.uint8)
        scale, zero = torch.empty(2, rows + TASK_ROWS)
        return cls(values[:rows], scale[:rows], zero[:rows])

    def floats(self) -> Tensor:
        """What they stand for, float32 `[rows, width]`."""
        return self.scale[:, None] * (self.values.float() - self.zero[:, None])


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """The weight of a linear layer in int8, a scale for each output.

    Attributes:
        values: int8 `[columns of outputs, in / 4, COLUMNS, 4]`: `COLUMNS` outputs together, and of each the next four
            inputs. Past the last output, and the last input, are zeros.
        scale: float32 `[out]`.
        sum: float32 `[out]`, scale * the sum of the values: what a zero point of 1 adds to the product.
    """

    values: Tensor
    scale: Tensor
    sum: Tensor

    def plain(self) -> Tensor:
        """int8 `[in (a multiple of 4), out]`."""
        columns, fours, *_ = self.values.shape
        return self.values.permute(1, 3, 0, 2).reshape(4 * fours, columns * COLUMNS)[:, : len(self.scale)]
