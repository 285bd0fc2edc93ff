"""The modules that hold a layer's weights, its parts: which of them an op may read, and how the others are called.

Queries, keys and values are one product, though their parameters are apart, as in Hugging Face's state dicts. Their
memory is one: `SelfAttention.join` moves the three weights, and the three biases, to lie one after another. So
the product of all three reads the parameters themselves, no copy, and nothing can go stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.ops.common import observed
from fastbert.ops.watch import hooks_of
from fastbert.packing import Packing
from fastbert.run.frozen import FrozenLinear

# Whose modules in the place of a linear layer or a norm compute each row by itself.
BY_ROWS = ("torch.", "fastbert.", "peft.", "transformers.", "torchao.", "bitsandbytes.")


class Group(nn.Module):
    """Modules under one name. It is never called itself, so hooks on it are refused."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ArgumentError(
            type(self).__name__,
            "a hook on it",
            "a hook on the layer, or on a linear layer or norm in it",
            "It is a name for its modules, and is never called.",
        )

    register_forward_hook = register_forward_pre_hook = _refuse
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse


class SelfAttention(Group):
    """The modules of queries, keys and values."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, "qkv" not in config.no_bias
        self.query = nn.Linear(hidden, hidden, bias=bias)
        self.key = nn.Linear(hidden, hidden, bias=bias)
        self.value = nn.Linear(hidden, hidden, bias=bias)
        self.dropout = nn.Dropout(config.attention_dropout)
        self._forget()
        self.join()

    def linears(self) -> list[nn.Module]:
        """The three, without nn.Module's slow way to an attribute."""
        modules: dict[str, Any] = self._modules
        return [modules["query"], modules["key"], modules["value"]]

    def _forget(self) -> None:
        self._joined: tuple[Tensor, Tensor | None] | None = None
        self._places: tuple[Any, ...] = ()

    def join(self) -> None:
        """Move the parameters' data to lie one after another, if they are plain, of one kind, and not someone's memory.

        The Parameter objects stay. Each keeps a storage of its own, which DLPack makes of a part of the memory, because
        some that save state dicts (accelerate) take tensors of one storage for copies of each other and drop them.
        """
        linears = self.linears()
        if observed() or not all(map(is_plain, linears)):
            self._forget()
            return
        weights, biases = ([one._parameters[name] for one in linears] for name in ("weight", "bias"))
        biases = [] if biases[0] is None else biases
        if self._joined is not None and _places(cast(list[Tensor], weights + biases)) == self._places:
            return  # a second move would be for nothing, and a CUDA graph may hold the addresses
        self._forget()
        if _movable(weights) and (not biases or _movable(biases)):
            bias = _moved(cast(list[Tensor], biases)) if biases else None
            self._joined = _moved(cast(list[Tensor], weights)), bias
            self._places = _places(cast(list[Tensor], weights + biases))

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * hidden, hidden]` and bias `[3 * hidden]` or None of all three, which are plain; see `is_plain`.

        They are the parameters' own memory where it still lies as `join` left it, else a copy.
        """
        held: list[Any] = [linear._parameters for linear in self.linears()]
        weights, biases = [one["weight"] for one in held], [one["bias"] for one in held]
        if biases[0] is None:
            biases = []
        if self._joined is None or observed() or _places(weights + biases) != self._places:
            return self._copied(weights, biases)
        if not torch.is_grad_enabled():
            return self._joined
        weight, bias = self._joined
        whole = _Join.apply(weight, *weights)  # type: ignore[no-untyped-call]
        return whole, None if bias is None else _Join.apply(bias, *biases)  # type: ignore[no-untyped-call]

    def _copied(self, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return torch.cat(weights), torch.cat(biases) if biases else None

    def _apply(self, fn: Any, recurse: bool = True) -> SelfAttention:
        """What moves or casts a module moves its parameters one by one."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.join()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": None, "_places": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.join()


class _Join(torch.autograd.Function):
    """Parameters that lie one after another as the one tensor that they are; its gradient in as many parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)  # only so that backward refuses parts that were changed in place meanwhile
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        return None, *dwhole.chunk(len(parts))


def is_plain(module: nn.Module | None) -> bool:
    """Whether an op may read the parameters of `module` instead of calling it.

    It may for an nn.Linear or nn.LayerNorm on which nothing looks, and for a SelfAttention of such, of which all have
    a bias or none. Adapters (LoRA), quantized linears, parametrized and pruned modules, and those with hooks are
    called.
    """
    kind = type(module)
    if kind is not nn.Linear and kind is not nn.LayerNorm:
        if not isinstance(module, SelfAttention):
            return False
        linears = module.linears()
        biased = linears[0]._parameters.get("bias") is not None
        for linear in linears:  # noqa: SIM110 - a generator takes twice the time
            if not is_plain(linear) or (linear._parameters["bias"] is None) is biased:
                return False
        return True
    assert module is not None
    # not `hooks_of`, because this is asked of each part of each layer
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (
        "forward" not in module.__dict__
        and (type(weight) is nn.Parameter or type(weight) is Tensor)
        and (type(bias) is nn.Parameter or type(bias) is Tensor or bias is None)
    )


def is_frozen(part: nn.Module) -> bool:
    """Whether `part` is a FrozenLinear on which nothing looks, or a SelfAttention of such."""
    if isinstance(part, SelfAttention):
        return all(map(is_frozen, part.linears()))
    return type(part) is FrozenLinear and not any(hooks_of(part)) and "forward" not in part.__dict__


def matrix(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The matrix of a frozen part, as `cpu.layout` has it, and its bias, those of a SelfAttention as one."""
    if not isinstance(part, SelfAttention):
        return cast(FrozenLinear, part).matrix, cast(FrozenLinear, part).bias
    linears = cast(list[FrozenLinear], part.linears())
    biases = [(linear.bias, linear.blocks.new_zeros(linear.out_features)) for linear in linears]
    held = [zeros if bias is None else bias.detach() for bias, zeros in biases]
    return _followed([linear.matrix for linear in linears]), torch.cat(held)


def _followed(matrices: list[Tensor]) -> Tensor:
    """Matrices of one width, one after another; where they lie so in memory, no copy."""
    first, end = matrices[0], matrices[0].data_ptr()
    for one in matrices:
        if one.data_ptr() != end or one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(matrices)
        end += one.nbytes
    return first.as_strided((sum(map(len, matrices)), *first.shape[1:]), first.stride())


def weights(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain part, those of a SelfAttention as one."""
    if isinstance(part, SelfAttention):
        return part.joined()
    parameters: dict[str, Any] = part._parameters
    return parameters["weight"], parameters["bias"]


def norm_weights(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a plain LayerNorm; a bias of zeros where it has none."""
    parameters: dict[str, Any] = norm._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    return weight, torch.zeros_like(weight, requires_grad=False) if bias is None else bias


def call(part: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
    """What `part` makes of `x`; in the padded layout where it may look at more than rows, see `reads_grid`."""
    if isinstance(part, SelfAttention):
        return torch.cat([call(linear, x, packing) for linear in part.linears()], 1)
    if packing is None or not reads_grid(part):
        return cast(Tensor, part(x))
    return packing.pack(part(packing.unpack(x)), len(x))


def reads_grid(part: nn.Module) -> bool:
    """Whether `part` has to get the padded layout, as in transformers.

    Hooks look on, its `forward` was replaced, or a module in it is of a class of which nobody knows that it computes
    each row by itself.
    """
    if isinstance(part, SelfAttention):
        return any(map(reads_grid, part.linears()))
    if type(part) is nn.Linear or type(part) is nn.LayerNorm:
        return "forward" in part.__dict__ or is_hooked(part)
    by_rows = all(type(module).__module__.startswith(BY_ROWS) for module in part.modules())
    return not by_rows or "forward" in part.__dict__ or is_hooked(part)


def is_hooked(module: nn.Module, but: str | tuple[str, ...] = "torch.distributed") -> bool:
    """Whether functions of a user are called beside the forward pass of `module` or its gradient.

    Args:
        but: the packages whose hooks are no user's.
    """
    if isinstance(module, SelfAttention):
        return any(is_hooked(linear, but) for linear in module.linears())
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(but)
        for hooks in hooks_of(module)
        for hook in hooks.values()
    )


def _places(parts: list[Tensor]) -> tuple[Any, ...]:
    return tuple([(part.data_ptr(), part.stride(), part.numel()) for part in parts])


def _movable(parts: Sequence[Tensor | None]) -> bool:
    """Whether these are three ordinary parameters of one kind, whose memory nobody else looks after."""
    first = parts[0]
    if first is None or first.device.type not in ("cpu", "cuda") or len({id(part) for part in parts}) < len(parts):
        return False
    if any(type(part) is not nn.Parameter or part.is_inference() or part.layout != torch.strided for part in parts):
        return False
    tensors = cast(list[Tensor], parts)
    if len({(part.shape, part.dtype, part.device) for part in tensors}) > 1:
        return False
    storages = {storage.data_ptr(): storage.nbytes() for storage in (part.untyped_storage() for part in tensors)}
    if sum(storages.values()) > sum(part.nbytes for part in tensors):  # views of more than these: a flat optimizer's
        return False
    return first.device.type == "cuda" or not any(part.is_shared() for part in tensors)  # with other processes


def _moved(parts: list[Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([part.detach() for part in parts])
        for part, place in zip(parts, whole.chunk(len(parts)), strict=True):
            part.data = from_dlpack(place)
    return whole
