"""Registers, spills, stack and opcodes of a compiled kernel, read from the machine code itself."""

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
SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", re.MULTILINE)
# `\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], ...`; directives begin with a dot, labels with no tab
AMDGCN = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel takes.

    Attributes:
        registers: 32-bit registers a lane; on AMD vector registers, accumulators included.
        spills: instructions that move registers to or from local memory; on AMD the vector registers spilled.
        scalar_spills: scalar registers spilled, on AMD. They go to lanes of vector registers, not to memory; those that
            find no lane show in `stack`.
        stack: bytes of local memory a lane.
        opcodes: how often each instruction stands in the code, without modifiers.
    """

    registers: int
    spills: int
    scalar_spills: int
    stack: int
    opcodes: Counter[str]


def read(assembly: Mapping[str, Any]) -> Facts:
    """Facts of a kernel from its last stages, as `triton.compile` leaves them: "cubin", or "amdgcn" as text."""
    if "cubin" in assembly:
        return _read_cubin(assembly["cubin"])
    return _read_amdgcn(assembly["amdgcn"])


def _read_cubin(cubin: bytes) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opcodes = Counter(SASS.findall(text))
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return Facts(
        registers=usage["REG"],
        spills=opcodes["LDL"] + opcodes["STL"],
        scalar_spills=0,
        stack=usage["STACK"],
        opcodes=opcodes,
    )


def _read_amdgcn(text: str) -> Facts:
    notes = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return Facts(
        registers=notes["vgpr_count"],
        spills=notes["vgpr_spill_count"],
        scalar_spills=notes["sgpr_spill_count"],
        stack=notes["private_segment_fixed_size"],
        opcodes=Counter(AMDGCN.findall(text)),
    )
