"""Between the host's memory and a device's, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Kinds of devices that read pinned memory while the host goes on; pageable memory makes it wait.
PINNED_FOR = {"cuda"}

PIECE = 16  # bytes that kernels read at once


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors as tensors on `device`, all by one copy, which on a GPU nobody waits for; on the CPU themselves.

    The memory that is copied from may be forgotten at once: torch gives a pinned block to no one else before the copy
    is done (`CachingHostAllocator`, which records an event on the stream of each copy). So several are under way when
    the host is ahead.

    Args:
        tensors: dense, of any shapes and dtypes.
        device: where to.

    Returns:
        Views of one block of memory, contiguous, each at a multiple of 16 bytes.
    """
    if all(x.device == device for x in tensors):
        return list(tensors)
    places: list[slice] = []
    size = 0
    for x in tensors:
        places.append(slice(size, size + x.nbytes))
        size += -(-x.nbytes // PIECE) * PIECE
    block = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type in PINNED_FOR)
    for x, place in zip(tensors, places, strict=True):
        block[place].view(x.dtype).view(x.shape).copy_(x)
    there = block.to(device, non_blocking=True)
    return [there[place].view(x.dtype).view(x.shape) for x, place in zip(tensors, places, strict=True)]


def fetch(x: Tensor) -> Callable[[], Any]:
    """`x.tolist()`, asked for now and had later: only the call of what this gives waits for a GPU.

    On a CPU `x` must not change until then.
    """
    if x.device.type not in PINNED_FOR:
        return x.tolist
    here = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    here.copy_(x, non_blocking=True)
    copied = torch.cuda.current_stream(x.device).record_event()

    def numbers() -> Any:
        copied.synchronize()
        return here.tolist()

    return numbers
