"""The vector unit of this CPU, as the kernels are written for it."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """A CPU to compile for.

    Attributes:
        cpu: LLVM's name of it.
        features: LLVM's list of what it can do, "+avx512f,-amx-tile,...".
        lanes: float32 in a vector.
        registers: vector registers.
        bfloat16, int8: whether it multiplies pairs of bfloat16, and fours of int8.
    """

    cpu: str
    features: str
    lanes: int
    registers: int
    bfloat16: bool
    int8: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What the kernels read and write."""
        return (torch.float32, torch.bfloat16) if self.bfloat16 else (torch.float32,)

    @property
    def described(self) -> str:
        """In words."""
        narrow = [name for name in ("bfloat16", "int8") if getattr(self, name)]
        return f"{self.cpu}, {self.lanes} floats a vector, products of {' and '.join(['float32', *narrow])}"


@cache
def host() -> Machine | str:
    """The CPU at hand; or in words why kernels are not compiled for it."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"{platform.system()} on {platform.machine()}: CPU kernels are written for Linux on x86-64"
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return "llvmlite is not installed"
    try:
        openmp()
    except (OSError, AttributeError) as error:
        return f"torch's OpenMP can't be used: {error}"
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        return "a CPU without AVX2"
    wide = all(features.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl"))
    # LLVM prefers vectors of 256 bits on many CPUs with AVX-512 unless it is told.
    flags = features.flatten() + (",-prefer-256-bit" if wide else "")
    return Machine(
        llvm.get_host_cpu_name(),
        flags,
        lanes=16 if wide else 8,
        registers=32 if wide else 16,
        bfloat16=wide and bool(features.get("avx512bf16")),
        int8=wide and bool(features.get("avx512vnni")),
    )


@cache
def last_cache() -> int:
    """Bytes of the last cache before the memory, which cores share; 32 MiB where Linux does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=2**25)


@cache
def openmp() -> dict[str, Any]:
    """Functions of the OpenMP that torch runs on, by name: what is started with them runs on torch's threads.

    Raises:
        OSError, AttributeError: torch brings no such thing.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return {name: getattr(library, name) for name in ("GOMP_parallel", "GOMP_barrier")}


@cache
def made_by_amd() -> bool:
    """Whether the CPU at hand is AMD's."""
    machine = host()
    return isinstance(machine, Machine) and machine.cpu.startswith("znver")


def multiplies_well() -> bool:
    """Whether products of floats by a kernel of ours were measured to be faster than a BLAS: with AVX-512 on Zen 4.

    Not measured on Intel's, whose AMX multiplies bfloat16 faster than any vectors, and whose BLAS torch brings.
    """
    machine = host()
    return made_by_amd() and isinstance(machine, Machine) and machine.lanes == 16
