"""Registers, spills, stack and instructions of a compiled kernel, read from the machine code itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# Triton's wheel carries NVIDIA's disassembler.
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# How the names of the instructions begin that multiply matrices of half types at full rate.
MATRIX = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx90a": "v_mfma_",
    "gfx942": "v_mfma_",
    "gfx1100": "v_wmma_",
}

# `        /*0040*/  @!P0 FFMA.FTZ R1, R2, R3, R4 ;  /* 0x... */`, the encoding on the next line
SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
# `\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], ...`; directives begin with a dot. `.LBB0_3:` is a label.
AMDGCN = re.compile(r"^(?:\t([a-z]\w+)([^;\n]*)|(\.L\w+):)", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        name: with its modifiers: "LDG.E.128", "v_fma_f32".
        operands: the rest, as the disassembler prints it.
        predicate: on NVIDIA the register that decides whether a lane runs it: "P0", "!P0"; "!PT" means none does.
        target: where a branch goes, as an index into the code.
    """

    name: str
    operands: str
    predicate: str
    target: int | None

    @property
    def opcode(self) -> str:
        """The name without modifiers; AMD's names have none."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel takes.

    Attributes:
        registers: 32-bit registers a lane; on AMD vector registers, accumulators included.
        spills: instructions that move registers to or from local memory; on AMD the vector registers spilled.
        scalar_spills: scalar registers spilled, on AMD. They go to lanes of vector registers, not to memory; those that
            find no lane show in `stack`.
        stack: bytes of local memory a lane.
        code: the instructions in the order they stand in.
    """

    registers: int
    spills: int
    scalar_spills: int
    stack: int
    code: tuple[Instruction, ...]

    @property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the code, without modifiers."""
        return Counter(instruction.opcode for instruction in self.code)


def read(assembly: Mapping[str, Any]) -> Facts:
    """Facts of a kernel from its last stages, as `triton.compile` leaves them: "cubin", or "amdgcn" as text."""
    if "cubin" in assembly:
        return read_sass(disassemble(assembly["cubin"]))
    return read_amdgcn(assembly["amdgcn"])


def disassemble(cubin: bytes) -> str:
    """What cuobjdump prints: the resources taken and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_sass(text: str) -> Facts:
    """Facts from what `disassemble` returns."""
    found = SASS.findall(text)
    index = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    code = []
    for _, predicate, name, operands in found:
        jump = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        target = index.get(int(jump[1], 16)) if jump else None
        code.append(Instruction(name, operands.strip(), predicate, target))
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    spills = sum(instruction.opcode in ("LDL", "STL") for instruction in code)
    return Facts(usage["REG"], spills, scalar_spills=0, stack=usage["STACK"], code=tuple(code))


def read_amdgcn(text: str) -> Facts:
    """Facts from AMD's assembly as text, with the metadata at its end."""
    notes = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    labels: dict[str, int] = {}
    found = []
    for name, operands, label in AMDGCN.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append((name, operands.strip()))
    code = tuple(
        Instruction(name, operands, "", labels.get(operands) if "branch" in name else None) for name, operands in found
    )
    return Facts(
        registers=notes["vgpr_count"],
        spills=notes["vgpr_spill_count"],
        scalar_spills=notes["sgpr_spill_count"],
        stack=notes["private_segment_fixed_size"],
        code=code,
    )
