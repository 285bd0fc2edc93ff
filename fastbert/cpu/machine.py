"""The CPU that kernels are compiled for: which instruction sets it has, its caches, and torch's threads on it.

FASTBERT_CPU=avx512, avx2 or none takes some of it away, so that what a weaker CPU does is seen on a stronger one:
AVX-512 without bfloat16 and VNNI, AVX2, or no kernels at all. `make test CPU=...` tells torch and its libraries the
same. On ARM64 the kernels run only with FASTBERT_CPU=neon, since nobody has measured them there yet.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastbert.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from fastbert.cpu.instructions import Bfloat16, Int8, Vectors

_Set = TypeVar("_Set", "Vectors", "Bfloat16", "Int8")

# What each lane leaves of the features of a CPU whose names begin with "avx" and "amx". ARM64 has none of those.
LANES = {
    "avx512": {"avx", "avx2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "avx2": {"avx", "avx2"},
    "neon": {"neon"},
    "none": set[str](),
}

# Features of ARM64 that kernels need, by LLVM's names: where Linux says so, an entry of getauxval (HWCAP, HWCAP2) and a
# bit of it, from asm/hwcap.h; and Apple's name, of "hw.optional.".
ARM64 = {
    "neon": (16, 1, "AdvSIMD"),
    "dotprod": (16, 20, "arm.FEAT_DotProd"),
    "bf16": (26, 14, "arm.FEAT_BF16"),
    "i8mm": (26, 13, "arm.FEAT_I8MM"),
}


@dataclass(frozen=True)
class Machine:
    """A CPU to compile for.

    Attributes:
        cpu: LLVM's name of it.
        features: LLVM's list of what it can do, "+avx512f,-amx-tile,...".
        vectors: how it computes in float32.
        bfloat16, int8: how it multiplies those; None where no instruction does.
    """

    cpu: str
    features: str
    vectors: Vectors
    bfloat16: Bfloat16 | None = None
    int8: Int8 | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What the kernels read and write."""
        return (torch.float32, torch.bfloat16) if self.bfloat16 else (torch.float32,)

    @property
    def described(self) -> str:
        """In words."""
        narrow = [name for name in ("bfloat16", "int8") if getattr(self, name)]
        return f"{self.cpu}, {self.vectors.lanes} floats a vector, products of {' and '.join(['float32', *narrow])}"


def lane() -> str | None:
    """What FASTBERT_CPU leaves of the CPU: a key of `LANES`; None where it is not set.

    Raises:
        ArgumentError: it is something else.
    """
    name = os.environ.get("FASTBERT_CPU") or None
    if name is not None and name not in LANES:
        raise ArgumentError("FASTBERT_CPU", repr(name), f"{', '.join(LANES)}, or nothing for all that the CPU has")
    return name


@cache
def host() -> Machine | str:
    """The CPU at hand, as far as the `lane` leaves it; or in words why kernels are not compiled for it.

    Raises:
        ArgumentError, BackendError: FASTBERT_CPU is no lane, or one that this CPU is too weak for.
    """
    if lane() == "none":
        return "FASTBERT_CPU=none is set"
    where = f"{platform.system()} on {platform.machine()}"
    arm = where in ("Linux on aarch64", "Darwin on arm64")
    if not arm and where not in ("Linux on x86_64", "Linux on AMD64"):
        return f"{where}: CPU kernels are written for Linux on x86-64"
    if arm and lane() is None:
        return f"{where}: kernels for it ran in an emulator and never on such a CPU; FASTBERT_CPU=neon takes them"
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return "llvmlite is not installed"
    from fastbert.cpu.instructions import BFLOAT16, INT8, VECTORS

    try:
        openmp()
    except (OSError, AttributeError) as error:
        return f"torch's OpenMP can't be used: {error}"
    features = llvm.get_host_cpu_features()
    if arm:
        features.update(arm64_features())
    if (kept := LANES.get(lane() or "")) is not None:
        if missing := sorted(name for name in kept if not features.get(name)):
            raise BackendError("FASTBERT_CPU", lane(), f"what this CPU has: it lacks {', '.join(missing)}")
        for name in features:
            features[name] = features[name] and (name in kept or not name.startswith(("avx", "amx")))
    vectors = _first(VECTORS, features)
    if vectors is None:
        return "a CPU without AVX2"
    flags = features.flatten() + vectors.flags
    return Machine(llvm.get_host_cpu_name(), flags, vectors, _first(BFLOAT16, features), _first(INT8, features))


def _first(sets: Sequence[_Set], features: Mapping[str, bool]) -> _Set | None:
    """The first of these instruction sets of which nothing is missing."""
    return next((one for one in sets if all(map(features.get, one.needs))), None)


def arm64_features() -> dict[str, bool]:
    """Which features of `ARM64` the CPU at hand has. LLVM's own list leaves out some of them."""
    libc = ctypes.CDLL(None)
    if platform.system() == "Darwin":
        return {name: _sysctl(libc, f"hw.optional.{apple}") == 1 for name, (_, _, apple) in ARM64.items()}
    libc.getauxval.argtypes, libc.getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return {name: bool(libc.getauxval(entry) >> bit & 1) for name, (entry, bit, _) in ARM64.items()}


def _sysctl(libc: Any, name: str) -> int:
    """A number that macOS knows by this name; 0 where it does not know it."""
    number, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    libc.sysctlbyname(name.encode(), ctypes.byref(number), ctypes.byref(size), None, ctypes.c_size_t(0))
    return number.value


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
    file = "libtorch_cpu.dylib" if platform.system() == "Darwin" else "libtorch_cpu.so"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / file))
    return {name: getattr(library, name) for name in ("GOMP_parallel", "GOMP_barrier")}
