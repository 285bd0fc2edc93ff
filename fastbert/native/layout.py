"""How a weight lies for the CPU's products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Outputs of a product that are made together: two vectors of sums with AVX-512.
COLUMNS = 32


def laid_out(weight: Tensor) -> Tensor:
    """`[out, in]` -> `[blocks of outputs, words of inputs, COLUMNS, inputs in a word of 4 bytes]`, zeros at the end."""
    inputs = 4 // weight.itemsize
    padded = F.pad(weight.detach(), (0, -weight.shape[1] % inputs, 0, -len(weight) % COLUMNS))
    return padded.unflatten(1, (-1, inputs)).unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous()
