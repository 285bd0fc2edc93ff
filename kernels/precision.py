"""How matrix units multiply and sum: float32 as torch was asked for, and fp8."""

from __future__ import annotations

from typing import Literal

import torch

from fastbert.kernels.target import Target

# The deepest product in fp8 that sums fast: BERT's hidden sizes, and not what its feed-forward is wide.
FP8_FAST_DEPTH = 1024

# How `tl.dot` multiplies float32: as such, as TF32, or as three products of TF32, which have most of its bits.
Precision = Literal["ieee", "tf32", "tf32x3"]

_FLOAT32: dict[str, Precision] = {"high": "tf32x3", "medium": "tf32"}


def float32_asked() -> str:
    """What torch's own products of float32 may be on a GPU: "highest", "high" or "medium".

    The names are those of `torch.set_float32_matmul_precision`, which at the last allows bfloat16 on a CPU. Its getter
    is not asked: beside torch's newer way, `torch.backends.cuda.matmul.fp32_precision`, it takes 80 us to raise.
    """
    asked = torch._C._get_fp32_precision_getter
    if asked("cuda", "matmul") != "tf32":
        return "highest"
    return "medium" if asked("mkldnn", "matmul") == "bf16" else "high"


def float32_precision(dtype: torch.dtype, asked: str, target: Target) -> Precision:
    """How a kernel multiplies states of `dtype` where `float32_asked` says `asked`.

    NVIDIA's tensor cores take float32 as TF32 only, so that must be asked for, as for torch's products. Three such
    products hold the error rule by a model of the hardware, one does not; see docs/numerics.md. AMD's matrix units
    multiply float32 as such (CDNA), or not at all (RDNA).
    """
    if dtype != torch.float32 or target.backend == "hip":
        return "ieee"
    return _FLOAT32.get(asked, "ieee")


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
