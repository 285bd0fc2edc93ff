"""Which path runs, and why.

A tensor on a GPU takes the Triton kernels; one on the CPU takes torch, and the CPU's own kernels (`fastbert.cpu`)
where they serve. Under Triton's interpreter (TRITON_INTERPRET=1, for tests) the Triton kernels also run on CPU tensors
when asked for by `use_backend("triton")`.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import target

Path = Literal["triton", "native", "torch"]
Forced = Path

_forced: Forced | None = None
_said: set[str] = set()
_counts: list[Counter[str]] = []


@dataclass(frozen=True)
class Decision:
    """The path that a call on a device takes, and the reason in words."""

    path: Path
    reason: str


@contextmanager
def use_backend(path: Forced) -> Iterator[None]:
    """Force one path inside a `with` block, for the whole process.

    `use_backend("torch")` runs plain torch on any device. `use_backend("triton")` raises BackendError where the
    kernels can't serve a call, instead of saying so once and running torch. `use_backend("native")` takes the kernels
    of this CPU also where a BLAS is known to be faster.

    Raises:
        ArgumentError: there is no such path.
        BackendError: this CPU has no kernels.
    """
    global _forced
    if path not in get_args(Path):
        raise ArgumentError("path", repr(path), "'triton', 'native' or 'torch'")
    if path == "native" and isinstance(reason := host(), str):
        raise BackendError("use_backend", reason, "a CPU for which kernels are compiled: x86-64 with AVX2, on Linux")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def first_device() -> torch.device:
    """Where to compute if nobody says: the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: torch.device | str | int) -> torch.device:
    """The device of this name.

    Raises:
        ArgumentError: it is no name of a device, or this torch can use no such device here.
    """
    try:
        return torch.empty(0, dtype=torch.uint8, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            "device", repr(device), f"one that this torch can use here, 'cpu' say ({reason})"
        ) from error


def decide(device: torch.device) -> Decision:
    """The path for tensors on `device`, were the call one that the kernels serve."""
    interpreted = _forced == "triton" and target.interpreted()
    return _decide(device, _forced, interpreted, torch.compiler.is_compiling())


@cache
def _decide(device: torch.device, forced: Forced | None, interpreted: bool, compiling: bool) -> Decision:
    if forced == "torch":
        return Decision("torch", 'use_backend("torch") is in force')
    if device.type == "cuda":
        unserved = target.unserved(target.of(device))
        return Decision("triton", "the tensor is on a GPU") if unserved is None else Decision("torch", unserved)
    if device.type == "cpu" and interpreted:
        return Decision("triton", 'use_backend("triton") is in force, under Triton\'s interpreter')
    if device.type == "cpu" and forced in (None, "native") and not compiling:  # a compiler can't see into them
        machine = host()
        if isinstance(machine, Machine):
            return Decision("native", f"the tensor is on a CPU whose kernels are compiled here: {machine.described}")
        return Decision("torch", f"the tensor is on a CPU without kernels of its own: {machine}")
    return Decision("torch", f"the tensor is on {device.type}; the Triton kernels need a GPU")


@contextmanager
def paths_taken() -> Iterator[Counter[str]]:
    """Count what computes encoders inside the block, in all threads.

    Yields:
        By executor how often it ran: "cpu", "onednn" and "folded" once for all layers, "prepared" and "eager" for each
        layer. What is compiled, or replayed as a CUDA graph, is not counted.
    """
    counts = Counter[str]()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts[:] = [other for other in _counts if other is not counts]


def take(path: str) -> None:
    """Say that an executor is about to run; see `paths_taken`."""
    if _counts and not torch.compiler.is_compiling():
        for counts in _counts:
            counts[path] += 1


def bfloat16_unserved(device: torch.device) -> str | None:
    """Why bfloat16 is slower than float32 on `device`; None where it is not, or where nobody has looked."""
    if device.type != "cpu":
        return None
    machine = host()
    if isinstance(machine, Machine):
        return None if machine.bfloat16 else f"{machine.cpu} has no instructions for bfloat16"
    return None if onednn_multiplies_bfloat16() else "torch's oneDNN finds no instructions for bfloat16"


def float16_unserved(device: torch.device) -> str | None:
    """Why float16 is slower than float32 on `device`; None where it is not, or where nobody has looked."""
    return "fastbert has no kernels for float16 on a CPU" if device.type == "cpu" else None


def int8_unserved(device: torch.device) -> str | None:
    """Why int8 is slower than float32 on `device`; None where it is not."""
    if device.type != "cpu":
        return None
    machine = host()
    if isinstance(machine, Machine):
        return None if machine.int8 else f"{machine.cpu} has no instructions for int8 (AVX512-VNNI, dotprod of ARM64)"
    return machine


def forced() -> Forced | None:
    """The path that `use_backend` has forced; None outside of it."""
    return _forced


def onednn_multiplies_bfloat16() -> bool:
    """Whether the oneDNN that torch brings multiplies bfloat16 on this CPU."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def uses_triton(op: str, x: Tensor, unserved: str | None = None) -> bool:
    """Whether `op` on `x` runs its Triton kernel; `unserved` says why the kernel can't serve this call, if it can't.

    Raises:
        BackendError: under `use_backend("triton")`, when the kernel can't run.
    """
    decision = decide(x.device)
    if decision.path == "triton" and unserved is None:
        return True
    reason = unserved if decision.path == "triton" else decision.reason
    if _forced == "triton":
        raise BackendError(op, reason, "a call that the Triton kernels serve", "Leave use_backend to run plain torch.")
    if decision.path == "triton":
        say_once(f"fastbert.{op} runs plain torch on {x.device}: {unserved}")
    return False


def say_once(message: str) -> None:
    """Warn, the first time in this process that there is this message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


def _one_thread() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


# The threads of OpenMP do not survive a fork, and a child that asks for them waits forever; reading a checkpoint is
# enough to have started them. DataLoader's workers do the same.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
