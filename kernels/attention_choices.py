"""Launch choices of attention, which follow what the compilers make of each form."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch

from fastbert.kernels.choices import (
    DTYPE_KINDS,
    DTYPE_NAMES,
    AttentionBiasTile,
    AttentionKeyTile,
    AttentionTile,
    Choice,
    Described,
    dtype_unserved,
    family,
    measured_first,
)
from fastbert.kernels.target import Target


def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton, which is not loaded for it; (0, 0) where there is none."""
    try:
        major, minor, *_ = metadata.version("triton").split(".")
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


SINGLE = AttentionTile(16, 16, 4, 1, SPLIT_TAIL=False, maxnreg=255)

# (family or arch, kind of dtype, BLOCK_D) -> regime -> choice. Regimes, first that applies wins: "bias" (with what else
# of the extras is on, it needs most registers), "extras" (a bias, ALiBi, a window or dropout), "short" (max_seqlen at
# most 64: one block of keys holds a sequence, so there is nothing to split or to pipeline), "aligned" (all sequences
# equally long, a multiple of 64), "default". Found by compiling each for its targets: the fewest instructions a score
# among those without spills. float32 has no tensor-core form that meets the error rule, so its tiles are small. CDNA's
# matrix instruction takes 32 rows of a wave: with fewer for each, waves would share rows and compute the softmax twice.
ATTENTION_FORWARD: dict[tuple[str, str, int], dict[str, AttentionTile]] = {
    ("ampere", "half", 16): {
        "default": AttentionTile(64, 64, 4, 3),
        "extras": AttentionTile(64, 32, 4, 2),
        "bias": AttentionTile(64, 32, 4, 2, maxnreg=255),
    },
    ("ampere", "half", 32): {
        "default": AttentionTile(64, 64, 4, 3),
        "short": AttentionTile(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionTile(64, 64, 4, 2, SPLIT_TAIL=False),
        "bias": AttentionTile(64, 32, 4, 2),
    },
    ("ampere", "half", 64): {
        "default": AttentionTile(128, 64, 4, 2),
        "short": AttentionTile(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionTile(64, 64, 4, 2, SPLIT_TAIL=False),
        "bias": AttentionTile(64, 32, 4, 2, SPLIT_TAIL=False),
    },
    ("ampere", "half", 128): {
        "default": AttentionTile(128, 32, 8, 2),
        "short": AttentionTile(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionTile(64, 32, 4, 2, SPLIT_TAIL=False, maxnreg=255),
        "bias": AttentionTile(32, 32, 4, 2, SPLIT_TAIL=False, maxnreg=255),
    },
    ("ampere", "half", 256): {
        "default": AttentionTile(64, 32, 8, 2, SPLIT_TAIL=False),
        "extras": AttentionTile(32, 32, 8, 2, SPLIT_TAIL=False, maxnreg=255),
    },
    ("ampere", "single", 16): {"default": SINGLE},
    ("ampere", "single", 32): {"default": SINGLE},
    ("ampere", "single", 64): {"default": SINGLE},
    ("ampere", "single", 128): {"default": SINGLE},
    ("ampere", "single", 256): {"default": AttentionTile(16, 16, 8, 1, SPLIT_TAIL=False, maxnreg=255)},
    ("hopper", "half", 16): {"default": AttentionTile(64, 64, 4, 3), "extras": AttentionTile(64, 32, 4, 2)},
    ("hopper", "half", 32): {
        "default": AttentionTile(128, 32, 4, 3),
        "short": AttentionTile(64, 64, 4, 1, SPLIT_TAIL=False),
        "aligned": AttentionTile(64, 64, 4, 3),
        "extras": AttentionTile(64, 64, 4, 2, SPLIT_TAIL=False),
        "bias": AttentionTile(64, 32, 4, 2),
    },
    ("hopper", "half", 64): {
        "default": AttentionTile(128, 32, 4, 3),
        "short": AttentionTile(64, 64, 4, 1, SPLIT_TAIL=False),
        "aligned": AttentionTile(128, 64, 8, 3),
        "extras": AttentionTile(64, 64, 4, 2, SPLIT_TAIL=False),
    },
    ("hopper", "half", 128): {
        "default": AttentionTile(128, 32, 4, 3),
        "short": AttentionTile(64, 64, 4, 1, SPLIT_TAIL=False),
        "extras": AttentionTile(64, 32, 4, 2, SPLIT_TAIL=False),
    },
    ("hopper", "half", 256): {
        "default": AttentionTile(128, 32, 8, 2),
        "extras": AttentionTile(64, 32, 8, 2),
        "bias": AttentionTile(64, 32, 8, 2, SPLIT_TAIL=False),
    },
    ("hopper", "single", 16): {"default": SINGLE},
    ("hopper", "single", 32): {"default": SINGLE},
    ("hopper", "single", 64): {"default": SINGLE},
    ("hopper", "single", 128): {"default": SINGLE},
    ("hopper", "single", 256): {"default": AttentionTile(16, 16, 8, 1, SPLIT_TAIL=False, maxnreg=255)},
    ("cdna", "half", 16): {"default": AttentionTile(64, 64, 4, 1), "extras": AttentionTile(64, 32, 4, 1)},
    ("cdna", "half", 32): {
        "default": AttentionTile(128, 64, 4, 1),
        "short": AttentionTile(64, 64, 2, 1, SPLIT_TAIL=False),
    },
    ("cdna", "half", 64): {
        "default": AttentionTile(128, 64, 4, 1),
        "short": AttentionTile(64, 64, 2, 1, SPLIT_TAIL=False),
    },
    ("cdna", "half", 128): {
        "default": AttentionTile(128, 32, 4, 1),
        "short": AttentionTile(64, 64, 2, 1, SPLIT_TAIL=False),
    },
    ("cdna", "half", 256): {"default": AttentionTile(64, 32, 4, 1, SPLIT_TAIL=False)},
    ("cdna", "single", 16): {"default": AttentionTile(32, 32, 4, 1)},
    ("cdna", "single", 32): {"default": AttentionTile(32, 32, 4, 1)},
    ("cdna", "single", 64): {"default": AttentionTile(32, 32, 4, 1)},
    ("cdna", "single", 128): {"default": AttentionTile(32, 32, 4, 1)},
    ("cdna", "single", 256): {"default": AttentionTile(32, 16, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 16): {"default": AttentionTile(64, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 32): {"default": AttentionTile(64, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 64): {"default": AttentionTile(64, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "half", 128): {"default": AttentionTile(64, 16, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "single", 16): {"default": AttentionTile(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "single", 32): {"default": AttentionTile(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("rdna", "single", 64): {"default": AttentionTile(16, 16, 8, 1, SPLIT_TAIL=False)},
}


# Blackwell's data-centre chips take Hopper's tiles but for those that spill there.
ATTENTION_FORWARD |= {
    ("blackwell", kind, block_d): choices
    for (family, kind, block_d), choices in ATTENTION_FORWARD.items()
    if family == "hopper"
}
ATTENTION_FORWARD["blackwell", "half", 16] = {
    "default": AttentionTile(64, 32, 4, 2),
    "bias": AttentionTile(64, 16, 4, 2),
}
ATTENTION_FORWARD["blackwell", "half", 32] = ATTENTION_FORWARD["hopper", "half", 32] | {
    "aligned": AttentionTile(64, 64, 4, 2),
    "extras": AttentionTile(64, 32, 4, 2, SPLIT_TAIL=False),
}
ATTENTION_FORWARD["blackwell", "half", 64] = ATTENTION_FORWARD["hopper", "half", 64] | {
    "aligned": AttentionTile(128, 64, 4, 2),
    "extras": AttentionTile(64, 32, 4, 2, SPLIT_TAIL=False, maxnreg=255),
    "bias": AttentionTile(64, 32, 4, 1, SPLIT_TAIL=False),
}
ATTENTION_FORWARD["blackwell", "half", 128] = ATTENTION_FORWARD["hopper", "half", 128] | {
    "bias": AttentionTile(64, 16, 4, 2, SPLIT_TAIL=False)
}
ATTENTION_FORWARD["blackwell", "half", 256] = ATTENTION_FORWARD["hopper", "half", 256] | {
    "bias": AttentionTile(64, 16, 8, 2)
}
# By arch, before those of its family: this spills on sm_86, sm_89 and sm_120, which are of the family too, and with
# Triton 3.9 on sm_80.
if triton_version() < (3, 9):
    ATTENTION_FORWARD["sm_80", "half", 128] = {"default": AttentionTile(128, 32, 4, 2, SPLIT_TAIL=False)}

# (family or target, kind of dtype, BLOCK_D) -> choice; ANY stands for those without an entry of their own; None where
# no tile fits. On CDNA a wave takes 32 rows of what a program owns: with fewer, two waves would compute the same.
ANY = "any"
ATTENTION_BACKWARD_QUERY: dict[tuple[str, str, int], AttentionTile] = {
    ("ampere", "half", 16): AttentionTile(128, 32, 4, 2),
    ("ampere", "half", 32): AttentionTile(128, 32, 4, 2),
    ("ampere", "half", 64): AttentionTile(128, 32, 4, 1),
    ("sm_120", "half", 64): AttentionTile(64, 32, 4, 2),
    ("ampere", "half", 128): AttentionTile(128, 32, 8, 2),
    ("ampere", "half", 256): AttentionTile(32, 32, 8, 1, maxnreg=255),
    ("hopper", "half", 16): AttentionTile(64, 64, 4, 3),
    ("hopper", "half", 32): AttentionTile(64, 64, 4, 3),
    ("hopper", "half", 64): AttentionTile(64, 64, 4, 3),
    ("hopper", "half", 128): AttentionTile(128, 64, 8, 1),
    ("hopper", "half", 256): AttentionTile(32, 32, 8, 1),
    ("blackwell", "half", 16): AttentionTile(128, 64, 4, 1),
    ("blackwell", "half", 32): AttentionTile(128, 64, 4, 1),
    ("blackwell", "half", 64): AttentionTile(128, 64, 4, 1),
    ("blackwell", "half", 128): AttentionTile(128, 64, 8, 1, maxnreg=255),
    ("blackwell", "half", 256): AttentionTile(64, 16, 8, 1),
    ("cdna", "half", 16): AttentionTile(64, 64, 2, 1),
    ("cdna", "half", 32): AttentionTile(64, 64, 2, 1),
    ("cdna", "half", 64): AttentionTile(128, 64, 4, 1),
    ("cdna", "half", 128): AttentionTile(128, 32, 4, 1),
    ("cdna", "half", 256): AttentionTile(64, 16, 8, 1),
    ("rdna", "half", 16): AttentionTile(64, 32, 4, 1),
    ("rdna", "half", 32): AttentionTile(64, 32, 4, 1),
    ("rdna", "half", 64): AttentionTile(64, 16, 4, 1),
    (ANY, "single", 16): AttentionTile(16, 16, 4, 1),
    (ANY, "single", 32): AttentionTile(16, 16, 4, 1),
    (ANY, "single", 64): AttentionTile(16, 16, 4, 1),
    (ANY, "single", 128): AttentionTile(16, 16, 8, 1),
}
ATTENTION_BACKWARD_KEY: dict[tuple[str, str, int], AttentionKeyTile | None] = {
    ("ampere", "half", 16): AttentionKeyTile(32, 128, 4, 2),
    ("ampere", "half", 32): AttentionKeyTile(32, 128, 4, 2),
    ("ampere", "half", 64): AttentionKeyTile(16, 128, 4, 1),
    ("ampere", "half", 128): AttentionKeyTile(16, 128, 8, 1),
    ("ampere", "half", 256): AttentionKeyTile(32, 32, 8, 1),
    ("hopper", "half", 16): AttentionKeyTile(64, 64, 4, 1),
    ("hopper", "half", 32): AttentionKeyTile(64, 64, 4, 1),
    ("hopper", "half", 64): AttentionKeyTile(32, 64, 4, 1),
    ("hopper", "half", 128): AttentionKeyTile(32, 128, 8, 1),
    ("hopper", "half", 256): AttentionKeyTile(32, 32, 8, 1),
    ("blackwell", "half", 16): AttentionKeyTile(64, 64, 4, 1),
    ("blackwell", "half", 32): AttentionKeyTile(64, 64, 4, 1),
    ("blackwell", "half", 64): AttentionKeyTile(64, 64, 4, 1),
    ("blackwell", "half", 128): AttentionKeyTile(32, 64, 8, 1, maxnreg=255),
    ("blackwell", "half", 256): AttentionKeyTile(16, 64, 8, 1),
    ("cdna", "half", 16): AttentionKeyTile(32, 64, 2, 1),
    ("cdna", "half", 32): AttentionKeyTile(64, 64, 2, 1),
    ("cdna", "half", 64): AttentionKeyTile(32, 64, 2, 1),
    ("cdna", "half", 128): AttentionKeyTile(16, 64, 2, 1),
    ("cdna", "half", 256): AttentionKeyTile(16, 64, 8, 1),
    ("rdna", "half", 16): AttentionKeyTile(32, 64, 4, 1),
    ("rdna", "half", 32): AttentionKeyTile(32, 64, 4, 1),
    ("rdna", "half", 64): AttentionKeyTile(16, 32, 4, 1, SPLIT_TAIL=False),
    ("rdna", "half", 128): None,
    ("rdna", "half", 256): None,
    ("rdna", "single", 64): None,
    (ANY, "single", 16): AttentionKeyTile(16, 16, 4, 1),
    (ANY, "single", 32): AttentionKeyTile(16, 16, 4, 1),
    (ANY, "single", 64): AttentionKeyTile(16, 16, 4, 1),
    (ANY, "single", 128): AttentionKeyTile(16, 16, 8, 1),
    (ANY, "single", 256): None,
}
# In place of those above where a bias, a window, dropout or a head_dim that is no power of two needs registers.
ATTENTION_BACKWARD_QUERY_EXTRAS: dict[tuple[str, str, int], AttentionTile] = {
    (ANY, "half", 16): AttentionTile(64, 32, 4, 1),
    (ANY, "half", 32): AttentionTile(64, 32, 4, 1),
    (ANY, "half", 64): AttentionTile(64, 32, 4, 1),
    (ANY, "half", 128): AttentionTile(64, 32, 8, 1),
    (ANY, "half", 256): AttentionTile(32, 32, 8, 1, SPLIT_TAIL=False, maxnreg=255),
    ("ampere", "half", 32): AttentionTile(64, 32, 4, 1, maxnreg=255),
    ("ampere", "half", 128): AttentionTile(64, 32, 8, 1, SPLIT_TAIL=False, maxnreg=255),
    ("sm_120", "half", 64): AttentionTile(64, 32, 4, 1, SPLIT_TAIL=False, maxnreg=255),
    ("blackwell", "half", 64): AttentionTile(64, 32, 4, 1, maxnreg=255),
    ("blackwell", "half", 128): AttentionTile(64, 32, 8, 1, maxnreg=255),
    ("blackwell", "half", 256): AttentionTile(64, 16, 8, 1),
    ("cdna", "half", 128): AttentionTile(64, 16, 8, 1),
    ("cdna", "half", 256): AttentionTile(64, 16, 8, 1),
    ("rdna", "half", 64): AttentionTile(64, 16, 4, 1, SPLIT_TAIL=False),
}
ATTENTION_BACKWARD_KEY_EXTRAS: dict[tuple[str, str, int], AttentionKeyTile] = {
    (ANY, "half", 16): AttentionKeyTile(32, 64, 4, 1),
    (ANY, "half", 32): AttentionKeyTile(32, 64, 4, 1),
    (ANY, "half", 64): AttentionKeyTile(32, 64, 4, 1, SPLIT_TAIL=False),
    (ANY, "half", 128): AttentionKeyTile(32, 64, 8, 1, SPLIT_TAIL=False),
    (ANY, "half", 256): AttentionKeyTile(32, 32, 8, 1, SPLIT_TAIL=False),
    ("ampere", "half", 16): AttentionKeyTile(32, 64, 4, 1, maxnreg=255),
    ("ampere", "half", 32): AttentionKeyTile(32, 64, 4, 1, maxnreg=255),
    ("ampere", "half", 64): AttentionKeyTile(16, 64, 4, 1, maxnreg=255),
    ("ampere", "half", 128): AttentionKeyTile(16, 64, 8, 1),
    ("sm_120", "half", 128): AttentionKeyTile(16, 64, 8, 1, SPLIT_TAIL=False),
    ("blackwell", "half", 16): AttentionKeyTile(32, 64, 4, 1, maxnreg=255),
    ("blackwell", "half", 64): AttentionKeyTile(32, 64, 4, 1, SPLIT_TAIL=False, maxnreg=255),
    ("blackwell", "half", 256): AttentionKeyTile(16, 64, 8, 1),
    ("cdna", "half", 128): AttentionKeyTile(16, 64, 8, 1),
    ("cdna", "half", 256): AttentionKeyTile(16, 64, 8, 1),
    ("rdna", "half", 32): AttentionKeyTile(16, 64, 4, 1),
    ("rdna", "half", 64): AttentionKeyTile(16, 32, 4, 1, SPLIT_TAIL=False),
}
ATTENTION_BACKWARD_ONE_PASS: dict[tuple[str, str, int], AttentionKeyTile] = {
    ("ampere", "half", 32): AttentionKeyTile(32, 128, 4, 1, ONE_PASS=True),
    ("ampere", "half", 64): AttentionKeyTile(16, 128, 4, 1, ONE_PASS=True),
    ("hopper", "half", 32): AttentionKeyTile(64, 128, 8, 1, ONE_PASS=True),
    ("hopper", "half", 64): AttentionKeyTile(64, 128, 8, 1, SPLIT_TAIL=False, ONE_PASS=True),
}
ATTENTION_BACKWARD_BIAS: dict[tuple[str, str, int], AttentionBiasTile] = {
    (ANY, "half", 16): AttentionBiasTile(64, 16, 4, 1),
    (ANY, "half", 32): AttentionBiasTile(64, 16, 4, 1),
    (ANY, "half", 64): AttentionBiasTile(64, 16, 4, 1),
    (ANY, "half", 128): AttentionBiasTile(64, 16, 4, 1),
    (ANY, "half", 256): AttentionBiasTile(64, 16, 8, 1),
    (ANY, "single", 16): AttentionBiasTile(16, 16, 4, 1),
    (ANY, "single", 32): AttentionBiasTile(16, 16, 4, 1),
    (ANY, "single", 64): AttentionBiasTile(16, 16, 4, 1),
    (ANY, "single", 128): AttentionBiasTile(16, 16, 8, 1),
    ("sm_86", "half", 64): AttentionBiasTile(64, 16, 4, 1, maxnreg=255),
    ("sm_89", "half", 64): AttentionBiasTile(64, 16, 4, 1, maxnreg=255),
    ("ampere", "half", 128): AttentionBiasTile(64, 16, 4, 1, maxnreg=255),
    ("hopper", "half", 16): AttentionBiasTile(64, 32, 4, 1),
    ("hopper", "half", 32): AttentionBiasTile(64, 32, 4, 1),
    ("hopper", "half", 64): AttentionBiasTile(64, 32, 4, 1),
    ("hopper", "half", 128): AttentionBiasTile(64, 32, 8, 1),
}
ATTENTION_BACKWARD_BIAS |= {
    ("blackwell", kind, block_d): choice
    for (family, kind, block_d), choice in ATTENTION_BACKWARD_BIAS.items()
    if family == "hopper"
}
ATTENTION_BACKWARD_BIAS["blackwell", "half", 64] = AttentionBiasTile(64, 32, 4, 1, maxnreg=255)
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
    if (unserved := dtype_unserved(dtype)) is not None:
        return unserved
    if (family(target), DTYPE_KINDS[dtype], attention_block_d(head_dim)) not in ATTENTION_FORWARD:
        return f"head_dim {head_dim} in {dtype} does not fit the registers of {target.arch}"
    if gradient and _of_family(ATTENTION_BACKWARD_KEY, head_dim, dtype, target) is None:
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
) -> AttentionTile:
    """The choice for one attention call; `attention_unserved` must have said None.

    Args:
        rows, batch: tokens and sequences; together with `max_seqlen` they tell a ragged batch.
        extras: a bias, ALiBi, a window or dropout is on.
        bias: a bias is, by places or by distances.
    """
    short, aligned = attention_regime(max_seqlen, rows=rows, batch=batch)
    return _attention_forward(head_dim, dtype, bias, extras, short, aligned, target)


def attention_regime(max_seqlen: int, *, rows: int, batch: int) -> tuple[bool, bool]:
    """What `attention_forward` looks at of a batch's sizes: short sequences; whole tiles and one length."""
    return max_seqlen <= 64, rows == batch * max_seqlen and max_seqlen % 64 == 0


@measured_first
def _attention_forward(
    head_dim: int, dtype: torch.dtype, bias: bool, extras: bool, short: bool, aligned: bool, target: Target
) -> Described[AttentionTile]:
    kind, block_d = DTYPE_KINDS[dtype], attention_block_d(head_dim)
    own = ATTENTION_FORWARD.get((target.kin, kind, block_d), {})
    choices = ATTENTION_FORWARD[family(target), kind, block_d] | own
    regimes = {"bias": bias, "extras": extras, "short": short, "aligned": aligned}
    regime = next((name for name, applies in regimes.items() if applies and name in choices), "default")
    return choices[regime], target, f"head_dim={head_dim},dtype={DTYPE_NAMES[dtype]},regime={regime}"


@measured_first
def attention_backward_query(
    head_dim: int, dtype: torch.dtype, *, extras: bool, target: Target
) -> Described[AttentionTile]:
    """The choice for the gradient of the queries; `extras` as in `attention_forward`."""
    if _needs_room(head_dim, dtype, extras):
        table, regime = ATTENTION_BACKWARD_QUERY_EXTRAS, "extras"
    else:
        table, regime = ATTENTION_BACKWARD_QUERY, "default"
    choice = _of_family(table, head_dim, dtype, target)
    return choice, target, f"head_dim={head_dim},dtype={DTYPE_NAMES[dtype]},regime={regime}"


def attention_backward_key(
    head_dim: int, dtype: torch.dtype, max_seqlen: int, *, dbias: bool, extras: bool, target: Target
) -> AttentionKeyTile:
    """The choice for the gradients of keys and values.

    Args:
        dbias: the bias needs a gradient, and with it what one pass does not write.
        extras: as in `attention_forward`.
    """
    one_pass = ATTENTION_BACKWARD_ONE_PASS.get((family(target), DTYPE_KINDS[dtype], attention_block_d(head_dim)))
    fits = one_pass is not None and max_seqlen <= one_pass.BLOCK_N
    return _attention_backward_key(head_dim, dtype, extras or dbias, one_pass if fits else None, target)


@measured_first
def _attention_backward_key(
    head_dim: int, dtype: torch.dtype, extras: bool, one_pass: AttentionKeyTile | None, target: Target
) -> Described[AttentionKeyTile]:
    choice: AttentionKeyTile | None
    if _needs_room(head_dim, dtype, extras):
        choice, regime = _of_family(ATTENTION_BACKWARD_KEY_EXTRAS, head_dim, dtype, target), "extras"
    elif one_pass is not None:
        choice, regime = one_pass, "one_pass"
    else:
        choice, regime = _of_family(ATTENTION_BACKWARD_KEY, head_dim, dtype, target), "default"
    assert choice is not None  # `attention_unserved` has said so
    return choice, target, f"head_dim={head_dim},dtype={DTYPE_NAMES[dtype]},regime={regime}"


@measured_first
def attention_backward_bias(head_dim: int, dtype: torch.dtype, target: Target) -> Described[AttentionBiasTile]:
    """The choice for the gradient of the bias."""
    choice = _of_family(ATTENTION_BACKWARD_BIAS, head_dim, dtype, target)
    return choice, target, f"head_dim={head_dim},dtype={DTYPE_NAMES[dtype]}"


def attention_backward_bias_beside_relative(head_dim: int, dtype: torch.dtype, target: Target) -> AttentionBiasTile:
    """The choice for the gradient of a bias by places where there is one of distances too, which takes registers."""
    choice = attention_backward_bias(head_dim, dtype, target)
    return replace(choice, maxnreg=255) if target.backend == "cuda" else choice


def attention_backward_relative(head_dim: int, dtype: torch.dtype, target: Target) -> AttentionBiasTile:
    """The choice for the gradient of a bias of distances: that of a bias, of no more columns than rows."""
    choice = attention_backward_bias(head_dim, dtype, target)
    return replace(choice, BLOCK_N=min(choice.BLOCK_M, choice.BLOCK_N))


def attention_backward_relative_parts(programs: int, batch: int) -> int:
    """How many programs share the sequences of one sum of the gradient of a bias of distances, where it has so many.

    Short sequences have few sums, and many of them would leave a GPU idle: there are a thousand programs, a few of each
    multiprocessor of the largest, or one of each sequence.
    """
    return max(1, min(batch, 1024 // programs))


def _needs_room(head_dim: int, dtype: torch.dtype, extras: bool) -> bool:
    """Whether a backward takes the tiles of `..._EXTRAS`."""
    return DTYPE_KINDS[dtype] == "half" and (extras or head_dim != attention_block_d(head_dim))


def _of_family(table: dict[tuple[str, str, int], Choice], head_dim: int, dtype: torch.dtype, target: Target) -> Choice:
    """The entry of the target itself, else that of its family, else that of any."""
    keys = ((owner, DTYPE_KINDS[dtype], attention_block_d(head_dim)) for owner in (target.kin, family(target), ANY))
    return table[next(key for key in keys if key in table)]
