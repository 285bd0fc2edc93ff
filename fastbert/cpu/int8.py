"""Matrices in int8, as the kernels of a CPU read and write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.cpu.layout import in_blocks
from fastbert.cpu.memory import FLOAT32, INT8, UINT8, Argument, room

# Outputs of a block: two vectors of AVX-512's. The same on every machine, because a quantized model's `state_dict` has
# its weights in such blocks.
COLUMNS = 32

# What two neighbours of a weight may sum to where both have one sign. Without VNNI a CPU sums two products in int16,
# and 255 * 128 = 32640 still fits there, as does -32640. The same on every machine, for the same reason as COLUMNS.
PAIR = 128


def pair_sums(values: Tensor) -> Tensor:
    """`[..., an even number]` -> `[..., half]`: of two neighbours, what those of one sign sum to, the greater."""
    pairs = values.unflatten(-1, (-1, 2))
    return torch.maximum(pairs.clamp_min(0).sum(-1), -pairs.clamp_max(0).sum(-1))


def rows_in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[out, in]` and float32 `[out]`, whose product stands for a floating `[out, in]`.

    Of each output the largest of `pair_sums` becomes 127, and by rounding at most 128.
    """
    exact = weight.detach().float()
    scale = pair_sums(F.pad(exact, (0, exact.shape[1] % 2))).amax(1).clamp_min(1e-30) / (PAIR - 1)
    return (exact / scale[:, None]).round().to(torch.int8), scale


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
        return cls(room((rows, width), torch.uint8), room((rows,), torch.float32), room((rows,), torch.float32))

    def arguments(self, name: str, rows: int, width: int) -> dict[str, Argument]:
        """Values, scale and zero, as a kernel takes them."""
        return {
            f"{name}_values": (self.values, UINT8, rows * width),
            f"{name}_scale": (self.scale, FLOAT32, rows),
            f"{name}_zero": (self.zero, FLOAT32, rows),
        }

    def floats(self) -> Tensor:
        """What they stand for, float32 `[rows, width]`."""
        return self.scale[:, None] * (self.values.float() - self.zero[:, None])


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """The weight of a linear layer in int8, a scale for each output.

    Attributes:
        values: int8 `[blocks of outputs, words of inputs, COLUMNS, 4]`, see `layout.in_blocks`; no `pair_sums` of
            them is over PAIR.
        scale: float32 `[out]`.
        sum: float32 `[out]`, scale * the sum of the values: what a zero point of 1 takes off a product.
    """

    values: Tensor
    scale: Tensor
    sum: Tensor

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None = None) -> Int8Matrix:
        """Of a floating `[out, in]`: by `rows_in_int8`, or the whole numbers that it is of a known scale."""
        if scale is None:
            values, scale = rows_in_int8(weight)
        else:
            values = (weight.detach().float() / scale[:, None]).round().to(torch.int8)
        total = scale * values.sum(1, dtype=torch.int32)
        return cls(in_blocks(values, COLUMNS), scale, total)

    @classmethod
    def joined(cls, parts: Sequence[Int8Matrix]) -> Int8Matrix:
        """One that has the outputs of all of these, of as many inputs each; a copy."""
        values = torch.cat([part.plain().t() for part in parts])
        scale, total = (torch.cat([getattr(part, name) for part in parts]) for name in ("scale", "sum"))
        return cls(in_blocks(values, COLUMNS), scale, total)

    def arguments(self, words: int, width: int) -> dict[str, Argument]:
        """Values, scale and sum, as a kernel takes them."""
        blocks = -(-width // COLUMNS)
        return {
            "weight": (self.values, INT8, blocks * words * COLUMNS * 4),
            "weight_scale": (self.scale, FLOAT32, width),
            "weight_sum": (self.sum, FLOAT32, width),
        }

    def plain(self) -> Tensor:
        """The values as `[in, out]`, the inputs filled up to a multiple of 4."""
        blocks, words, *_ = self.values.shape
        return self.values.permute(1, 3, 0, 2).reshape(words * 4, blocks * COLUMNS)[:, : len(self.scale)]
