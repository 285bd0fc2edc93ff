"""Launch choices of linear_gelu: which form runs, and the tiles of the one that is a kernel of ours."""

from __future__ import annotations

import torch

from fastbert.kernels.choices import (
    DTYPE_KINDS,
    DTYPE_NAMES,
    Described,
    LinearGeluForm,
    LinearGeluTile,
    family,
    measured_first,
)
from fastbert.kernels.target import Target

# (family, kind of dtype) -> tiles. Every form of the kernel compiles without spills; four warps for 128 x 128 run fewer
# instructions, and spill where the product is stored or the depth masked. Two programs on a multiprocessor, where they
# fit, let the GELU of one run beside the products of the other.
LINEAR_GELU_FORWARD: dict[tuple[str, str], LinearGeluTile] = {
    ("ampere", "half"): LinearGeluTile(128, 128, 32, 8, 3, maxnreg=255),
    ("ampere", "single"): LinearGeluTile(64, 64, 32, 4, 2),
    ("hopper", "half"): LinearGeluTile(128, 128, 64, 8, 3, PROGRAMS=2),
    ("hopper", "single"): LinearGeluTile(64, 64, 32, 4, 2),
    ("blackwell", "half"): LinearGeluTile(128, 128, 64, 8, 3),
    ("blackwell", "single"): LinearGeluTile(64, 64, 32, 4, 2),
    ("cdna", "half"): LinearGeluTile(128, 128, 32, 4, 2, PROGRAMS=2),
    ("cdna", "single"): LinearGeluTile(64, 64, 32, 4, 2),
    ("rdna", "half"): LinearGeluTile(64, 64, 32, 4, 2, PROGRAMS=2),
    ("rdna", "single"): LinearGeluTile(32, 32, 32, 4, 2),
}

# Numbers of rows up to which a measured choice of linear_gelu serves; the last serves all that are more.
ROW_BOUNDS = (512, 2048, 8192)


def linear_gelu(
    rows: int, width: int, depth: int, dtype: torch.dtype, *, approximate: str, gradient: bool, target: Target
) -> LinearGeluForm:
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
) -> Described[LinearGeluForm]:
    shape = f"{_product(row_bound, width, depth, dtype)},regime={regime}"
    return LinearGeluForm("fused pass"), target, shape


def linear_gelu_forward(rows: int, width: int, depth: int, dtype: torch.dtype, target: Target) -> LinearGeluTile:
    """The choice for `[rows, depth] x [depth, width]`."""
    return _linear_gelu_forward(row_bound(rows), width, depth, dtype, target)


@measured_first
def _linear_gelu_forward(
    row_bound: int, width: int, depth: int, dtype: torch.dtype, target: Target
) -> Described[LinearGeluTile]:
    default = LINEAR_GELU_FORWARD[family(target), DTYPE_KINDS[dtype]]
    return default, target, _product(row_bound, width, depth, dtype)


def row_bound(rows: int) -> int:
    """What `linear_gelu` looks at of a number of rows."""
    return next((bound for bound in ROW_BOUNDS if rows <= bound), ROW_BOUNDS[-1])


def _product(row_bound: int, width: int, depth: int, dtype: torch.dtype) -> str:
    return f"rows={row_bound},width={width},depth={depth},dtype={DTYPE_NAMES[dtype]}"
