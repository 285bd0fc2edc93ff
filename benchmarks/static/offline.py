"""Compile every kernel for every GPU we know, as its launcher would, on a machine without one.

    python benchmarks/static/offline.py [--arch sm_90 ...] [--exhaustive]

The project's own launchers run on CPU tensors under a Triton driver that answers for the target and launches nothing,
so that each kernel is specialised exactly as on the real device. A kernel that does not compile, does not fit shared
memory, spills, or leaves the matrix units idle is a violation; any makes the exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.driver import driver

from fastbert.errors import BackendError
from fastbert.kernels.target import KNOWN, Target, interpreted, pretend

sys.path.append(str(Path(__file__).parent))
import cases
import machine_code

ARCHS = [arch for arch, target in KNOWN.items() if target.backend != "interpreter"]

BINARIES = {".cubin", ".hsaco"}

# Triton keeps compiled kernels by device: a fresh number makes each `offline` compile anew.
_devices = itertools.count()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, which did not happen.

    Attributes:
        kernel: its name.
        key: the hash of what was compiled; launches with the same key run the same code.
        grid: programs along x, y, z.
        constexprs: its compile-time arguments by name.
        num_warps, num_stages: as launched.
        shared: bytes of shared memory a program takes.
        assembly: the text (bytes for the last) of each stage of compilation by its name: "ttir", "ptx", "cubin"...
    """

    kernel: str
    key: str
    grid: tuple[int, int, int]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    shared: int
    assembly: dict[str, str | bytes]


class OfflineDriver:
    """What Triton asks of a driver, for a GPU that is not there; it appends to `launches` in place of launching."""

    def __init__(self, target: Target) -> None:
        arch = int(target.arch.removeprefix("sm_")) if target.backend == "cuda" else target.arch
        self.target = GPUTarget(target.backend, arch, target.warp_size)
        self.device = next(_devices)
        self.launches: list[Launch] = []
        self.files: dict[str, dict[str, str]] = {}
        self.utils = SimpleNamespace(
            # Shared memory without end: a kernel that asks for too much is recorded, and reported by `violations`.
            get_device_properties=lambda device: {"max_shared_mem": sys.maxsize},
            # module, function, registers, spills, most threads of a block
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def compiled(self, *, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        """Triton's listener: remember where the stages of a compilation were stored."""
        self.files[metadata["hash"]] = metadata_group

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls once for a compiled kernel to get the function that launches it."""
        files = [Path(name) for name in self.files[metadata.hash].values()]
        assembly = {
            file.suffix[1:]: file.read_bytes() if file.suffix in BINARIES else file.read_text()
            for file in files
            if file.suffix != ".json"
        }
        params = src.fn.params
        constexprs = {params[i].name: value for (i, *_), value in src.constants.items() if params[i].is_constexpr}

        def launch(x: int, y: int, z: int, *given: Any) -> None:
            _, _, _, described, enter, leave, *_ = given
            enter(described)  # as real launchers call the hooks of profilers
            self.launches.append(
                Launch(
                    metadata.name,
                    metadata.hash,
                    (x, y, z),
                    constexprs,
                    metadata.num_warps,
                    metadata.num_stages,
                    metadata.shared,
                    assembly,
                )
            )
            leave(described)

        return launch


@contextmanager
def offline(target: Target) -> Iterator[list[Launch]]:
    """Make launches compile for `target` and be recorded in the yielded list, in place of running.

    Launch choices are made for `target`, and Triton's cache is an empty one, so that nothing stale hides a failure.
    One at a time in a process.

    Raises:
        BackendError: under TRITON_INTERPRET, which has made the kernels functions that nothing compiles.
    """
    if interpreted():
        raise BackendError(
            "TRITON_INTERPRET",
            1,
            "a process without it",
            "Triton reads it when kernels are decorated: start a new one.",
        )
    offline_driver = OfflineDriver(target)
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, pretend(target), knobs.compilation.scope(), knobs.cache.scope():
        knobs.cache.dir = cache
        knobs.compilation.listener = offline_driver.compiled
        driver.set_active(offline_driver)
        try:
            yield offline_driver.launches
        finally:
            driver.set_active(None)  # as at the start: the real driver, if any, is found when it is asked for


@dataclass(frozen=True)
class Finding:
    """What came of compiling one kernel for one target.

    Attributes:
        case: what was compiled.
        launch: warps and stages in words.
        registers, scalar_spills: as in `machine_code.Facts`.
        shared: bytes of shared memory a program.
        violations: what is wrong with it, each in words.
    """

    case: str
    launch: str
    registers: int
    scalar_spills: int
    shared: int
    violations: list[str]


def violations(launch: Launch, facts: machine_code.Facts, target: Target, matrix: tuple[str, ...]) -> list[str]:
    """What is wrong with the code of a launch, each in words; `matrix` as in `cases.Case`."""
    found = []
    if facts.spills:
        found.append(f"{facts.spills} spills")
    if facts.stack:
        found.append(f"{facts.stack} bytes of stack a lane")
    if launch.shared > target.shared_memory:
        found.append(f"{launch.shared} bytes of shared memory of {target.shared_memory}")
    if matrix and not any(opcode.startswith(matrix) for opcode in facts.opcodes):
        found.append(f"no {' or '.join(matrix)} instruction")
    return found


def inspect(target: Target, calls: Iterable[cases.Case]) -> Iterator[Finding]:
    """A finding for each kernel that these calls compile, the first time it is met."""
    seen: set[str] = set()
    with offline(target) as launches:
        for case in calls:
            try:
                case.run()
            except (TritonError, RuntimeError) as error:  # Triton raises a bare RuntimeError where a pass fails
                said = " ".join(str(error).split())
                yield Finding(case.name, "", 0, 0, 0, [f"does not compile: {said}"])
            else:
                if not launches:
                    yield Finding(case.name, "", 0, 0, 0, ["launches nothing"])
            for launch in launches:
                if launch.key not in seen:
                    seen.add(launch.key)
                    facts = machine_code.read(launch.assembly)
                    found = violations(launch, facts, target, case.matrix)
                    shape = f"{launch.num_warps} warps, {launch.num_stages} stages"
                    yield Finding(case.name, shape, facts.registers, facts.scalar_spills, launch.shared, found)
            launches.clear()


def inspect_arch(arch: str, exhaustive: bool) -> int:
    """Print each finding for one target as it is made; how many have violations."""
    begin = time.perf_counter()
    target = KNOWN[arch]
    kernels = wrong = 0
    for finding in inspect(target, cases.exhaustive(target) if exhaustive else cases.main(target)):
        kernels += 1
        wrong += bool(finding.violations)
        verdict = "; ".join(finding.violations) or "ok"
        print(
            f"{arch:8} {finding.case:64} {finding.launch:18} {finding.registers:4} registers "
            f"{finding.scalar_spills:3} scalar spills {finding.shared:6} B shared  {verdict}",
            flush=True,
        )
    print(f"{arch}: {kernels} kernels in {time.perf_counter() - begin:.0f} s", flush=True)
    return wrong


def main() -> int:
    """The command; its exit status is 1 if there is any violation."""
    parser = argparse.ArgumentParser(description="Compile the kernels offline and check their machine code.")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a target, may be repeated; default: all")
    parser.add_argument("--exhaustive", action="store_true", help="every launch choice and branch, not the main shapes")
    arguments = parser.parse_args()
    # Fresh processes: Triton's compiler is not safe to fork.
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        wrong = sum(pool.map(inspect_arch, arguments.arch or ARCHS, itertools.repeat(arguments.exhaustive)))
    print(f"{wrong} with violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
