"""How a weight lies for the CPU's products."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastbert.cpu.memory import room


def in_blocks(weight: Tensor, columns: int) -> Tensor:
    """`[out, in]` -> `[blocks of outputs, words of inputs, columns, inputs in a word of 4 bytes]`, zeros at the end.

    Args:
        columns: outputs that are made together.
    """
    inputs = 4 // weight.itemsize
    padded = F.pad(weight.detach(), (0, -weight.shape[1] % inputs, 0, -len(weight) % columns))
    return padded.unflatten(1, (-1, inputs)).unflatten(0, (-1, columns)).transpose(1, 2).contiguous()


def rooms(weights: Sequence[Tensor], columns: int) -> list[Tensor]:
    """Flat memory for each `in_blocks`, of one dtype, one after another: what is fetched past one's end is the next."""
    inputs = 4 // weights[0].itemsize
    shapes = [weight.shape for weight in weights]
    sizes = [(rows + -rows % columns) * (width + -width % inputs) for rows, width in shapes]
    return list(room([sum(sizes)], weights[0].dtype).split(sizes))


def in_blocks_together(weights: Sequence[Tensor], columns: int) -> list[Tensor]:
    """Each `in_blocks`, one after another in memory; see `rooms`."""
    made = []
    for weight, part in zip(weights, rooms(weights, columns), strict=True):
        one = in_blocks(weight, columns)
        made.append(part.view_as(one).copy_(one))
    return made


def plain(matrix: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `in_blocks` was made of, `[outputs, inputs]`; to the bit."""
    blocks, words, columns, parts = matrix.shape
    return matrix.transpose(1, 2).reshape(blocks * columns, words * parts)[:outputs, :inputs].contiguous()
