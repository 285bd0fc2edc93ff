"""The modules that hold a layer's weights, its parts: which of them an op may read, and how the others are called.

Queries, keys and values are one product, though their parameters are apart, as in Hugging Face's state dicts. Their
memory is one: `SelfAttention.join` moves the three weights, and the three biases, to lie one after another, in 8 bits
too. So the product of all three reads the parameters themselves, no copy, and nothing can go stale.
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
from fastbert.run.eight_bits import EightBitLinear, Fp8Linear, Int8Linear
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
        self._joined: tuple[Tensor, Tensor | None] | tuple[EightBitLinear] | None = None
        self._places: tuple[Any, ...] = ()

    def join(self) -> None:
        """Move the parameters' data to lie one after another, if they are plain, of one kind, and not someone's memory.

        The Parameter objects stay, and so do the buffers of linear layers in 8 bits. Each keeps a storage of its own,
        which DLPack makes of a part of the memory, because some that save state dicts (accelerate) take tensors of one
        storage for copies of each other and drop them.
        """
        linears, quantized = self.linears(), in_eight_bits(self)
        if observed() or not (quantized or all(map(is_plain, linears))):
            self._forget()
            return
        held = _held(linears)
        if self._joined is not None and _places(_flat(held)) == self._places:
            return  # a second move would be for nothing, and a CUDA graph may hold the addresses
        self._forget()
        in_their_place = not quantized and type(held[0][0]) is Tensor  # by torch.func or DataParallel, whose they are
        if in_their_place or not all(map(_movable, held)):
            return
        if not quantized:
            weight, *bias = map(_moved, held)
            self._joined = weight, bias[0] if bias else None
        elif cast("EightBitLinear", linears[0]).can_lie_together:
            one = _one_of(linears)
            for tensors, whole in zip(held, _flat(_held([one])), strict=True):
                _lay(tensors, whole)
            self._joined = (one,)  # in a tuple, for a module would become a child
        self._places = _places(_flat(held))

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * hidden, hidden]` and bias `[3 * hidden]` or None of all three, which are plain; see `is_plain`.

        They are the parameters' own memory where it still lies as `join` left it, else a copy.
        """
        held: list[Any] = [linear._parameters for linear in self.linears()]
        weights, biases = [one["weight"] for one in held], [one["bias"] for one in held]
        if biases[0] is None:
            biases = []
        if not self._lie_as_joined(weights + biases):
            return torch.cat(weights), torch.cat(biases) if biases else None
        weight, bias = cast("tuple[Tensor, Tensor | None]", self._joined)
        if not torch.is_grad_enabled():
            return weight, bias
        whole = _Join.apply(weight, *weights)  # type: ignore[no-untyped-call]
        return whole, None if bias is None else _Join.apply(bias, *biases)  # type: ignore[no-untyped-call]

    def as_one(self) -> EightBitLinear:
        """All three, which are `in_eight_bits`, as one: their own memory, if it lies as `join` left it, or a copy."""
        linears = self.linears()
        if self._lie_as_joined(_flat(_held(linears))):
            return cast("tuple[EightBitLinear]", self._joined)[0]
        return _one_of(linears)

    def _lie_as_joined(self, tensors: list[Tensor]) -> bool:
        """Whether these, of its linear layers, lie as `join` left them."""
        return self._joined is not None and not observed() and _places(tensors) == self._places

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


def in_eight_bits(part: nn.Module) -> bool:
    """Whether `part` is a linear layer in 8 bits on which nothing looks, or a SelfAttention of such, of one kind."""
    linears = linears_of(part)
    first = linears[0]
    if type(first) not in (Fp8Linear, Int8Linear):
        return False
    return all(
        type(linear) is type(first)
        and (linear._parameters["bias"] is None) is (first._parameters["bias"] is None)
        and not any(hooks_of(linear))
        and "forward" not in linear.__dict__
        for linear in linears
    )


def eight_bits(part: nn.Module) -> EightBitLinear:
    """A part that is `in_eight_bits` as one linear layer, those of a SelfAttention too."""
    return part.as_one() if isinstance(part, SelfAttention) else cast("EightBitLinear", part)


def linears_of(part: nn.Module) -> list[nn.Module]:
    """The linear layers of a product: `part` itself, or those of a SelfAttention."""
    return part.linears() if isinstance(part, SelfAttention) else [part]


def is_frozen(part: nn.Module) -> bool:
    """Whether `part` is a FrozenLinear on which nothing looks, or a SelfAttention of such."""
    if isinstance(part, SelfAttention):
        return all(map(is_frozen, part.linears()))
    return type(part) is FrozenLinear and not any(hooks_of(part)) and "forward" not in part.__dict__


def matrix(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The matrix of a frozen part, as `cpu.layout` has it, and its bias, those of a SelfAttention as one."""
    if not isinstance(part, SelfAttention):
        return cast("FrozenLinear", part).matrix, cast("FrozenLinear", part).bias
    linears = cast("list[FrozenLinear]", part.linears())
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


def call(part: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
    """What `part` makes of `x`; in the padded layout where it may look at more than rows, see `reads_grid`."""
    if isinstance(part, SelfAttention):
        return torch.cat([call(linear, x, packing) for linear in part.linears()], 1)
    if packing is None or not reads_grid(part):
        return cast("Tensor", part(x))
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


def _held(linears: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Of linear layers of one kind the weights, or what stands for them in 8 bits, and the biases if they have such."""
    first = linears[0]
    names = ["weight"] if type(first) is nn.Linear else list(first._buffers)
    held = ([cast("Tensor", getattr(linear, name)) for linear in linears] for name in (*names, "bias"))
    return [tensors for tensors in held if tensors[0] is not None]


def _flat(held: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in held for tensor in tensors]


def _one_of(linears: list[nn.Module]) -> EightBitLinear:
    first = cast("EightBitLinear", linears[0])
    return first.joined(linears)


def _places(parts: list[Tensor]) -> tuple[Any, ...]:
    return tuple([(part.data_ptr(), part.stride(), part.numel()) for part in parts])


def _movable(parts: Sequence[Tensor]) -> bool:
    """Whether these are ordinary parameters or buffers of one kind, whose memory nobody else looks after."""
    first = parts[0]
    if first.device.type not in ("cpu", "cuda") or len({id(part) for part in parts}) < len(parts):
        return False
    kinds = nn.Parameter, Tensor
    if any(type(part) not in kinds or part.is_inference() or part.layout != torch.strided for part in parts):
        return False
    if len({(part.shape, part.dtype, part.device) for part in parts}) > 1:
        return False
    storages = {storage.data_ptr(): storage.nbytes() for storage in (part.untyped_storage() for part in parts)}
    if sum(storages.values()) > sum(part.nbytes for part in parts):  # views of more than these: a flat optimizer's
        return False
    return first.device.type == "cuda" or not any(part.is_shared() for part in parts)  # with other processes


def _moved(parts: list[Tensor]) -> Tensor:
    """Ordinary tensors one after another, which they are from then on parts of."""
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([part.detach() for part in parts])
    _lay(parts, whole)
    return whole


def _lay(parts: list[Tensor], whole: Tensor) -> None:
    """Let `whole`, which holds the numbers of `parts`, be their memory."""
    with torch.inference_mode(False), torch.no_grad():
        for part, place in zip(parts, whole.chunk(len(parts)), strict=True):
            part.data = from_dlpack(place)
