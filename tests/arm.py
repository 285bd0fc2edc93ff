"""Machines of ARM64, emulated: a kernel is compiled for them here, linked with `arm_driver.c`, and run by qemu.

`installed` puts that in place of the JIT and of torch's threads, for kernels of these machines only. It shows that the
code is right, on CPUs that have no more instructions than the machine is said to have, and nothing about speed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.cpu import guards, program
from fastbert.cpu.code import Code
from fastbert.cpu.instructions import NEON, NEON_BF16, NEON_DOTPROD, NEON_I8MM
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import PerWorker

TRIPLE = "aarch64-linux-gnu"
COMPILER, EMULATOR = f"{TRIPLE}-gcc", "qemu-aarch64"
PACKAGES = "Debian's qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"
DRIVER = Path(__file__).with_name("arm_driver.c")
THREADS = 2  # of the driver

# As Cortex-A72 (Graviton 1), Neoverse N1 (Graviton 2; Apple's M1 has the same dots) and Neoverse V1 (Graviton 3) are.
PLAIN = Machine("cortex-a72", "+neon" + NEON.flags, NEON)
DOTPROD = Machine("neoverse-n1", "+neon,+dotprod" + NEON.flags, NEON, None, NEON_DOTPROD)
FULL = Machine("neoverse-v1", "+neon,+dotprod,+bf16,+i8mm" + NEON.flags, NEON, NEON_BF16, NEON_I8MM)
# What qemu has of each. It knows no Neoverse V1.
CPUS = {"cortex-a72": "cortex-a72", "neoverse-n1": "neoverse-n1", "neoverse-v1": "max,sve=off"}


def lacking() -> list[str]:
    """Programs that this takes and that are not here."""
    return [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


@dataclass(frozen=True)
class Executable:
    """A kernel and its driver, and the CPU that qemu is to be."""

    path: Path
    cpu: str

    def run(self, call: program.Call) -> None:
        """All tasks of a call; its tensors are what the kernel made of them."""
        tensors = {name: x[0] for name, x in call.arguments.items() if isinstance(x, tuple) and x[0] is not None}
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors.values()}
        memory = [torch.empty(0, dtype=torch.uint8).set_(storage).numpy() for storage in storages.values()]
        numbers = {address: i for i, address in enumerate(storages)}
        places = [
            (call.kernel.places[name], numbers[x.untyped_storage().data_ptr()], x.storage_offset() * x.itemsize)
            for name, x in tensors.items()
        ]
        for name, argument in call.arguments.items():
            if isinstance(argument, PerWorker):
                places.append((call.kernel.places[name], len(memory), 0))
                memory.append(np.full(THREADS * argument.size, 0xFF, np.uint8))
        fields = [0, 0, *list(call.fields)[2:]]
        heads = [[len(fields), len(memory), len(places)], fields, [len(one) for one in memory]]
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "given", Path(folder) / "made"
            with given.open("wb") as file:
                file.writelines(np.array(head, np.int64).tobytes() for head in heads)
                file.writelines(one.tobytes() for one in memory)
                file.write(np.array(places, np.int64).tobytes())
            subprocess.run([EMULATOR, "-cpu", self.cpu, self.path, given, made], check=True)
            with made.open("rb") as file:
                for one in memory:
                    one[:] = np.frombuffer(file.read(len(one)), np.uint8)


@cache
def _driver(folder: Path) -> Path:
    made = folder / "driver.o"
    subprocess.run([COMPILER, "-O2", "-Wall", "-Werror", "-c", DRIVER, "-o", made], check=True)
    return made


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Inside, kernels of these machines are linked into `folder`, and run by qemu."""
    loaded, run = program._loaded, program.Program.run

    def link(
        machine: Machine, name: str, parameters: Sequence[str], body: Callable[[Code], None]
    ) -> tuple[int, object]:
        if machine.cpu not in CPUS:
            return loaded(machine, name, parameters, body)
        path = Path(tempfile.mkdtemp(dir=folder)) / name
        kernel = path.with_suffix(".o")
        kernel.write_bytes(program.object_code(machine, TRIPLE, name, parameters, body))
        command = [COMPILER, "-static", "-pthread", f"-Wl,--defsym=worker={name}", _driver(folder), kernel, "-o", path]
        subprocess.run(command, check=True)
        return 0, Executable(path, CPUS[machine.cpu])

    def run_for_arm(self: program.Program) -> None:
        if not any(isinstance(call.kernel.engine, Executable) for call in self.calls):
            return run(self)
        for call in self.calls:
            call.kernel.engine.run(call)
        if guards.ON:
            self._verify()
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_loaded", link)
        patch.setattr(program.Program, "run", run_for_arm)
        yield
