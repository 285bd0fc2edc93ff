"""Memory as the kernels of a CPU have it: made with all of its kind named, and looked at before they get its address.

Nothing here depends on what is set for the process or the thread: torch's default dtype or device, a mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from fastbert.cpu import guards
from fastbert.errors import ArgumentError

FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
INT8 = (torch.int8,)
UINT8 = (torch.uint8,)
STRIDED = torch.strided


@dataclass
class PerWorker:
    """Bytes for each thread of a `Program`, which makes them: what is there lasts for one task."""

    size: int


# What a kernel is called with: a number; a tensor, the dtypes it may have, and how many of its elements are touched;
# memory for each worker. None, alone or as the tensor, where no step reads one.
Argument = int | tuple[Tensor | None, Sequence[torch.dtype], int] | PerWorker | None


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Contiguous memory of a CPU with nothing in it yet."""
    if guards.ON:
        return guards.guarded(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


def is_plain(x: Tensor) -> bool:
    """Whether the numbers of `x` are what lies in its memory: no subclass, no other layout, no lazy sign or zero."""
    kind = type(x)
    if kind is not Parameter and (kind is not Tensor or x._is_zerotensor()):  # which no parameter is
        return False
    return x.layout is STRIDED and not x.is_nested and not x.is_neg()


def as_kernels_read(x: Tensor) -> Tensor:
    """`x` contiguous, its numbers where it lies: a gradient may come spread, or negated."""
    return x.resolve_neg().contiguous()


def located(name: str, x: Tensor, dtypes: Sequence[torch.dtype], elements: int) -> int:
    """The address of `x`, for a kernel that touches so many of its elements.

    Raises:
        ArgumentError: it has another dtype, fewer elements, gaps, lies elsewhere, its memory was given back, or its
            numbers are not what lies there.
    """
    if (
        x.dtype in dtypes
        and x.is_cpu
        and is_plain(x)
        and x.is_contiguous()
        and x.numel() >= elements
        and x.untyped_storage().nbytes() >= (x.storage_offset() + elements) * x.itemsize
    ):
        return x.data_ptr()
    raise ArgumentError(
        name,
        _described(x),
        f"{' or '.join(map(str, dtypes))}, plain, contiguous and on the CPU, {elements} elements or more",
    )


def _described(x: Tensor) -> str:
    if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided or x.is_nested:
        return f"a {type(x).__name__} of {x.dtype}, {'nested' if x.is_nested else x.layout}"
    lazy = ", negated when it is read" if x.is_neg() else ""
    held = f"{x.untyped_storage().nbytes()} bytes of memory"
    return f"{x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} in {held} on {x.device}{lazy}"
