"""A linear layer whose weight lies only as the kernels of this CPU read it, so that it takes its memory once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.cpu.layout import in_blocks, plain, rooms
from fastbert.errors import ArgumentError


class FrozenLinear(nn.Module):
    """What an `nn.Linear` computes, for inference; its `state_dict` is that of the `nn.Linear`, and so is a copy of it.

    Args:
        linear: whose weight `matrix` holds.
        matrix: made by `layout.in_blocks`.
    """

    blocks: Tensor

    def __init__(self, linear: nn.Linear, matrix: Tensor) -> None:
        super().__init__()
        self.shape, self.blocks_shape = linear.weight.shape, matrix.shape
        self.register_buffer("blocks", matrix.view(-1), persistent=False)  # flat, for a memory format changes others
        self.bias = linear.bias
        self.training = False

    @property
    def matrix(self) -> Tensor:
        """As `layout.in_blocks` made it."""
        return self.blocks.view(self.blocks_shape)

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, a copy: what is written to it is lost."""
        return plain(self.matrix, *self.shape)

    @property
    def out_features(self) -> int:
        """As of an `nn.Linear`."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """As of an `nn.Linear`."""
        return self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`; slow, because it makes the weight as it was."""
        return F.linear(x, self.weight, self.bias)

    def thawed(self) -> nn.Linear:
        """As an `nn.Linear`, with its hooks and attributes; the weight requires no gradient.

        Raises:
            ArgumentError: it is parametrized.
        """
        if type(self) is not FrozenLinear:
            raise ArgumentError("frozen", f"a {type(self).__name__}", "a part that is not parametrized")
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, bias=False)
        own = {"shape", "blocks_shape", "_buffers", "_non_persistent_buffers_set", "_parameters", "_modules"}
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        made._parameters = {"weight": nn.Parameter(self.weight, requires_grad=False), **self._parameters}
        made._buffers = {name: x for name, x in self._buffers.items() if name != "blocks"}
        return made

    def train(self, mode: bool = True) -> FrozenLinear:
        """Raise ArgumentError if `mode` is True."""
        if mode:
            raise ArgumentError("mode", mode, "False", "A frozen model can't be trained: load it without frozen=True.")
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        if changes(fn, self.blocks):
            mend = "Load it as you want it, or without frozen=True."
            raise ArgumentError("frozen", "a move or a cast of a part of it", "one of the whole encoder", mend)
        return cast("FrozenLinear", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        weight = state_dict.pop(key, None)
        assigned = local_metadata.get("assign_to_params_buffers", False)
        if weight is None:
            missing_keys += [key] if strict else []
        elif not isinstance(weight, Tensor) or weight.is_meta or weight.layout != torch.strided:
            error_msgs.append(f"{key}: got a {type(weight).__name__} without plain numbers; expected a dense tensor.")
        elif weight.shape != self.shape:
            error_msgs.append(f"size mismatch for {key}: got {tuple(weight.shape)}; expected {tuple(self.shape)}.")
        elif assigned and weight.dtype != self.blocks.dtype:
            error_msgs.append(f"{key}: got {weight.dtype} to be assigned; expected the frozen {self.blocks.dtype}.")
        else:
            self.blocks.copy_(in_blocks(weight.to(self.blocks.dtype), self.blocks_shape[2]).view(-1))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __reduce__(self) -> Any:
        return _same, (self.thawed(),)

    def extra_repr(self) -> str:
        """As that of an `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def freeze(module: nn.Module, columns: int) -> None:
    """Put a FrozenLinear in the place of each `nn.Linear` below `module`, all of one dtype; the others' memory goes.

    Their matrices follow one another in memory, as `layout.in_blocks_together` has them, and so do those of a
    SelfAttention, if their outputs are a multiple of `columns`.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if type(child) is nn.Linear
    ]
    weights = {id(linear): linear.weight for _, _, linear in places}  # one may have several places
    with torch.inference_mode(False):  # what is made inside could not be written to outside
        parts = dict(zip(weights, rooms(list(weights.values()), columns), strict=True))
    del weights
    made: dict[int, FrozenLinear] = {}
    while places:  # one after the other, so that no two copies of all are ever there
        parent, name, linear = places.pop(0)
        if id(linear) not in made:
            matrix = in_blocks(linear.weight, columns)
            made[id(linear)] = FrozenLinear(linear, parts[id(linear)].view_as(matrix).copy_(matrix))
        parent._modules[name] = made[id(linear)]


def thaw(module: nn.Module) -> None:
    """Put an `nn.Linear` in the place of each FrozenLinear below `module`."""
    made: dict[int, nn.Linear] = {}
    for parent in module.modules():
        for name, child in parent._modules.items():
            if isinstance(child, FrozenLinear):
                if id(child) not in made:
                    made[id(child)] = child.thawed()
                parent._modules[name] = made[id(child)]


def changes(fn: Any, x: Tensor) -> bool:
    """Whether `fn`, by which a module moves or casts its tensors, makes something else of such as `x`."""
    made = fn(x.new_empty(0))
    return bool(made.dtype != x.dtype or made.device != x.device)


def _same(linear: nn.Linear) -> nn.Linear:
    return linear
