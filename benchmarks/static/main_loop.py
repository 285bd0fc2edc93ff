"""What the main loop of a kernel is made of: instructions by pipe for a unit of work, and the time they imply.

docs/static.md defines the figures. Counts are read from machine code; times are predicted from published rates, on the
assumption that everything overlaps, and nothing was timed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import machine_code
from machine_code import Facts, Instruction
from offline import Launch

from fastbert.kernels.target import Target

# NVIDIA's opcodes by the pipe they hold; those named nowhere are integer and logic: "alu".
SASS_PIPES = {
    "tensor": "HMMA HGMMA IMMA QGMMA DMMA UTCHMMA UTCQMMA UTCIMMA",
    "fp32": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FSWZADD FFMA32I FMUL32I FADD32I",
    "fp16": "HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2 HADD2_32I HFMA2_MMA",
    "cvt": "F2FP F2F I2F F2I I2FP FRND I2I",
    "mufu": "MUFU",
    "shared": "LDS STS LDSM STSM ATOMS MOVM LDTM STTM",
    "global": "LDG STG LDGSTS UTMALDG UTMASTG UTMAREDG RED REDG ATOM ATOMG UBLKCP LD ST",
    "local": "LDL STL",
    "shfl": "SHFL",
    "sync": "BAR DEPBAR LDGDEPBAR WARPSYNC MEMBAR FENCE WARPGROUP WARPGROUPSET SYNCS ARRIVES ERRBAR CCTL NANOSLEEP "
    "UCGABAR_WAIT UCGABAR_ARV USETMAXREG UTMACMDFLUSH UTMACCTL ELECT",
    "control": "BRA BRX EXIT CALL RET BSSY BSYNC NOP S2R S2UR CS2R BREAK YIELD LDC ULDC LDCU BPT JMP VOTE VOTEU R2UR "
    "PREEXIT ACQBULK R2P P2R",
}
SASS_PIPE = {opcode: pipe for pipe, opcodes in SASS_PIPES.items() for opcode in opcodes.split()}

# AMD's by how the name begins, first that fits wins. VALU is told apart into the kinds that NVIDIA's pipes have.
AMD_PIPES = (
    ("tensor", r"v_(mfma|smfmac|wmma|swmmac)_"),
    ("mufu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("cvt", r"v_(cvt|rndne|trunc|floor|ceil)_"),
    ("shfl", r"ds_(b?permute|swizzle)_"),
    ("shared", r"ds_"),
    ("local", r"scratch_"),
    ("global", r"(global|buffer|flat)_(load|store|atomic)"),
    ("imad", r"v_mad_[iu]|v_mul_(lo|hi)_"),
    ("fp32", r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|fmaak|fmamk|mac|mad)_(legacy_)?f32"),
    ("fp16", r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad)_f16|v_(fma_mix|mad_mix|dot)"),
    ("alu", r"v_"),
    ("sync", r"s_(waitcnt|wait_|barrier|sleep)|global_wb|buffer_(wb|inv|gl)"),
    ("control", r"s_(c?branch|cbranch|endpgm|nop|clause|delay_alu|setreg|getreg|load|call|setpc|code_end)"),
    ("uniform", r"s_"),
)

MATH = ("fp32", "fp16", "cvt", "alu", "imad")


def pipe(instruction: Instruction) -> str:
    """The pipe that an instruction holds."""
    opcode = instruction.opcode
    if opcode[0].islower():
        return next(name for name, pattern in AMD_PIPES if re.match(pattern, opcode))
    if opcode in SASS_PIPE:
        return SASS_PIPE[opcode]
    if opcode.startswith("IMAD") or opcode == "IDP":
        return "imad"
    return "uniform" if opcode.startswith("U") or opcode == "REDUX" else "alu"


def access_bits(instruction: Instruction) -> int:
    """Bits that a lane moves in one global access."""
    name = instruction.name
    amd = re.search(r"_(?:dwordx(\d)|(dword)|[su]?(short|byte)|b(\d+))", name) if name[0].islower() else None
    if amd:
        words, word, part, bits = amd.groups()
        return int(bits or 0) or (32 * int(words or 1) if words or word else {"short": 16, "byte": 8}[part])
    sass = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(sass[1]) if sass else 32


def loops(code: Sequence[Instruction]) -> list[range]:
    """Loops that hold no other, in the order of the code.

    A loop is what a branch backwards encloses. Short ones are waits on a barrier, and what follows the last exit is
    such waits and padding.
    """
    exits = [i for i, instruction in enumerate(code) if instruction.opcode in ("EXIT", "s_endpgm")]
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code[: exits[-1] if exits else len(code)]):
        if instruction.target is not None and instruction.target <= i:
            body = code[instruction.target : i + 1]
            waits = any(each.opcode in ("SYNCS", "NANOSLEEP") for each in body)
            if len(body) >= (16 if waits else 6):
                ends[instruction.target] = i + 1
    found = [range(first, end) for first, end in sorted(ends.items())]
    return [
        one for one in found if not any(other != one and one[0] <= other[0] <= other[-1] <= one[-1] for other in found)
    ]


def main_loop(code: Sequence[Instruction]) -> range:
    """The innermost loop with the most matrix work, else the longest; the whole kernel where there is no loop.

    Of two with the same matrix work it is the shorter: the loop over full blocks, and not that over the masked rest.
    """

    def weight(loop: range) -> tuple[float, int]:
        work = sum(matrix_flops(code[i]) for i in loop)
        return work, -len(loop) if work else len(loop)

    return max(loops(code), key=weight, default=range(len(code)))


# Multiply-adds of NVIDIA's older matrix instructions, whose shape is written without separators.
MMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32, "884": 8 * 8 * 4, "1684": 16 * 8 * 4}


def matrix_flops(instruction: Instruction) -> int:
    """FLOPs of one matrix instruction for all its lanes (a warp, or the four of HGMMA); 0 for any other instruction."""
    if pipe(instruction) != "tensor":
        return 0
    shape = re.search(r"(\d+)x(\d+)x(\d+)", instruction.name)
    if shape:
        return 2 * math.prod(int(size) for size in shape.groups())
    old = re.search(r"\.(\d+)\b", instruction.name)
    return 2 * MMA[old[1]] if old else 0


@dataclass(frozen=True)
class Rates:
    """What a multiprocessor does in a cycle, for the predicted times.

    Cycles that a warp's instruction holds its pipe on one of the four schedulers follow from results a cycle and
    multiprocessor in the CUDA C++ programming guide, table "throughput of native arithmetic instructions"; clocks,
    multiprocessors and dense float16 rates are those of the white papers.

    Attributes:
        multiprocessors, ghz: of the whole GPU.
        matrix: dense float16 FLOPs a cycle and scheduler.
        mma: the share of it that HMMA reaches; less than 1 where HGMMA has a path of its own (from memory, about).
        fp32: cycles of a warp's FFMA.
    """

    multiprocessors: int
    ghz: float
    matrix: int
    mma: float
    fp32: float


RATES = {"sm_80": Rates(108, 1.41, 512, 1.0, 2), "sm_90": Rates(132, 1.83, 1024, 0.62, 1)}

# What shares a unit of the machine. Memory instructions go through one unit of the multiprocessor.
UNITS = {
    "fp32": "fma",
    "fp16": "fma",
    "imad": "fma",
    "alu": "alu",
    "cvt": "alu",
    "mufu": "mufu",
    "tensor": "tensor",
    "shared": "memory",
    "global": "memory",
    "local": "memory",
    "shfl": "memory",
    "uniform": "uniform",
}


def cycles(instruction: Instruction, rates: Rates) -> float:
    """Cycles that a warp's instruction holds its unit, as one scheduler of four sees it."""
    kind = pipe(instruction)
    if kind == "tensor":
        if instruction.opcode == "HGMMA":
            return matrix_flops(instruction) / (4 * rates.matrix)  # the four warps of it run on four schedulers
        half = 0.5 if "TF32" in instruction.name else 1.0
        return matrix_flops(instruction) / (rates.matrix * rates.mma * half)
    if kind in ("shared", "global", "local"):
        return 4.0 * _words(instruction)
    return {"fp32": rates.fp32, "fp16": 1.0, "imad": 2.0, "alu": 2.0, "cvt": 2.0, "mufu": 8.0, "shfl": 4.0}.get(
        kind, 2.0
    )


def _words(instruction: Instruction) -> int:
    """32-bit words a lane that a memory instruction moves."""
    if instruction.opcode in ("LDSM", "STSM", "MOVM"):
        matrices = re.search(r"\.([24])\b", instruction.name)
        return int(matrices[1]) if matrices else 1
    return max(1, access_bits(instruction) // 32)


def programs_per_multiprocessor(facts: Facts, warps: int, shared: int, target: Target) -> int:
    """How many programs of a kernel run on one multiprocessor (on AMD: compute unit) at once."""
    if target.backend == "hip":
        # CDNA: 512 registers a lane on each of 4 SIMDs, at most 8 waves. RDNA 3, a compute unit: 1536 on each of 2, 16.
        registers, granule, simds, most = (512, 8, 4, 8) if target.warp_size == 64 else (1536, 24, 2, 16)
        waves = min(most, registers // _round_up(facts.registers, granule)) * simds
        return min(waves // warps, target.shared_memory // max(1, shared))
    # CUDA C++ programming guide, "technical specifications per compute capability". Registers are granted to a warp in
    # units of 256, on the scheduler that owns it; each program takes another KiB of shared memory.
    most_warps, most_programs = {"sm_86": (48, 16), "sm_89": (48, 24), "sm_120": (48, 24)}.get(target.arch, (64, 32))
    by_registers = 4 * (65536 // 4 // _round_up(facts.registers * 32, 256)) // warps
    by_shared = (target.shared_memory + 1024) // _round_up(shared + 1024, 128)
    return min(by_registers, by_shared, most_warps // warps, most_programs)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def figures(facts: Facts, target: Target, *, warps: int, shared: int, unit: int) -> dict[str, Any]:
    """All figures of one compiled kernel, as docs/static.md defines them.

    Args:
        warps, shared: of the launch; bytes.
        unit: units of work (scores, elements of the result) of a program in one trip of the main loop, or in all where
            there is no loop.
    """
    span = main_loop(facts.code)
    body = [instruction for instruction in (facts.code[i] for i in span) if instruction.predicate != "!PT"]
    pipes = Counter(pipe(instruction) for instruction in body)
    lanes = target.warp_size * warps / unit
    flops = sum(matrix_flops(each) * warps / (4 if each.opcode == "HGMMA" else 1) for each in body)
    found = {
        "registers": facts.registers,
        "spills": facts.spills,
        "scalar_spills": facts.scalar_spills,
        "stack": facts.stack,
        "shared": shared,
        "warps": warps,
        "programs_per_multiprocessor": programs_per_multiprocessor(facts, warps, shared, target),
        "has_loop": int(len(span) < len(facts.code)),
        "unit": unit,
        "instructions": len(body),
        "per_unit": {
            **{name: round(count * lanes, 4) for name, count in pipes.items()},
            "all": round(len(body) * lanes, 4),
            "matrix_flops": round(flops / unit, 4),
            "math": round(sum(pipes[name] for name in MATH) * lanes, 4),
            "non_tensor": round((len(body) - pipes["tensor"]) * lanes, 4),
        },
        "matrix": dict(Counter(instruction.opcode for instruction in body if pipe(instruction) == "tensor")),
        "global_bits": _widths(body),
        "global_bits_everywhere": _widths(facts.code),
    }
    if target.arch in RATES:
        found["predicted"] = predicted(body, RATES[target.arch], warps, unit)
    return found


def of_launch(launch: Launch, target: Target, unit: int) -> dict[str, Any]:
    """`figures` of the kernel that was launched."""
    facts = machine_code.read(launch.assembly)
    return figures(facts, target, warps=launch.num_warps, shared=launch.shared, unit=unit)


def _widths(code: Sequence[Instruction]) -> dict[str, int]:
    """How many global accesses have each width in bits."""
    return dict(Counter(str(access_bits(instruction)) for instruction in code if pipe(instruction) == "global"))


def predicted(body: Sequence[Instruction], rates: Rates, warps: int, unit: int) -> dict[str, Any]:
    """The unit that bounds a loop, and picoseconds a unit of work if the whole GPU were kept at that bound."""
    busy = Counter[str]()
    for instruction in body:
        busy["issue"] += 1.0
        kind = pipe(instruction)
        if kind in UNITS:
            busy[UNITS[kind]] += cycles(instruction, rates)
    bound, most = max(busy.items(), key=lambda item: (item[1], item[0]))
    picoseconds = most * warps / 4 / unit / (rates.multiprocessors * rates.ghz) * 1000
    return {"bound": bound, "picoseconds_per_unit": round(picoseconds, 4)}
