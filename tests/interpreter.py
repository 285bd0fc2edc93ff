"""Mends for bfloat16 and float8 in Triton's interpreter, only for tests.

Up to 3.9.0 it multiplies bfloat16 bits as integers in `tl.dot`, truncates to bfloat16 where hardware rounds, and loses
the subnormal ones; and what rounds up to the next power of two in float8 becomes half of it. test_interpreter.py says
when upstream no longer needs a mend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastbert.kernels import target


def _narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(x.shape)


def _widen(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return TensorHandle(_narrow(src.data), tl.bfloat16)
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
        return TensorHandle(_widen(src.data), tl.float32)
    return UPSTREAM["cast_impl"](self, src, dst_type)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    if a.dtype.scalar == tl.bfloat16:
        a, b = TensorHandle(_widen(a.data), tl.float32), TensorHandle(_widen(b.data), tl.float32)
    return UPSTREAM["create_dot"](self, a, b, *rest)


def _fp_to_fp(self: InterpreterBuilder, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
        narrow = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
        return TensorHandle(narrow.view(torch.uint8).numpy(), tl.float8e4nv)
    return UPSTREAM["create_fp_to_fp"](self, src, dst_type, rounding)


MENDED = {"cast_impl": _cast, "create_dot": _dot, "create_fp_to_fp": _fp_to_fp}
UPSTREAM = {name: getattr(InterpreterBuilder, name) for name in MENDED}


def install() -> None:
    """Mend the interpreter for the rest of the process; nothing where kernels are compiled."""
    if target.interpreted():
        for name, mended in MENDED.items():
            setattr(InterpreterBuilder, name, mended)


@contextmanager
def without(name: str) -> Iterator[None]:
    """Upstream's own `name` inside a `with` block."""
    setattr(InterpreterBuilder, name, UPSTREAM[name])
    try:
        yield
    finally:
        setattr(InterpreterBuilder, name, MENDED[name])
