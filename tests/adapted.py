"""What an adapter puts in the place of a linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class Adapted(nn.Module):
    """A linear layer and a product of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
