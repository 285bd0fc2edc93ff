"""Mends of Triton's interpreter, only for tests; and a lane in which it contracts multiply-adds.

Up to 3.9.0 it multiplies bfloat16 bits as integers in `tl.dot`, truncates to bfloat16 where hardware rounds, and loses
the subnormal ones; what rounds up to the next power of two in float8 becomes half of it; and `tl.fma` rounds twice.
test_interpreter.py says when upstream no longer needs a mend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def _fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32, rounded once but for the rare tie: a product has 48 bits, float64 53."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if z.dtype.scalar == tl.float32:
        return TensorHandle(_fused(x.data, y.data, z.data), tl.float32)
    return UPSTREAM["create_fma"](self, x, y, z)


MENDED = {"cast_impl": _cast, "create_dot": _dot, "create_fp_to_fp": _fp_to_fp, "create_fma": _fma}
UPSTREAM = {name: getattr(InterpreterBuilder, name) for name in MENDED}

FACTORS = "factors"


def _multiply(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle) -> TensorHandle:
    product = PLAIN["create_fmul"](self, x, y)
    if product.dtype.scalar == tl.float32:
        product.set_attr(FACTORS, np.broadcast_arrays(x.data, y.data))
    return product


def _add(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle) -> TensorHandle:
    for product, other in ((x, y), (y, x)):
        if FACTORS in product.attr:
            return TensorHandle(_fused(*product.attr[FACTORS], other.data), tl.float32)
    return PLAIN["create_fadd"](self, x, y)


def _subtract(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle) -> TensorHandle:
    if FACTORS in y.attr:
        a, b = y.attr[FACTORS]
        return TensorHandle(_fused(-a, b, x.data), tl.float32)
    if FACTORS in x.attr:
        return TensorHandle(_fused(*x.attr[FACTORS], -y.data), tl.float32)
    return PLAIN["create_fsub"](self, x, y)


def _expand_dims(self: InterpreterBuilder, x: TensorHandle, axis: int) -> TensorHandle:
    return _moved(x, PLAIN["create_expand_dims"](self, x, axis), lambda factor: np.expand_dims(factor, axis))


def _broadcast(self: InterpreterBuilder, x: TensorHandle, shape: Any) -> TensorHandle:
    return _moved(x, PLAIN["create_broadcast"](self, x, shape), lambda factor: np.broadcast_to(factor, shape))


def _splat(self: InterpreterBuilder, type_: Any, x: TensorHandle) -> TensorHandle:
    return _moved(x, PLAIN["create_splat"](self, type_, x), lambda factor: np.broadcast_to(factor, type_.shape))


def _moved(x: TensorHandle, result: TensorHandle, move: Callable[[np.ndarray], np.ndarray]) -> TensorHandle:
    if FACTORS in x.attr:
        result.set_attr(FACTORS, [move(factor) for factor in x.attr[FACTORS]])
    return result


CONTRACTING = {
    "create_fmul": _multiply,
    "create_fadd": _add,
    "create_fsub": _subtract,
    "create_expand_dims": _expand_dims,
    "create_broadcast": _broadcast,
    "create_splat": _splat,
}
PLAIN = {name: getattr(InterpreterBuilder, name) for name in CONTRACTING}


@contextmanager
def contracting() -> Iterator[None]:
    """Inside a `with` block a float32 product that is added to or subtracted from is not rounded before.

    So compilers for GPUs do it, where they like.
    """
    for name, contracted in CONTRACTING.items():
        setattr(InterpreterBuilder, name, contracted)
    try:
        yield
    finally:
        for name, plain in PLAIN.items():
            setattr(InterpreterBuilder, name, plain)


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
