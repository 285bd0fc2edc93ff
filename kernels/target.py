"""What the device is: the facts that launch choices are made from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """A kind of device; there is one object of each.

    Attributes:
        backend: "cuda", "hip", or "interpreter" (Triton's, on the CPU).
        arch: "sm_90", "gfx942", or "interpreter".
        warp_size: lanes in a warp.
        shared_memory: bytes of shared memory one program may use.
    """

    backend: Literal["cuda", "hip", "interpreter"]
    arch: str
    warp_size: int
    shared_memory: int

    @property
    def capability(self) -> int:
        """Of one of NVIDIA's: 90 for sm_90."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def kin(self) -> str:
        """The target of `KNOWN` whose launch choices it takes: itself, or the nearest that is not newer."""
        if self.arch in KNOWN:
            return self.arch
        return _amd_kin(self.arch) if self.backend == "hip" else _nvidia_kin(self.capability)


# Shared memory a block may opt in to: CUDA C++ programming guide, table "technical specifications per compute
# capability"; AMD: 64 KiB of LDS a workgroup (CDNA and RDNA ISA guides).
KNOWN: dict[str, Target] = {
    target.arch: target
    for target in (
        Target("cuda", "sm_80", 32, 163 * 1024),
        Target("cuda", "sm_86", 32, 99 * 1024),
        Target("cuda", "sm_89", 32, 99 * 1024),
        Target("cuda", "sm_90", 32, 227 * 1024),
        Target("cuda", "sm_100", 32, 227 * 1024),
        Target("cuda", "sm_120", 32, 99 * 1024),
        Target("hip", "gfx90a", 64, 64 * 1024),
        Target("hip", "gfx942", 64, 64 * 1024),
        Target("hip", "gfx1100", 32, 64 * 1024),
        Target("interpreter", "interpreter", 32, 99 * 1024),
    )
}


_pretended: Target | None = None


@contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Make `of` answer `target` for every device: for compiling and launch-choice checks on a machine without it."""
    global _pretended
    before, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = before


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for in the environment."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def of(device: torch.device) -> Target:
    """The target that tensors on `device` run on."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":  # where no kernel of Triton's runs but by its interpreter
        return KNOWN["interpreter"]
    return _of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return KNOWN.get(arch) or Target("hip", arch, properties.warp_size, 64 * 1024)
    arch = f"sm_{properties.major}{properties.minor}"
    return KNOWN.get(arch) or Target("cuda", arch, 32, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # not in the stubs


def _nvidia_kin(capability: int) -> str:
    """Of the two Blackwells sm_120 has no tcgen05, which sm_10x and sm_11x have."""
    if capability // 10 in (10, 11):
        return "sm_100"
    known = [one.capability for one in KNOWN.values() if one.backend == "cuda"]
    return f"sm_{max([one for one in known if one <= capability], default=80)}"


def _amd_kin(arch: str) -> str:
    """CDNA's are called gfx9.., RDNA's gfx1...; CDNA 2 is gfx90a, what follows it has the matrix units of gfx942."""
    if not re.fullmatch("gfx9..", arch):
        return "gfx1100"
    return "gfx90a" if arch.startswith("gfx90") else "gfx942"


def unserved(target: Target) -> str | None:
    """Why no kernel of ours is for a GPU, or None.

    Matrix units for bfloat16 begin with sm_80, CDNA 2 (gfx90a) and RDNA 3 (gfx11..), and for older ones the kernels
    were never compiled.
    """
    if target.backend == "cuda" and target.capability < 80:
        return f"{target.arch}: the Triton kernels need sm_80 (Ampere) or later"
    if target.backend == "hip" and not re.fullmatch("gfx(90a|9[4-9].|1[1-9]..)", target.arch):
        return f"{target.arch}: the Triton kernels need CDNA 2, RDNA 3 or later"
    return None


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors (on AMD: compute units) the GPU has; 2 for a CPU, where kernels are interpreted."""
    return 2 if device.type == "cpu" else _multiprocessors(device.index)


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


_NOWHERE_ELSE = nullcontext()


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` current around a launch: Triton launches on the current device, whatever the pointers."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else _NOWHERE_ELSE


def aligned(x: Tensor) -> Tensor:
    """`x` itself when kernels can read it in 16-byte pieces, else one contiguous copy.

    That takes a last stride of 1, a base and other strides that are multiples of 16 bytes, and strides below 2^22
    elements, so that offsets inside a tile fit 32 bits.
    """
    per_piece = 16 // x.element_size()
    outer = x.stride()[:-1]
    fits = x.stride(-1) == 1 and all(stride % per_piece == 0 and stride < 1 << 22 for stride in outer)
    if fits and x.data_ptr() % 16 == 0:
        return x
    copy = x.contiguous()  # not a copy where only the base is misaligned
    return copy if copy.data_ptr() % 16 == 0 else copy.clone()
