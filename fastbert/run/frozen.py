"""A linear layer whose weight lies only as the kernels of this CPU read it, so that it takes its memory once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.cpu.layout import in_blocks, plain, size
from fastbert.cpu.memory import room
from fastbert.errors import ArgumentError


class FrozenLinear(nn.Module):
    """What an `nn.Linear` computes, for inference; its `state_dict` is that of the `nn.Linear`, and so is a copy of it.

    Args:
        linear: whose weight `matrix` holds.
        matrix: made by `layout.in_blocks`.
    """

    matrix: Tensor

    def __init__(self, linear: nn.Linear, matrix: Tensor) -> None:
        super().__init__()
        self.shape = linear.weight.shape
        self.register_buffer("matrix", matrix, persistent=False)
        self.bias = linear.bias
        self.training = False

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, a copy."""
        return plain(self.matrix, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`; slow, because it makes the weight as it was."""
        return F.linear(x, self.weight, self.bias)

    def thawed(self) -> nn.Linear:
        """As an `nn.Linear`, whose weight requires no gradient."""
        with torch.device("meta"):
            made = nn.Linear(self.shape[1], self.shape[0], bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        made.bias = self.bias
        return made.eval()

    def train(self, mode: bool = True) -> FrozenLinear:
        """Raise ArgumentError if `mode` is True."""
        if mode:
            raise ArgumentError("mode", mode, "False", "A frozen model can't be trained: load it without frozen=True.")
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        if changes(fn, self.matrix):
            mend = "Load it as you want it, or without frozen=True."
            raise ArgumentError("frozen", "a move or a cast of a part of it", "one of the whole encoder", mend)
        return cast(FrozenLinear, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        weight = state_dict.pop(key, None)
        if weight is None:
            missing_keys += [key] if strict else []
        elif weight.shape != self.shape:
            error_msgs.append(f"size mismatch for {key}: got {tuple(weight.shape)}; expected {tuple(self.shape)}.")
        else:
            self.matrix.copy_(in_blocks(weight.to(self.matrix.dtype), self.matrix.shape[2]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __reduce__(self) -> Any:
        return _same, (self.thawed(),)

    def extra_repr(self) -> str:
        """As that of an `nn.Linear`."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, bias={self.bias is not None}"


def freeze(module: nn.Module, columns: int) -> None:
    """Put a FrozenLinear in the place of each `nn.Linear` below `module`, all of one dtype; the others' memory goes.

    Their matrices follow one another in memory, as `layout.in_blocks_together` has them, and so do those of a
    SelfAttention, if their outputs are a multiple of `columns`.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    sizes = [size(linear.weight, columns) for _, _, linear in places]
    with torch.inference_mode(False):  # what is made inside could not be written to outside
        block = room([sum(sizes)], places[0][2].weight.dtype)
    for part in block.split(sizes):
        parent, name, linear = places.pop(0)  # one after the other, so that no two copies of all are ever there
        matrix = in_blocks(linear.weight, columns)
        parent._modules[name] = FrozenLinear(linear, part.view_as(matrix).copy_(matrix))


def thaw(module: nn.Module) -> None:
    """Put an `nn.Linear` in the place of each FrozenLinear below `module`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, FrozenLinear):
                parent._modules[name] = child.thawed()


def changes(fn: Any, x: Tensor) -> bool:
    """Whether `fn`, by which a module moves or casts its tensors, makes something else of such as `x`."""
    made = fn(x.new_empty(0))
    return bool(made.dtype != x.dtype or made.device != x.device)


def _same(linear: nn.Linear) -> nn.Linear:
    return linear
