"""Launch choices as data: (op, shape, dtype, target) -> a frozen dataclass. Pure; nothing here touches a device.

Tiles for attention follow what the compilers make of each form; `tuned.json` holds choices that were measured on a real
GPU and comes first.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast, get_args

import torch

from fastbert.kernels.target import Target

WIDEST_ROW = 8192

# The deepest product in fp8 that sums fast: BERT's hidden sizes, and not what its feed-forward is wide.
FP8_FAST_DEPTH = 1024

# Entries of attention's table of tiles that a program writes at once, and its warps: a sequence has few.
TILE_TABLE = (32, 1)

BLACKWELL = ("sm_100", "sm_120")  # of two families of tiles, for sm_120 has no tcgen05

P = ParamSpec("P")
Choice = TypeVar("Choice")

# cuBLAS and `bias_gelu`; `linear_gelu_forward`; or cuBLASLt's own epilogue, which knows GELU by tanh only.
Form = Literal["fused pass", "epilogue", "cublaslt"]


# How `tl.dot` multiplies float32: as such, as TF32, or as three products of TF32, which have most of its bits.
Precision = Literal["ieee", "tf32", "tf32x3"]


def number_kind(number: int) -> Hashable:
    """What a kernel's code depends on of a whole number: whether it is 0, 1, a multiple of 16, or beyond 32 bits."""
    return number if number < 2 else (number % 16 == 0, number >> 31)


# The choice where nothing was measured, its target, and the words by which a measured one is known.
Described: TypeAlias = tuple[Choice, Target, str]


def measured_first(describe: Callable[P, Described[Choice]]) -> Callable[P, Choice]:
    """A function that chooses for the op of its name: what was measured, or else what `describe` says once and for all.

    Few different arguments may come, because all that `describe` said is kept.
    """
    op = describe.__name__.removeprefix("_")
    described = cast(Callable[P, Described[Choice]], functools.cache(describe))

    @functools.wraps(describe)
    def choose(*args: P.args, **options: P.kwargs) -> Choice:
        choice, target, shape = described(*args, **options)
        return tuned(op, target, choice, shape)

    return choose


def tuned(op: str, target: Target, default: Choice, shape: str) -> Choice:
    """The measured choice for this target, op and shape, or `default` where nothing was measured."""
    return TUNED.get((target.arch, op, shape), default)


def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton, which is not loaded for it; (0, 0) where there is none."""
    try:
        major, minor, *_ = metadata.version("triton").split(".")
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


@dataclass(frozen=True)
class LayerNormForward:
    """ROWS rows a program, each held whole in `row_block` columns."""

    ROWS: int
    num_warps: int


@dataclass(frozen=True)
class LayerNormBackward:
    """As LayerNormForward, in at most PROGRAMS programs that stride over the rows; `maxnreg` as in AttentionForward."""

    ROWS: int
    PROGRAMS: int
    num_warps: int
    maxnreg: int = 0


@dataclass(frozen=True)
class BiasGeluForward:
    """A tile of ROWS rows and BLOCK columns a program."""

    ROWS: int
    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class BiasGeluBackward:
    """As BiasGeluForward, in at most PROGRAMS programs that stride over the rows, for each block of columns."""

    ROWS: int
    BLOCK: int
    PROGRAMS: int
    num_warps: int


@dataclass(frozen=True)
class LinearGelu:
    """Which form runs."""

    form: Form


@dataclass(frozen=True)
class LinearGeluForward:
    """Tiles of BLOCK_M rows and BLOCK_N columns, BLOCK_K of the depth a step, in PROGRAMS programs a multiprocessor.

    Programs go through GROUP_M rows of tiles together; `maxnreg` as in AttentionForward.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    PROGRAMS: int = 1
    GROUP_M: int = 8
    maxnreg: int = 0


@dataclass(frozen=True)
class QuantizeRows:
    """As LayerNormForward."""

    ROWS: int
    num_warps: int


@dataclass(frozen=True)
class EmbeddingForward:
    """As LayerNormForward."""

    ROWS: int
    num_warps: int


@dataclass(frozen=True)
class EmbeddingBackward:
    """As LayerNormBackward."""

    ROWS: int
    PROGRAMS: int
    num_warps: int
    maxnreg: int = 0


@dataclass(frozen=True)
class EmbeddingBackwardTable:
    """ROWS rows of BLOCK columns a step, in the sums that make the gradient of a table."""

    ROWS: int
    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class PoolForward:
    """ROWS rows a step of a block of BLOCK columns of one sequence; all columns where the result is normalised."""

    ROWS: int
    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class PoolBackward:
    """As PoolForward; never all columns."""

    ROWS: int
    BLOCK: int
    num_warps: int


@dataclass(frozen=True)
class AttentionForward:
    """BLOCK_M query rows a program, BLOCK_N keys a step.

    SPLIT_TAIL runs full key blocks unmasked, then a masked tail. `maxnreg` lets NVIDIA's assembler use that many
    registers where left alone it would rather spill; 0 leaves it alone.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT_TAIL: bool = True
    maxnreg: int = 0


@dataclass(frozen=True)
class AttentionBackwardQuery:
    """BLOCK_M query rows a program, BLOCK_N keys a step; SPLIT_TAIL and `maxnreg` as in AttentionForward."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT_TAIL: bool = True
    maxnreg: int = 0


@dataclass(frozen=True)
class AttentionBackwardKey:
    """BLOCK_N keys a program, BLOCK_M query rows a step; ONE_PASS where BLOCK_N holds every key of a sequence.

    SPLIT_TAIL (of the rows) and `maxnreg` as in AttentionForward.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT_TAIL: bool = True
    ONE_PASS: bool = False
    maxnreg: int = 0


@dataclass(frozen=True)
class AttentionBackwardBias:
    """A tile of BLOCK_M rows and BLOCK_N columns of the bias a program; `maxnreg` as in AttentionForward."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0


SINGLE = AttentionForward(16, 16, 4, 1, SPLIT_TAIL=False, maxnreg=255)

# (family or arch, kind of dtype, BLOCK_D) -> regime -> choice. Regimes, first that applies wins: "bias" (with what else
# of the extras is on, it needs most registers), "extras" (a bias, ALiBi, a window or dropout), "short" (max_seqlen at
# most 64: one block of keys holds a sequence, so there is nothing to split or to pipeline), "aligned" (all sequences
# equally long, a multiple of 64), "default". Found by compiling each for its targets: the fewest instructions a score
# among those without spills. float32 has no tensor-core form that meets the error rule, so its tiles are small. CDNA's
# matrix instruction takes 32 rows of a wave: with fewer for each, waves would share rows and compute the softmax twice.
ATTENTION_FORWARD: dict[tuple[str, str, int], dict[str, AttentionForward]] = {
    ("ampere", "half", 16): {
        "default": AttentionForward(64, 64, 4, 3),
        "extras": AttentionForward(64, 32, 4, 2),
        "bias": AttentionForward(64, 32, 4, 2, maxnreg=255),
    },
    ("ampere", "half", 32): {
        "default": AttentionForward(64, 64, 4, 3),
        "short": AttentionForward(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionForward(64, 64, 4, 2, SPLIT_TAIL=False),
        "bias": AttentionForward(64, 32, 4, 2),
    },
    ("ampere", "half", 64): {
        "default": AttentionForward(128, 64, 4, 2),
        "short": AttentionForward(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionForward(64, 64, 4, 2, SPLIT_TAIL=False),
        "bias": AttentionForward(64, 32, 4, 2, SPLIT_TAIL=False),
    },
    ("ampere", "half", 128): {
        "default": AttentionForward(128, 32, 8, 2),
        "short": AttentionForward(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionForward(64, 32, 4, 2, SPLIT_TAIL=False, maxnreg=255),
        "bias": AttentionForward(32, 32, 4, 2, SPLIT_TAIL=False, maxnreg=255),
    },
    ("ampere", "half", 256): {
        "default": AttentionForward(64, 32, 8, 2, SPLIT_TAIL=False),
        "extras": AttentionForward(32, 32, 8, 2, SPLIT_TAIL=False, maxnreg=255),
    },
    ("ampere", "single", 16): {"default": SINGLE},
    ("ampere", "single", 32): {"default": SINGLE},
    ("ampere", "single", 64): {"default": SINGLE},
    ("ampere", "single", 128): {"default": SINGLE},
    ("ampere", "single", 256): {"default": AttentionForward(16, 16, 8, 1, SPLIT_TAIL=False, maxnreg=255)},
    ("hopper", "half", 16): {"default": AttentionForward(64, 64, 4, 3), "extras": AttentionForward(64, 32, 4, 2)},
    ("hopper", "half", 32): {
        "default": AttentionForward(128, 32, 4, 3),
        "short": AttentionForward(64, 64, 4, 1, SPLIT_TAIL=False),
        "aligned": AttentionForward(64, 64, 4, 3),
        "extras": AttentionForward(64, 64, 4, 2, SPLIT_TAIL=False),
        "bias": AttentionForward(64, 32, 4, 2),
    },
    ("hopper", "half", 64): {
        "default": AttentionForward(128, 32, 4, 3),
        "short": AttentionForward(64, 64, 4, 1, SPLIT_TAIL=False),
        "aligned": AttentionForward(128, 64, 8, 3),
        "extras": AttentionForward(64, 64, 4, 2, SPLIT_TAIL=False),
    },
    ("hopper", "half", 128): {
        "default": AttentionForward(128, 32, 4, 3),
        "short": AttentionForward(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionForward(64, 32, 4, 2, SPLIT_TAIL=False),
    },
    ("hopper", "half", 256): {
        "default": AttentionForward(128, 32, 8, 2),
        "extras": AttentionForward(64, 32, 8, 2),
        "bias": AttentionForward(64, 32, 8, 2, SPLIT_TAIL=False),
    },
    ("hopper", "single", 16): {"default": SINGLE},
    ("hopper", "single", 32): {"default": SINGLE},
    ("hopper", "single", 64): {"default": SINGLE},
    ("hopper", "single", 128): {"default": SINGLE},
    ("hopper", "single", 256): {"default": AttentionForward(16, 16, 8, 1, SPLIT_TAIL=False, maxnreg=255)},
    ("cdna", "half", 16): {"default": AttentionForward(64, 64, 4, 1), "extras": AttentionForward(64, 32, 4, 1)},
    ("cdna", "half", 32): {
        "default": AttentionForward(128, 64, 4, 1),
        "short": AttentionForward(64, 64, 2, 1, SPLIT_TAIL=False),
    },
    ("cdna", "half", 64): {
        "default": AttentionForward(128, 64, 4, 1),
        "short": AttentionForward(64, 64, 2, 1, SPLIT_TAIL=False),
    },
    ("cdna", "half", 128): {
        "default": AttentionForward(128, 32, 4, 1),
        "short": AttentionForward(64, 64, 2, 1, SPLIT_TAIL=False),
    },
    ("cdna", "half", 256): {"default": AttentionForward(64, 32, 4, 1, SPLIT_TAIL=False)},
    ("cdna", "single", 16): {"default": AttentionForward(32, 32, 4, 1)},
    ("cdna", "single", 32): {"default": AttentionForward(32, 32, 4, 1)},
    ("cdna", "single", 64): {"default": AttentionForward(32, 32, 4, 1)},
    ("cdna", "single", 128): {"default": AttentionForward(32, 32, 4, 1)},
    ("cdna", "single", 256): {"default": AttentionForward(32, 16, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 16): {"default": AttentionForward(64, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 32): {"default": AttentionForward(64, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 64): {"default": AttentionForward(64, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 128): {"default": AttentionForward(64, 16, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "single", 16): {"default": AttentionForward(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "single", 32): {"default": AttentionForward(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "single", 64): {"default": AttentionForward(16, 16, 8, 1, SPLIT_TAIL=False)},
}


# Blackwell's data-centre chips take Hopper's tiles but for those that spill there.
ATTENTION_FORWARD |= {
    ("blackwell", kind, block_d): choices
    for (family, kind, block_d), choices in ATTENTION_FORWARD.items()
    if family == "hopper"
}
ATTENTION_FORWARD["blackwell", "half", 16] = {
    "default": AttentionForward(64, 32, 4, 2),
    "bias": AttentionForward(64, 16, 4, 2),
}
ATTENTION_FORWARD["blackwell", "half", 32] = ATTENTION_FORWARD["hopper", "half", 32] | {
    "aligned": AttentionForward(64, 64, 4, 2),
    "extras": AttentionForward(64, 32, 4, 2, SPLIT_TAIL=False),
}
ATTENTION_FORWARD["blackwell", "half", 64] = ATTENTION_FORWARD["hopper", "half", 64] | {
    "aligned": AttentionForward(128, 64, 4, 2),
    "extras": AttentionForward(64, 32, 4, 2, SPLIT_TAIL=False, maxnreg=255),
    "bias": AttentionForward(64, 32, 4, 1, SPLIT_TAIL=False),
}
ATTENTION_FORWARD["blackwell", "half", 128] = ATTENTION_FORWARD["hopper", "half", 128] | {
    "bias": AttentionForward(64, 16, 4, 2, SPLIT_TAIL=False)
}
ATTENTION_FORWARD["blackwell", "half", 256] = ATTENTION_FORWARD["hopper", "half", 256] | {
    "bias": AttentionForward(64, 16, 8, 2)
}
# By arch, before those of its family: this spills on sm_86, sm_89 and sm_120, which are of the family too, and with
# Triton 3.9 on sm_80.
if triton_version() < (3, 9):
    ATTENTION_FORWARD["sm_80", "half", 128] = {"default": AttentionForward(128, 32, 4, 2, SPLIT_TAIL=False)}

# (family or target, kind of dtype, BLOCK_D) -> choice; ANY stands for those without an entry of their own; None where
# no tile fits. On CDNA a wave takes 32 rows of what a program owns: with fewer, two waves would compute the same.
ANY = "any"
ATTENTION_BACKWARD_QUERY: dict[tuple[str, str, int], AttentionBackwardQuery] = {
    ("ampere", "half", 16): AttentionBackwardQuery(128, 32, 4, 2),
    ("ampere", "half", 32): AttentionBackwardQuery(128, 32, 4, 2),
    ("ampere", "half", 64): AttentionBackwardQuery(128, 32, 4, 1),
    ("sm_120", "half", 64): AttentionBackwardQuery(64, 32, 4, 2),
    ("ampere", "half", 128): AttentionBackwardQuery(128, 32, 8, 2),
    ("ampere", "half", 256): AttentionBackwardQuery(32, 32, 8, 1, maxnreg=255),
    ("hopper", "half", 16): AttentionBackwardQuery(64, 64, 4, 3),
    ("hopper", "half", 32): AttentionBackwardQuery(64, 64, 4, 3),
    ("hopper", "half", 64): AttentionBackwardQuery(64, 64, 4, 3),
    ("hopper", "half", 128): AttentionBackwardQuery(128, 64, 8, 1),
    ("hopper", "half", 256): AttentionBackwardQuery(32, 32, 8, 1),
    ("blackwell", "half", 16): AttentionBackwardQuery(128, 64, 4, 1),
    ("blackwell", "half", 32): AttentionBackwardQuery(128, 64, 4, 1),
    ("blackwell", "half", 64): AttentionBackwardQuery(128, 64, 4, 1),
    ("blackwell", "half", 128): AttentionBackwardQuery(128, 64, 8, 1, maxnreg=255),
    ("blackwell", "half", 256): AttentionBackwardQuery(64, 16, 8, 1),
    ("cdna", "half", 16): AttentionBackwardQuery(64, 64, 2, 1),
    ("cdna", "half", 32): AttentionBackwardQuery(64, 64, 2, 1),
    ("cdna", "half", 64): AttentionBackwardQuery(128, 64, 4, 1),
    ("cdna", "half", 128): AttentionBackwardQuery(128, 32, 4, 1),
    ("cdna", "half", 256): AttentionBackwardQuery(64, 16, 8, 1),
    ("rdna", "half", 16): AttentionBackwardQuery(64, 32, 4, 1),
    ("rdna", "half", 32): AttentionBackwardQuery(64, 32, 4, 1),
    ("rdna", "half", 64): AttentionBackwardQuery(64, 16, 4, 1),
    (ANY, "single", 16): AttentionBackwardQuery(16, 16, 4, 1),
    (ANY, "single", 32): AttentionBackwardQuery(16, 16, 4, 1),
    (ANY, "single", 64): AttentionBackwardQuery(16, 16, 4, 1),
    (ANY, "single", 128): AttentionBackwardQuery(16, 16, 8, 1),
}
ATTENTION_BACKWARD_KEY: dict[tuple[str, str, int], AttentionBackwardKey | None] = {
    ("ampere", "half", 16): AttentionBackwardKey(32, 128, 4, 2),
    ("ampere", "half", 32): AttentionBackwardKey(32, 128, 4, 2),
    ("ampere", "half", 64): AttentionBackwardKey(16, 128, 4, 1),
    ("ampere", "half", 128): AttentionBackwardKey(16, 128, 8, 1),
    ("ampere", "half", 256): AttentionBackwardKey(32, 32, 8, 1),
    ("hopper", "half", 16): AttentionBackwardKey(64, 64, 4, 1),
    ("hopper", "half", 32): AttentionBackwardKey(64, 64, 4, 1),
    ("hopper", "half", 64): AttentionBackwardKey(32, 64, 4, 1),
    ("hopper", "half", 128): AttentionBackwardKey(32, 128, 8, 1),
    ("hopper", "half", 256): AttentionBackwardKey(32, 32, 8, 1),
    ("blackwell", "half", 16): AttentionBackwardKey(64, 64, 4, 1),
    ("blackwell", "half", 32): AttentionBackwardKey(64, 64, 4, 1),
    ("blackwell", "half", 64): AttentionBackwardKey(64, 64, 4, 1),
    ("blackwell", "half", 128): AttentionBackwardKey(32, 64, 8, 1, maxnreg=255),
    ("blackwell", "half", 256): AttentionBackwardKey(16, 64, 8, 1),
    ("cdna", "half", 16): AttentionBackwardKey(32, 64, 2, 1),
    ("cdna", "half", 32): AttentionBackwardKey(64, 64, 2, 1),
    ("cdna", "half", 64): AttentionBackwardKey(32, 64, 2, 1),
    ("cdna", "half", 128): AttentionBackwardKey(16, 64, 2, 1),
    ("cdna", "half", 256): AttentionBackwardKey(16, 64, 8, 1),
    ("rdna", "half", 16): AttentionBackwardKey(32, 64, 4, 1),
    ("rdna", "half", 32): AttentionBackwardKey(32, 64, 4, 1),
    ("rdna", "half", 64): AttentionBackwardKey(16, 32, 4, 1, SPLIT_TAIL=False),
    ("rdna", "half", 128): None,
    ("rdna", "half", 256): None,
    ("rdna", "single", 64): None,
    (ANY, "single", 16): AttentionBackwardKey(16, 16, 4, 1),
    (ANY, "single", 32): AttentionBackwardKey(16, 16, 4, 1),
    (ANY, "single", 64): AttentionBackwardKey(16, 16, 4, 1),
    (ANY, "single", 128): AttentionBackwardKey(16, 16, 8, 1),
    (ANY, "single", 256): None,
}
# In place of those above where a bias, a window, dropout or a head_dim that is no power of two needs registers.
ATTENTION_BACKWARD_QUERY_EXTRAS: dict[tuple[str, str, int], AttentionBackwardQuery] = {
    (ANY, "half", 16): AttentionBackwardQuery(64, 32, 4, 1),
    (ANY, "half", 32): AttentionBackwardQuery(64, 32, 4, 1),
    (ANY, "half", 64): AttentionBackwardQuery(64, 32, 4, 1),
    (ANY, "half", 128): AttentionBackwardQuery(64, 32, 8, 1),
    (ANY, "half", 256): AttentionBackwardQuery(32, 32, 8, 1, SPLIT_TAIL=False, maxnreg=255),
    ("ampere", "half", 32): AttentionBackwardQuery(64, 32, 4, 1, maxnreg=255),
    ("ampere", "half", 128): AttentionBackwardQuery(64, 32, 8, 1, SPLIT_TAIL=False, maxnreg=255),
    ("sm_120", "half", 64): AttentionBackwardQuery(64, 32, 4, 1, SPLIT_TAIL=False, maxnreg=255),
    ("blackwell", "half", 64): AttentionBackwardQuery(64, 32, 4, 1, maxnreg=255),
    ("blackwell", "half", 128): AttentionBackwardQuery(64, 32, 8, 1, maxnreg=255),
    ("blackwell", "half", 256): AttentionBackwardQuery(64, 16, 8, 1),
    ("cdna", "half", 128): AttentionBackwardQuery(64, 16, 8, 1),
    ("cdna", "half", 256): AttentionBackwardQuery(64, 16, 8, 1),
    ("rdna", "half", 64): AttentionBackwardQuery(64, 16, 4, 1, SPLIT_TAIL=False),
}
ATTENTION_BACKWARD_KEY_EXTRAS: dict[tuple[str, str, int], AttentionBackwardKey] = {
    (ANY, "half", 16): AttentionBackwardKey(32, 64, 4, 1),
    (ANY, "half", 32): AttentionBackwardKey(32, 64, 4, 1),
    (ANY, "half", 64): AttentionBackwardKey(32, 64, 4, 1, SPLIT_TAIL=False),
    (ANY, "half", 128): AttentionBackwardKey(32, 64, 8, 1, SPLIT_TAIL=False),
    (ANY, "half", 256): AttentionBackwardKey(32, 32, 8, 1, SPLIT_TAIL=False),
    ("ampere", "half", 16): AttentionBackwardKey(32, 64, 4, 1, maxnreg=255),
    ("ampere", "half", 32): AttentionBackwardKey(32, 64, 4, 1, maxnreg=255),
    ("ampere", "half", 64): AttentionBackwardKey(16, 64, 4, 1, maxnreg=255),
    ("ampere", "half", 128): AttentionBackwardKey(16, 64, 8, 1),
    ("sm_120", "half", 128): AttentionBackwardKey(16, 64, 8, 1, SPLIT_TAIL=False),
    ("blackwell", "half", 16): AttentionBackwardKey(32, 64, 4, 1, maxnreg=255),
    ("blackwell", "half", 64): AttentionBackwardKey(32, 64, 4, 1, SPLIT_TAIL=False, maxnreg=255),
    ("blackwell", "half", 256): AttentionBackwardKey(16, 64, 8, 1),
    ("cdna", "half", 128): AttentionBackwardKey(16, 64, 8, 1),
    ("cdna", "half", 256): AttentionBackwardKey(16, 64, 8, 1),
    ("rdna", "half", 32): AttentionBackwardKey(16, 64, 4, 1),
    ("rdna", "half", 64): AttentionBackwardKey(16, 32, 4, 1, SPLIT_TAIL=False),
}
ATTENTION_BACKWARD_ONE_PASS: dict[tuple[str, str, int], AttentionBackwardKey] = {
    ("ampere", "half", 32): AttentionBackwardKey(32, 128, 4, 1, ONE_PASS=True),
    ("ampere", "half", 64): AttentionBackwardKey(16, 128, 4, 1, ONE_PASS=True),
    ("hopper", "half", 32): AttentionBackwardKey(64, 128, 8, 1, ONE_PASS=True),
    ("hopper", "half", 64): AttentionBackwardKey(64, 128, 8, 1, SPLIT_TAIL=False, ONE_PASS=True),
}
ATTENTION_BACKWARD_BIAS: dict[tuple[str, str, int], AttentionBackwardBias] = {
    (ANY, "half", 16): AttentionBackwardBias(64, 16, 4, 1),
    (ANY, "half", 32): AttentionBackwardBias(64, 16, 4, 1),
    (ANY, "half", 64): AttentionBackwardBias(64, 16, 4, 1),
    (ANY, "half", 128): AttentionBackwardBias(64, 16, 4, 1),
    (ANY, "half", 256): AttentionBackwardBias(64, 16, 8, 1),
    (ANY, "single", 16): AttentionBackwardBias(16, 16, 4, 1),
    (ANY, "single", 32): AttentionBackwardBias(16, 16, 4, 1),
    (ANY, "single", 64): AttentionBackwardBias(16, 16, 4, 1),
    (ANY, "single", 128): AttentionBackwardBias(16, 16, 8, 1),
    ("sm_86", "half", 64): AttentionBackwardBias(64, 16, 4, 1, maxnreg=255),
    ("sm_89", "half", 64): AttentionBackwardBias(64, 16, 4, 1, maxnreg=255),
    ("ampere", "half", 128): AttentionBackwardBias(64, 16, 4, 1, maxnreg=255),
    ("hopper", "half", 16): AttentionBackwardBias(64, 32, 4, 1),
    ("hopper", "half", 32): AttentionBackwardBias(64, 32, 4, 1),
    ("hopper", "half", 64): AttentionBackwardBias(64, 32, 4, 1),
    ("hopper", "half", 128): AttentionBackwardBias(64, 32, 8, 1),
}
ATTENTION_BACKWARD_BIAS |= {
    ("blackwell", kind, block_d): choice
    for (family, kind, block_d), choice in ATTENTION_BACKWARD_BIAS.items()
    if family == "hopper"
}
ATTENTION_BACKWARD_BIAS["blackwell", "half", 64] = AttentionBackwardBias(64, 32, 4, 1, maxnreg=255)
# In float32 NVIDIA's assembler would rather spill a few registers than take all there are.
_BACKWARD: list[dict[tuple[str, str, int], Any]] = [
    ATTENTION_BACKWARD_QUERY,
    ATTENTION_BACKWARD_KEY,
    ATTENTION_BACKWARD_BIAS,
]
for _table, _nvidia, _block_d in itertools.product(_BACKWARD, ("ampere", "hopper", "blackwell"), (16, 32, 64, 128)):
    _table[_nvidia, "single", _block_d] = replace(_table[ANY, "single", _block_d], maxnreg=255)


@functools.cache
def attention_block_d(head_dim: int) -> int:
    """Columns of the tile that holds a head: the next power of two, at least the 16 that a dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_unserved(head_dim: int, dtype: torch.dtype, target: Target, *, gradient: bool) -> str | None:
    """Why the attention kernels can't serve this shape on this target, with its gradient or without, or None."""
    if head_dim > 256:
        return f"head_dim {head_dim} is wider than 256"
    if dtype not in _KINDS:
        return f"{dtype} is not float16, bfloat16 or float32"
    kind, block_d = _KINDS[dtype], attention_block_d(head_dim)
    if (family(target), kind, block_d) not in ATTENTION_FORWARD:
        return f"head_dim {head_dim} in {dtype} does not fit the registers of {target.arch}"
    if gradient and _of_family(ATTENTION_BACKWARD_KEY, target, kind, block_d) is None:
        return f"the gradient of head_dim {head_dim} in {dtype} does not fit the registers of {target.arch}"
    return None


def attention_forward(
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen: int,
    *,
    rows: int,
    batch: int,
    extras: bool,
    bias: bool = False,
    target: Target,
) -> AttentionForward:
    """The choice for one attention call; `attention_unserved` must have said None.

    Args:
        rows, batch: tokens and sequences; together with `max_seqlen` they tell a ragged batch.
        extras: a bias, ALiBi, a window or dropout is on.
        bias: a bias is.
    """
    short, aligned = attention_regime(max_seqlen, rows=rows, batch=batch)
    return _attention_forward(head_dim, dtype, bias, extras, short, aligned, target)


def attention_regime(max_seqlen: int, *, rows: int, batch: int) -> tuple[bool, bool]:
    """What `attention_forward` looks at of a batch's sizes: short sequences; whole tiles and one length."""
    return max_seqlen <= 64, rows == batch * max_seqlen and max_seqlen % 64 == 0


@measured_first
def _attention_forward(
    head_dim: int, dtype: torch.dtype, bias: bool, extras: bool, short: bool, aligned: bool, target: Target
) -> Described[AttentionForward]:
    kind, block_d = _KINDS[dtype], attention_block_d(head_dim)
    own = ATTENTION_FORWARD.get((target.kin, kind, block_d), {})
    choices = ATTENTION_FORWARD[family(target), kind, block_d] | own
    regimes = {"bias": bias, "extras": extras, "short": short, "aligned": aligned}
    regime = next((name for name, applies in regimes.items() if applies and name in choices), "default")
    return choices[regime], target, f"head_dim={head_dim},dtype={_NAMES[dtype]},regime={regime}"


@measured_first
def attention_backward_query(
    head_dim: int, dtype: torch.dtype, *, extras: bool, target: Target
) -> Described[AttentionBackwardQuery]:
    """The choice for the gradient of the queries; `extras` as in `attention_forward`."""
    kind, block_d = _KINDS[dtype], attention_block_d(head_dim)
    needs_room = kind == "half" and (extras or _padded(head_dim))
    table = ATTENTION_BACKWARD_QUERY_EXTRAS if needs_room else ATTENTION_BACKWARD_QUERY
    choice = _of_family(table, target, kind, block_d)
    shape = f"head_dim={head_dim},dtype={_NAMES[dtype]},regime={'extras' if needs_room else 'default'}"
    return choice, target, shape


def attention_backward_key(
    head_dim: int, dtype: torch.dtype, max_seqlen: int, *, dbias: bool, extras: bool, target: Target
) -> AttentionBackwardKey:
    """The choice for the gradients of keys and values.

    Args:
        dbias: the bias needs a gradient, and with it what one pass does not write.
        extras: as in `attention_forward`.
    """
    one_pass = ATTENTION_BACKWARD_ONE_PASS.get((family(target), _KINDS[dtype], attention_block_d(head_dim)))
    fits = one_pass is not None and max_seqlen <= one_pass.BLOCK_N
    return _attention_backward_key(head_dim, dtype, extras or dbias, one_pass if fits else None, target)


@measured_first
def _attention_backward_key(
    head_dim: int, dtype: torch.dtype, extras: bool, one_pass: AttentionBackwardKey | None, target: Target
) -> Described[AttentionBackwardKey]:
    kind, block_d = _KINDS[dtype], attention_block_d(head_dim)
    choice: AttentionBackwardKey | None
    if kind == "half" and (extras or _padded(head_dim)):
        choice, regime = _of_family(ATTENTION_BACKWARD_KEY_EXTRAS, target, kind, block_d), "extras"
    elif one_pass is not None:
        choice, regime = one_pass, "one_pass"
    else:
        choice, regime = _of_family(ATTENTION_BACKWARD_KEY, target, kind, block_d), "default"
    assert choice is not None  # `attention_unserved` has said so
    shape = f"head_dim={head_dim},dtype={_NAMES[dtype]},regime={regime}"
    return choice, target, shape


@measured_first
def attention_backward_bias(head_dim: int, dtype: torch.dtype, target: Target) -> Described[AttentionBackwardBias]:
    """The choice for the gradient of the bias."""
    choice = _of_family(ATTENTION_BACKWARD_BIAS, target, _KINDS[dtype], attention_block_d(head_dim))
    return choice, target, f"head_dim={head_dim},dtype={_NAMES[dtype]}"


def float32_precision(dtype: torch.dtype, asked: str, target: Target) -> Precision:
    """How a kernel multiplies states of `dtype` where `target.float32_asked` says `asked`.

    NVIDIA's tensor cores take float32 as TF32 only, so that must be asked for, as for torch's products. Three such
    products hold the error rule by a model of the hardware, one does not; see docs/numerics.md. AMD's matrix units
    multiply float32 as such (CDNA), or not at all (RDNA).
    """
    if dtype != torch.float32 or target.backend == "hip":
        return "ieee"
    return _FLOAT32.get(asked, "ieee")


_FLOAT32: dict[str, Precision] = {"high": "tf32x3", "medium": "tf32"}


def _padded(head_dim: int) -> bool:
    return head_dim != attention_block_d(head_dim)


def row_wise_unserved(width: int, dtype: torch.dtype) -> str | None:
    """Why the kernels that hold a row whole can't serve this shape, or None when they can."""
    if width > WIDEST_ROW:
        return f"a row of {width} columns is wider than {WIDEST_ROW}"
    return elementwise_unserved(dtype)


def elementwise_unserved(dtype: torch.dtype) -> str | None:
    """Why no kernel can serve this dtype, or None when they can."""
    return None if dtype in _KINDS else f"{dtype} is not float16, bfloat16 or float32"


@measured_first
def layer_norm_forward(hidden: int, dtype: torch.dtype, target: Target) -> Described[LayerNormForward]:
    """The choice for rows of `hidden` columns; `row_wise_unserved` must have said None."""
    default = LayerNormForward(*_whole_rows(hidden, dtype, target))
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]}"


@measured_first
def layer_norm_backward(hidden: int, dtype: torch.dtype, target: Target) -> Described[LayerNormBackward]:
    """The choice for rows of `hidden` columns; `row_wise_unserved` must have said None."""
    default = LayerNormBackward(*_strided_rows(hidden, dtype, target))
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]}"


def quantize_rows(width: int, dtype: torch.dtype, target: Target) -> QuantizeRows:
    """The choice for rows of `width` columns; `row_wise_unserved` must have said None."""
    return QuantizeRows(*_whole_rows(width, dtype, target))


def fp8_unserved(dtype: torch.dtype, target: Target) -> str | None:
    """Why a model of this dtype can't run in fp8 on this target, or None; in the interpreter e4m3 is simulated."""
    if target.backend == "interpreter":
        return None
    if target.backend == "hip":
        return f"{target.arch}: AMD's e4m3 is another format"
    if target.capability < 89:
        return f"{target.arch} has no fp8 matrix units; they begin with sm_89"
    return None if dtype == torch.bfloat16 else f"{dtype}: products with row scales are written in bfloat16 only"


def fp8_sums_fast(depth: int) -> bool:
    """Whether a product in fp8 sums `depth` terms in Hopper's and Ada's tensor cores, which keep 13 bits of a sum.

    The other way every 128 terms are added up in float32 beside them. Up to this depth what is lost adds less than a
    tenth to the error of e4m3 itself, by a model of the hardware; see docs/numerics.md.
    """
    return depth <= FP8_FAST_DEPTH


@measured_first
def embedding_forward(hidden: int, dtype: torch.dtype, target: Target) -> Described[EmbeddingForward]:
    """The choice for rows of `hidden` columns; `row_wise_unserved` must have said None."""
    default = EmbeddingForward(*_whole_rows(hidden, dtype, target))
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]}"


@measured_first
def embedding_backward(hidden: int, dtype: torch.dtype, target: Target) -> Described[EmbeddingBackward]:
    """The choice for rows of `hidden` columns; `row_wise_unserved` must have said None."""
    default = EmbeddingBackward(*_strided_rows(hidden, dtype, target))
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]}"


@measured_first
def embedding_backward_table(hidden: int, dtype: torch.dtype, target: Target) -> Described[EmbeddingBackwardTable]:
    """The choice for tables of `hidden` columns whose tokens' gradients have `dtype`: 32 elements a lane."""
    default = EmbeddingBackwardTable(ROWS=4, BLOCK=min(256, row_block(hidden)), num_warps=1)
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]}"


@measured_first
def pool_forward(
    hidden: int, dtype: torch.dtype, target: Target, *, how: str, normalise: bool
) -> Described[PoolForward]:
    """The choice for rows of `hidden` columns; `row_wise_unserved` must have said None.

    The first row alone ("cls") gets a warp for every 1024 columns, and a program for each of them unless normalised.
    All rows are read a line of 128 bytes wide, 64 of them a step. Where they are normalised a program is alone with a
    sequence, so it gets 512 lanes, each with 32 elements: four 16-byte loads of halves in flight. On Blackwell it
    has 16, or the assembler spills rather than take more than 64 registers.
    """
    columns = row_block(hidden)
    if how == "cls":
        block = columns if normalise else min(1024, columns)
        regime, default = "first", PoolForward(ROWS=1, BLOCK=block, num_warps=max(1, block // 1024))
    elif normalise:
        rows = max(1, min(64, 512 * (16 if target.kin in BLACKWELL else 32) // columns))
        regime, default = "whole", PoolForward(ROWS=rows, BLOCK=columns, num_warps=512 // target.warp_size)
    else:
        regime, default = "line", PoolForward(ROWS=64, BLOCK=_line(columns, dtype), num_warps=4)
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]},regime={regime}"


@measured_first
def pool_backward(hidden: int, dtype: torch.dtype, target: Target) -> Described[PoolBackward]:
    """The choice for rows of `hidden` columns; `row_wise_unserved` must have said None."""
    default = PoolBackward(ROWS=32, BLOCK=_line(row_block(hidden), dtype), num_warps=4)
    return default, target, f"hidden={hidden},dtype={_NAMES[dtype]}"


def _line(columns: int, dtype: torch.dtype) -> int:
    """Columns of a block that is a line of memory wide: 128 bytes, the L1 and L2 line of NVIDIA's and CDNA's GPUs."""
    return min(columns, 128 // dtype.itemsize)


@measured_first
def bias_gelu_forward(width: int, dtype: torch.dtype, target: Target) -> Described[BiasGeluForward]:
    """The choice for rows of `width` columns: 4 rows of the widest block that divides them, with 32 elements a lane.

    A block that does not divide them needs masks, so it is small, with 8 elements a lane.
    """
    rows, block, warps = _column_blocks(width)
    default = BiasGeluForward(ROWS=rows, BLOCK=block, num_warps=warps)
    return default, target, f"width={width},dtype={_NAMES[dtype]}"


@measured_first
def bias_gelu_backward(
    width: int, dtype: torch.dtype, target: Target, *, gated: bool = False
) -> Described[BiasGeluBackward]:
    """The tiles of `bias_gelu_forward`, and programs for 4096 warps in all: 32 on each of 128 multiprocessors.

    Gated, which holds five tensors and not three, half the rows of wide blocks, and of widths not divisible by 16.
    """
    rows, block, warps = _column_blocks(width)
    if gated and (width % block == 0 or width % 16):
        rows //= 2
    programs = max(1, 4096 // (-(-width // block) * warps))
    default = BiasGeluBackward(ROWS=rows, BLOCK=block, PROGRAMS=programs, num_warps=warps)
    form = ",gated" if gated else ""
    return default, target, f"width={width},dtype={_NAMES[dtype]}{form}"


# (family, kind of dtype) -> tiles. Every form of the kernel compiles without spills; four warps for 128 x 128 run fewer
# instructions, and spill where the product is stored or the depth masked. Two programs on a multiprocessor, where they
# fit, let the GELU of one run beside the products of the other.
LINEAR_GELU_FORWARD: dict[tuple[str, str], LinearGeluForward] = {
    ("ampere", "half"): LinearGeluForward(128, 128, 32, 8, 3, maxnreg=255),
    ("ampere", "single"): LinearGeluForward(64, 64, 32, 4, 2),
    ("hopper", "half"): LinearGeluForward(128, 128, 64, 8, 3, PROGRAMS=2),
    ("hopper", "single"): LinearGeluForward(64, 64, 32, 4, 2),
    ("blackwell", "half"): LinearGeluForward(128, 128, 64, 8, 3),
    ("blackwell", "single"): LinearGeluForward(64, 64, 32, 4, 2),
    ("cdna", "half"): LinearGeluForward(128, 128, 32, 4, 2, PROGRAMS=2),
    ("cdna", "single"): LinearGeluForward(64, 64, 32, 4, 2),
    ("rdna", "half"): LinearGeluForward(64, 64, 32, 4, 2, PROGRAMS=2),
    ("rdna", "single"): LinearGeluForward(32, 32, 32, 4, 2),
}

# Numbers of rows up to which a measured choice of linear_gelu serves; the last serves all that are more.
ROW_BOUNDS = (512, 2048, 8192)


def linear_gelu(
    rows: int, width: int, depth: int, dtype: torch.dtype, *, approximate: str, gradient: bool, target: Target
) -> LinearGelu:
    """The form for `[rows, depth] x [depth, width]`: until one is measured, cuBLAS and `bias_gelu`.

    Args:
        approximate: "none" or "tanh".
        gradient: it will be asked for, so the product is kept.
    """
    regime = "training" if gradient else {"none": "erf", "tanh": "tanh"}[approximate]
    return _linear_gelu(row_bound(rows), width, depth, dtype, regime, target)


@measured_first
def _linear_gelu(
    row_bound: int, width: int, depth: int, dtype: torch.dtype, regime: str, target: Target
) -> Described[LinearGelu]:
    shape = f"{_product(row_bound, width, depth, dtype)},regime={regime}"
    return LinearGelu("fused pass"), target, shape


def linear_gelu_forward(rows: int, width: int, depth: int, dtype: torch.dtype, target: Target) -> LinearGeluForward:
    """The choice for `[rows, depth] x [depth, width]`."""
    return _linear_gelu_forward(row_bound(rows), width, depth, dtype, target)


@measured_first
def _linear_gelu_forward(
    row_bound: int, width: int, depth: int, dtype: torch.dtype, target: Target
) -> Described[LinearGeluForward]:
    default = LINEAR_GELU_FORWARD[family(target), _KINDS[dtype]]
    return default, target, _product(row_bound, width, depth, dtype)


def row_bound(rows: int) -> int:
    """What `linear_gelu` looks at of a number of rows."""
    return next((bound for bound in ROW_BOUNDS if rows <= bound), ROW_BOUNDS[-1])


def _product(row_bound: int, width: int, depth: int, dtype: torch.dtype) -> str:
    return f"rows={row_bound},width={width},depth={depth},dtype={_NAMES[dtype]}"


def _column_blocks(width: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps) of the tiles of `bias_gelu_forward`."""
    whole = next((block for block in (1024, 512, 256) if width % block == 0), None)
    if whole is not None:
        return 4, whole, whole // 256
    block = min(256, row_block(width))
    return 4, block, max(1, block // 64)


@functools.cache
def row_block(width: int) -> int:
    """Columns of the tile that holds a row whole: the next power of two, at least the 8 of one dropout draw."""
    return max(8, 1 << (width - 1).bit_length())


def _whole_rows(width: int, dtype: torch.dtype, target: Target) -> tuple[int, int]:
    """(ROWS, num_warps): a warp for every 1024 columns of a row, and rows enough to give each lane 16 bytes."""
    columns = row_block(width)
    return max(1, target.warp_size * 16 // dtype.itemsize // columns), max(1, columns // 1024)


def arguments(choice: Any) -> dict[str, Any]:
    """A choice as keyword arguments of a launch, without PROGRAMS, which is the grid's, and a `maxnreg` of 0."""
    given = vars(choice).copy()  # `asdict` copies deep, which takes as long as a launch
    given.pop("PROGRAMS", None)
    if given.get("maxnreg") == 0:
        del given["maxnreg"]
    return given


def _strided_rows(width: int, dtype: torch.dtype, target: Target) -> tuple[int, int, int, int]:
    """(ROWS, PROGRAMS, num_warps, maxnreg) of a backward: as `_whole_rows`, in 1024 warps, 8 on 128 multiprocessors.

    Two rows of 512 columns of half types share the weight and the work around it, but on sm_120 they spill. The sums
    for the parameters take registers too. Where one warp for 1024 columns would spill, in float32 and on RDNA, there
    are two; not for 8192 columns on NVIDIA, where 16 warps have fewer registers a lane. So too for 4096 columns on
    Blackwell. At 4096 and 8192, at 1024 in float32, and at 512 and 1024 on Blackwell, NVIDIA's assembler would rather
    spill than take more than 128, 80 and 168 registers.
    """
    rows, warps = _whole_rows(width, dtype, target)
    columns = row_block(width)
    if columns == 512 and dtype != torch.float32 and family(target) != "rdna" and target.kin != "sm_120":
        rows = 2
    if columns >= 1024 and (family(target) == "rdna" or (dtype == torch.float32 and columns < 8192)):
        warps *= 2
    if columns == 4096 and family(target) == "blackwell" and dtype != torch.float32:
        warps *= 2
    thrifty = columns >= 4096 or (columns == 1024 and dtype == torch.float32)
    thrifty = thrifty or (columns in (512, 1024) and target.kin in BLACKWELL)
    return rows, 1024 // warps, warps, 255 if thrifty and target.backend == "cuda" else 0


@functools.cache
def drop_threshold(dropout: float) -> int:
    """Draws of 0..65535 below this are dropped: `dropout` rounded to a multiple of 2^-16 below 1."""
    return min(round(dropout * 65536), 65535)


@functools.cache
def drop_scale(dropout: float) -> float:
    """What the kept elements are multiplied by, so that the expectation is unchanged."""
    return 65536 / (65536 - drop_threshold(dropout))


def read_tuned(path: Path) -> dict[tuple[str, str, str], Any]:
    """Measured choices by (arch, op, shape).

    The file holds `{"sm_90": {"bias_gelu_forward": {"width=768,dtype=float16": {...}}}}`, innermost the fields of the
    op's dataclass.

    Raises:
        ValueError: the file is no such JSON; it says where.
    """
    try:
        by_arch = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it with benchmarks/tune.py, or put {{}} there") from error
    choices = {}
    for arch, by_op in _entries(path, "the file", by_arch):
        for op, by_shape in _entries(path, arch, by_op):
            if op not in _CHOICES:
                raise ValueError(f"{path}: {arch}: no op {op!r}; expected one of {sorted(_CHOICES)}")
            wanted = {field.name for field in fields(_CHOICES[op])}
            known = get_args(Form) if op == "linear_gelu" else ()
            for shape, values in _entries(path, f"{arch}, {op}", by_shape):
                named = dict(_entries(path, f"{arch}, {op}, {shape}", values))
                fits = all(value in known if known else isinstance(value, int) for value in named.values())
                if set(named) != wanted or not fits:
                    where = f"{path}: {arch}, {op}, {shape}"
                    expected = f"one of {known}" if known else "whole numbers"
                    raise ValueError(f"{where}: got {named}; expected {expected} for {sorted(wanted)}")
                choices[arch, op, shape] = _CHOICES[op](**named)
    return choices


def _entries(path: Path, where: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where}: got {value!r}; expected an object")
    return value.items()


_CHOICES: dict[str, Any] = {
    "attention_forward": AttentionForward,
    "attention_backward_query": AttentionBackwardQuery,
    "attention_backward_key": AttentionBackwardKey,
    "attention_backward_bias": AttentionBackwardBias,
    "layer_norm_forward": LayerNormForward,
    "layer_norm_backward": LayerNormBackward,
    "bias_gelu_forward": BiasGeluForward,
    "bias_gelu_backward": BiasGeluBackward,
    "linear_gelu": LinearGelu,
    "linear_gelu_forward": LinearGeluForward,
    "embedding_forward": EmbeddingForward,
    "embedding_backward": EmbeddingBackward,
    "embedding_backward_table": EmbeddingBackwardTable,
    "pool_forward": PoolForward,
    "pool_backward": PoolBackward,
}

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

_KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "single"}


def family(target: Target) -> str:
    """Targets that share a table of tiles."""
    if target.backend == "hip":
        return "cdna" if target.warp_size == 64 else "rdna"
    return {"sm_90": "hopper", "sm_100": "blackwell"}.get(target.kin, "ampere")


def _of_family(table: dict[tuple[str, str, int], Choice], target: Target, kind: str, block_d: int) -> Choice:
    """The entry of the target itself, else that of its family, else that of any."""
    keys = ((owner, kind, block_d) for owner in (target.kin, family(target), ANY))
    return table[next(key for key in keys if key in table)]


TUNED = read_tuned(Path(__file__).with_name("tuned.json"))
