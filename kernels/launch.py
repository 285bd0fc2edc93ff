"""Launch choices as data: (op, shape, dtype, target) -> a frozen dataclass. Pure; nothing here touches a device.

Tiles for attention follow what the compilers make of each form (docs/kernels.md); `tuned.json` holds choices that
were measured on a real GPU and comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastbert.kernels.target import Target


@dataclass(frozen=True)
class AttentionForward:
    """BLOCK_M query rows a program, BLOCK_N keys a step; SPLIT_TAIL runs full key blocks unmasked, then a masked tail."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT_TAIL: bool = True


# (family, kind of dtype, BLOCK_D) -> regime -> choice. Regimes, first that applies wins: "extras" (bias, window or
# dropout, which need registers), "padded" (head_dim is no power of two), "short" (max_seqlen <= 64), "aligned" (all
# sequences equally long, a multiple of 64), "default". Found by compiling each for its targets: the fewest
# instructions a score among those without spills. float32 has no tensor-core form that meets the error rule, so its
# tiles are small.
ATTENTION_FORWARD: dict[tuple[str, str, int], dict[str, AttentionForward]] = {
    ("ampere", "half", 16): {"default": AttentionForward(64, 64, 4, 3), "extras": AttentionForward(64, 32, 4, 2)},
    ("ampere", "half", 32): {"default": AttentionForward(64, 64, 4, 3), "extras": AttentionForward(64, 32, 4, 2)},
    ("ampere", "half", 64): {
        "default": AttentionForward(128, 64, 4, 2),
        "short": AttentionForward(64, 64, 4, 2),
        "padded": AttentionForward(64, 64, 4, 2),
        "extras": AttentionForward(64, 32, 4, 1, SPLIT_TAIL=False),
    },
    ("ampere", "half", 128): {
        "default": AttentionForward(128, 64, 8, 2),
        "short": AttentionForward(64, 32, 4, 2),
        "padded": AttentionForward(64, 32, 4, 2),
        "extras": AttentionForward(32, 32, 4, 2, SPLIT_TAIL=False),
    },
    ("ampere", "half", 256): {"default": AttentionForward(64, 32, 8, 2, SPLIT_TAIL=False)},
    ("ampere", "single", 16): {"default": AttentionForward(32, 32, 4, 1, SPLIT_TAIL=False)},
    ("ampere", "single", 32): {"default": AttentionForward(32, 32, 4, 1, SPLIT_TAIL=False)},
    ("ampere", "single", 64): {"default": AttentionForward(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("ampere", "single", 128): {"default": AttentionForward(32, 16, 8, 1, SPLIT_TAIL=False)},
    ("ampere", "single", 256): {"default": AttentionForward(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("hopper", "half", 16): {"default": AttentionForward(64, 64, 4, 3), "extras": AttentionForward(64, 32, 4, 2)},
    ("hopper", "half", 32): {
        "default": AttentionForward(128, 32, 4, 3),
        "short": AttentionForward(64, 64, 4, 2),
        "aligned": AttentionForward(64, 64, 4, 3),
        "extras": AttentionForward(64, 32, 4, 2),
    },
    ("hopper", "half", 64): {
        "default": AttentionForward(128, 32, 4, 3),
        "short": AttentionForward(64, 64, 4, 2),
        "aligned": AttentionForward(128, 64, 8, 3),
        "extras": AttentionForward(64, 32, 4, 2),
    },
    ("hopper", "half", 128): {
        "default": AttentionForward(128, 32, 4, 3),
        "short": AttentionForward(64, 32, 4, 2),
        "padded": AttentionForward(64, 32, 4, 2),
        "extras": AttentionForward(64, 32, 4, 2),
    },
    ("hopper", "half", 256): {"default": AttentionForward(128, 32, 8, 2)},
    ("hopper", "single", 16): {"default": AttentionForward(32, 32, 4, 1, SPLIT_TAIL=False)},
    ("hopper", "single", 32): {"default": AttentionForward(32, 32, 4, 1, SPLIT_TAIL=False)},
    ("hopper", "single", 64): {"default": AttentionForward(32, 32, 8, 1, SPLIT_TAIL=False)},
    ("hopper", "single", 128): {"default": AttentionForward(32, 16, 8, 1, SPLIT_TAIL=False)},
    ("hopper", "single", 256): {"default": AttentionForward(16, 32, 8, 1, SPLIT_TAIL=False)},
    ("cdna", "half", 16): {"default": AttentionForward(64, 64, 4, 1), "extras": AttentionForward(64, 32, 4, 1)},
    ("cdna", "half", 32): {"default": AttentionForward(128, 64, 4, 1), "extras": AttentionForward(64, 32, 4, 1)},
    ("cdna", "half", 64): {"default": AttentionForward(128, 64, 4, 1), "extras": AttentionForward(64, 32, 4, 1)},
    ("cdna", "half", 128): {"default": AttentionForward(128, 32, 4, 1), "extras": AttentionForward(64, 32, 4, 1)},
    ("cdna", "half", 256): {"default": AttentionForward(64, 32, 4, 1)},
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


def attention_block_d(head_dim: int) -> int:
    """Columns of the tile that holds a head: the next power of two, at least the 16 that a dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_unserved(head_dim: int, dtype: torch.dtype, target: Target) -> str | None:
    """Why the attention kernel can't serve this shape on this target, or None when it can."""
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"head_dim {head_dim} is not a multiple of 8 from 8 to 256"
    if dtype not in _KINDS:
        return f"{dtype} is not float16, bfloat16 or float32"
    if (_family(target), _KINDS[dtype], attention_block_d(head_dim)) not in ATTENTION_FORWARD:
        return f"head_dim {head_dim} in {dtype} does not fit the registers of {target.arch}"
    return None


def attention_forward(
    head_dim: int, dtype: torch.dtype, max_seqlen: int, *, rows: int, batch: int, extras: bool, target: Target
) -> AttentionForward:
    """The choice for one attention call; `attention_unserved` must have said None.

    Args:
        rows, batch: tokens and sequences; together with `max_seqlen` they tell a ragged batch.
        extras: a bias, a window or dropout is on.
    """
    choices = ATTENTION_FORWARD[_family(target), _KINDS[dtype], attention_block_d(head_dim)]
    regimes = {
        "extras": extras,
        "padded": head_dim != attention_block_d(head_dim),
        "short": max_seqlen <= 64,
        "aligned": rows == batch * max_seqlen and max_seqlen % 64 == 0,
    }
    regime = next((name for name, applies in regimes.items() if applies and name in choices), "default")
    return choices[regime]


def drop_threshold(dropout: float) -> int:
    """Draws of 0..65535 below this are dropped: `dropout` rounded to a multiple of 2^-16."""
    return round(dropout * 65536)


def drop_scale(dropout: float) -> float:
    """What the kept elements are multiplied by, so that the expectation is unchanged."""
    return 65536 / (65536 - drop_threshold(dropout))


_KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "single"}


def _family(target: Target) -> str:
    """Targets that share a table of tiles."""
    if target.backend == "hip":
        return "cdna" if target.warp_size == 64 else "rdna"
    return "hopper" if target.arch in ("sm_90", "sm_100") else "ampere"
