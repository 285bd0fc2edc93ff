"""Tensors whose neighbours in memory are pages that nothing may touch: what reads or writes past one ends the process.

An element more is seen only on the side that a tensor is flush with; pages are larger than most tensors of tests.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal

import torch
from torch import Tensor

Side = Literal["front", "end"]

_NO_ACCESS = 0  # PROT_NONE of mprotect, which Python does not name


def room(shape: tuple[int, ...], dtype: torch.dtype, side: Side) -> Tensor:
    """Contiguous memory of bytes 0xFF, NaN in floats, flush with the guarded page in front of it or at its end."""
    size = torch.Size(shape).numel() * dtype.itemsize
    inner = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
    first = mmap.PAGESIZE if side == "front" else mmap.PAGESIZE + inner - size
    buffer = (ctypes.c_char * size).from_buffer(pages, first)  # keeps the pages
    begin = ctypes.addressof(buffer) - first
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (begin, begin + mmap.PAGESIZE + inner):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    return whole.fill_(0xFF).view(dtype).view(shape)


def placed(x: Tensor, side: Side) -> Tensor:
    """A copy of `x` in such memory."""
    return room(tuple(x.shape), x.dtype, side).copy_(x)
