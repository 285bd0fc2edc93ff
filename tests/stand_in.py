"""A stand-in for a GPU: memory of the CPU that may not meet other memory of the CPU.

Inside `StandIn` the device `cpu:0` plays the GPU. A tensor that was made there, or computed from one, is on it, and
says so (`x.device`). What a GPU would refuse is an error: an op on tensors of both devices, and `.numpy()`. What makes
the host wait for a GPU is counted: `.item()`, `.tolist()`, a truth value, a boolean index, a copy to the CPU or from
memory that is not pinned, an event. What is copied to pinned memory without waiting is NaN (or -1) there until an event
that was recorded later is waited for.

A tensor is known by its storage. Of one that C++ made (a gradient, say) nothing is known, and nothing is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from triton.runtime.interpreter import GridExecutor

from fastbert import transfer

GPU = torch.device("cpu", 0)
ASKED = os.environ.get("FASTBERT_STAND_IN") == "1"  # that tests of kernels run on it; `make test-as-gpu` sets it

# What waits for the GPU, where one of its tensors is asked.
WAITS = {
    Tensor.item: "item", Tensor.tolist: "tolist", Tensor.__bool__: "truth value", Tensor.__int__: "int",
    Tensor.__float__: "float", Tensor.__index__: "index", Tensor.nonzero: "nonzero", torch.nonzero: "nonzero",
    Tensor.masked_select: "masked_select", torch.equal: "equal", Tensor.equal: "equal", torch.allclose: "allclose",
    Tensor.unique: "unique", Tensor.cpu: "copy to the CPU",
}  # fmt: skip


class MixedError(RuntimeError):
    """Tensors of both devices where a GPU would refuse them."""


class Event:
    """What plays an event of CUDA: the copies to the CPU that were under way when it was recorded."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in, self._copies = stand_in, list(stand_in.under_way)

    def synchronize(self) -> None:
        """Wait for them."""
        self._stand_in.waits["event"] += 1
        with torch._C.DisableTorchFunction():
            for there, values in self._copies:
                there.copy_(values)


class Stream:
    """What plays a stream of CUDA."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def record_event(self) -> Event:
        """An event behind all that is queued."""
        return Event(self._stand_in)


class StandIn(TorchFunctionMode):
    """See above.

    Attributes:
        waits: how often the host would have waited, by what for.
        copies: how many copies from pinned memory nobody waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies = 0
        self.under_way: list[tuple[Tensor, Tensor]] = []  # copies to the CPU: where to, and what will be there
        self._pinned: list[StorageWeakRef] = []
        self._on_gpu: dict[int, tuple[StorageWeakRef, bool]] = {}

    def __enter__(self) -> StandIn:
        def launched(executor: Any, *args: Any, **options: Any) -> Any:
            with torch._C.DisableTorchFunction():  # a launch reads its arguments wherever they are
                return self._launch(executor, *args, **options)

        self._launch = GridExecutor.__call__
        GridExecutor.__call__ = launched
        transfer.PINNED_FOR.add(GPU.type)
        self._stream = torch.cuda.current_stream
        torch.cuda.current_stream = lambda device=None: Stream(self)
        self._group = torch._C._group_tensors_by_device_and_dtype
        torch._C._group_tensors_by_device_and_dtype = self._grouped
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        transfer.PINNED_FOR.discard(GPU.type)
        torch.cuda.current_stream = self._stream
        torch._C._group_tensors_by_device_and_dtype = self._group
        GridExecutor.__call__ = self._launch

    def side(self, x: Tensor) -> bool | None:
        """Whether it is on the stand-in; None where nobody knows."""
        with torch._C.DisableTorchFunction():
            try:
                key = x.untyped_storage()._cdata
            except (NotImplementedError, RuntimeError):  # meta and the like
                return None
        found = self._on_gpu.get(key)
        return None if found is None or found[0].expired() else found[1]

    def is_pinned(self, x: Tensor) -> bool:
        """Whether it was made in pinned memory."""
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata in {ref.cdata for ref in self._pinned if not ref.expired()}

    def place(self, x: Tensor, gpu: bool) -> Tensor:
        """`x`, which is now known to be there, or not."""
        with torch._C.DisableTorchFunction():
            try:
                storage = x.untyped_storage()
            except (NotImplementedError, RuntimeError):
                return x
            self._on_gpu[storage._cdata] = (StorageWeakRef(storage), gpu)
        return x

    def _grouped(self, lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
        """What C++ makes of an optimizer's tensors, whose device it does not ask us for."""
        found = self._group(lists, with_indices)
        return {
            (GPU if any(map(self.side, tensors(group))) else device, dtype): group
            for (device, dtype), group in found.items()
        }

    def _copied(self, there: Tensor, x: Tensor, non_blocking: bool) -> None:
        """Count a copy from one side to the other, which has been made."""
        sides = self.side(there), self.side(x)
        if sides not in ((True, False), (False, True)):
            return
        if not non_blocking or not self.is_pinned(x if sides[0] else there):
            self.waits["copy of pageable memory" if sides[0] else "copy to the CPU"] += 1
        elif sides[0]:
            self.copies += 1
        else:
            with torch._C.DisableTorchFunction():
                self.under_way.append((there, x.clone()))
                there.fill_(torch.nan if there.is_floating_point() else -1)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if self.side(args[0]) else func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        gpu = any(self.side(x) for x in given)
        copies = func in (Tensor.to, Tensor.copy_, Tensor.cpu) or (
            func is Tensor.__setitem__ and next(tensors(args[1]), None) is None
        )
        if func is torch._has_compatible_shallow_copy_type and self.side(args[0]) != self.side(args[1]):
            return False  # as of tensors on two devices: `Module.to` then makes a new parameter
        if not copies and {True, False} <= {self.side(x) for x in given if x.dim() > 0}:
            raise MixedError(f"{getattr(func, '__name__', func)}: tensors on the GPU and on the CPU")
        if func is Tensor.numpy and gpu:
            raise MixedError("numpy() of a tensor on the GPU")
        if gpu and func in WAITS:
            self.waits[WAITS[func]] += 1
        if gpu and func in (Tensor.__getitem__, Tensor.__setitem__) and boolean(args[1]):
            self.waits["boolean index"] += 1
        pinned = kwargs.pop("pin_memory", False) or func is Tensor.pin_memory
        out = args[0].clone() if func is Tensor.pin_memory else func(*args, **kwargs)
        if pinned:
            self._pinned.append(StorageWeakRef(out.untyped_storage()))
        if func is Tensor.copy_:
            self._copied(*args[:2], bool(kwargs.get("non_blocking", False)))
        if func in (Tensor.copy_, Tensor.__setitem__):
            return out
        asked = device_of(func, args, kwargs)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            asked, gpu = GPU if self.side(args[1]) else torch.device("cpu"), bool(self.side(args[0]))
        if func in _device_constructors():
            on: bool | None = (asked or torch.get_default_device()) == GPU
        elif func in (Tensor.cpu, torch.from_numpy):
            on = False
        elif asked is not None:
            on = asked == GPU
        else:
            on = gpu or (False if any(self.side(x) is False for x in given) else None)
        if asked is not None and on != gpu and func is Tensor.to:
            if not gpu and kwargs.get("non_blocking") and self.is_pinned(args[0]):
                self.copies += 1
            else:
                self.waits["copy to the CPU" if gpu else "copy of pageable memory"] += 1
        for x in tensors(out) if on is not None else ():
            if self.side(x) not in (None, on):  # of one device for torch, which gave the same memory back
                return self.place(x.clone(), on)
            self.place(x, on)
        return out


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in arguments or in a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def device_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    named = kwargs.get("device")
    if named is None and func is Tensor.to:
        named = next((x for x in args[1:] if isinstance(x, torch.device | str)), None)
    return None if named is None else torch.device(named)


def boolean(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool and part.dim() > 0 for part in parts)
