"""How a weight lies for the CPU's products."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastbert.native.memory import room

# Outputs of a product that are made together: two vectors of sums with AVX-512.
COLUMNS = 32


def laid_out(weight: Tensor) -> Tensor:
    """`[out, in]` -> `[blocks of outputs, words of inputs, COLUMNS, inputs in a word of 4 bytes]`, zeros at the end."""
    inputs = 4 // weight.itemsize
    padded = F.pad(weight.detach(), (0, -weight.shape[1] % inputs, 0, -len(weight) % COLUMNS))
    return padded.unflatten(1, (-1, inputs)).unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous()


def laid_out_together(weights: Sequence[Tensor]) -> list[Tensor]:
    """Each `laid_out`, of one dtype, one after another in memory: what is fetched past one's end is the next one."""
    inputs = 4 // weights[0].itemsize
    sizes = [
        (len(weight) + -len(weight) % COLUMNS) * (weight.shape[1] + -weight.shape[1] % inputs) for weight in weights
    ]
    parts = room([sum(sizes)], weights[0].dtype).split(sizes)
    made = []
    for weight, part in zip(weights, parts, strict=True):
        one = laid_out(weight)
        made.append(part.view_as(one).copy_(one))
    return made
