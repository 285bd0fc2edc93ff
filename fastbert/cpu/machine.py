"""The CPU that kernels are compiled for: which instruction sets it has, its caches, and torch's threads on it.

FASTBERT_CPU=avx512, avx2 or none takes some of it away, so that what a weaker CPU does is seen on a stronger one:
AVX-512 without bfloat16 and VNNI, AVX2, or no kernels at all. `make test CPU=...` tells torch and its libraries the
same. On ARM64 the kernels run only with FASTBERT_CPU=neon, since nobody has measured them there yet.

FASTBERT_AMX=1 has bfloat16 and int8 multiplied by AMX, whose kernels no CPU has run yet.
"""

from __future__ import annotations

import ctypes
import errno
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
    from fastbert.cpu.instructions import Bfloat16, Int8, Tiles, Vectors

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

# LLVM's names of what products of bfloat16 and int8 by AMX need.
AMX = ("amx-tile", "amx-bf16", "amx-int8")

# Of Linux on x86-64: a system call, what it is asked for, and for which part of a thread's state, the tiles of AMX.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
# What may be wrong where it says these.
REFUSALS = {
    errno.EINVAL: "a Linux before 5.16 knows no such permission",
    errno.ENOSYS: "a sandbox may forbid it",
    errno.EPERM: "a sandbox may forbid it",
    errno.EOPNOTSUPP: "this Linux, or the machine that it is a guest of, has AMX switched off",
    errno.ENOSPC: "a thread has a stack for signals that is too small for what AMX adds to them",
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

    def tiles(self, dtype: torch.dtype) -> Tiles | None:
        """What multiplies weights of a dtype by tiles; None where nothing does."""
        numbers = {torch.bfloat16: self.bfloat16, torch.int8: self.int8}.get(dtype)
        return None if numbers is None else numbers.tiles

    @property
    def described(self) -> str:
        """In words."""
        narrow = [name for name in ("bfloat16", "int8") if getattr(self, name)]
        products = " and ".join(["float32", *narrow])
        by_tiles = " and ".join(name for name in narrow if self.tiles(getattr(torch, name)) is not None)
        amx = f", of {by_tiles} by AMX" if by_tiles else ""
        return f"{self.cpu}, {self.vectors.lanes} floats a vector, products of {products}{amx}"


def lane() -> str | None:
    """What FASTBERT_CPU leaves of the CPU: a key of `LANES`; None where it is not set.

    Raises:
        ArgumentError: it is something else.
    """
    name = os.environ.get("FASTBERT_CPU") or None
    if name is not None and name not in LANES:
        raise ArgumentError("FASTBERT_CPU", repr(name), f"{', '.join(LANES)}, or nothing for all that the CPU has")
    return name


def amx_asked() -> bool:
    """Whether FASTBERT_AMX=1 asks for AMX.

    Raises:
        ArgumentError: it is something else than that, 0 or nothing.
    """
    said = os.environ.get("FASTBERT_AMX", "")
    if said not in ("", "0", "1"):
        raise ArgumentError("FASTBERT_AMX", repr(said), "1 for products by AMX, 0 or nothing for those by vectors")
    return said == "1"


def amx_refused() -> str | None:
    """Ask Linux for the tiles of AMX, for all threads of this process and for the processes that it forks.

    Returns:
        None where it gives them; else why it does not. A thread that used them then would end the process.
    """
    library = ctypes.CDLL(None, use_errno=True)
    numbers = map(ctypes.c_long, (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
    if library.syscall(*numbers) == 0:
        return None
    number = ctypes.get_errno()
    why = f": {REFUSALS[number]}" if number in REFUSALS else ""
    return f"Linux does not give this process AMX's tiles ({os.strerror(number)}{why})"


def amx_unused() -> str | None:
    """Why our kernels leave the AMX of this CPU alone; None where they don't, or it has none.

    Raises:
        ArgumentError, BackendError: as `host`.
    """
    machine = host()
    if isinstance(machine, str) or machine.tiles(torch.int8) is not None:
        return None
    import llvmlite.binding as llvm

    if not all(map(llvm.get_host_cpu_features().get, AMX)):
        return None
    if lane() is not None:
        return f"FASTBERT_CPU={lane()} is set"
    return "no CPU has run our products by AMX yet; FASTBERT_AMX=1 allows them (docs/cpu.md)"


@cache
def host() -> Machine | str:
    """The CPU at hand, as far as the `lane` leaves it; or in words why kernels are not compiled for it.

    It has AMX only where `amx_asked`; then Linux is asked for it too.

    Raises:
        ArgumentError, BackendError: FASTBERT_CPU is no lane, or one that this CPU is too weak for; FASTBERT_AMX asks
            for what the CPU, the lane or Linux does not give.
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
    if amx_asked():
        _check_amx(features)
    else:
        features.update({name: False for name in features if name.startswith("amx")})
    vectors = _first(VECTORS, features)
    if vectors is None:
        return "a CPU without AVX2"
    flags = features.flatten() + vectors.flags
    return Machine(llvm.get_host_cpu_name(), flags, vectors, _first(BFLOAT16, features), _first(INT8, features))


def _check_amx(features: Mapping[str, bool]) -> None:
    if missing := [name for name in AMX if not features.get(name)]:
        taken = f" with FASTBERT_CPU={lane()}" if lane() is not None else ""
        raise BackendError("FASTBERT_AMX", 1, f"a CPU with AMX: this one{taken} lacks {', '.join(missing)}")
    if (refused := amx_refused()) is not None:
        raise BackendError("FASTBERT_AMX", 1, f"permission to use it: {refused}")


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
