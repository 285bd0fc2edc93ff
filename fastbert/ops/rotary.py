"""rotary: rotary positions of queries and keys (Su et al. 2021, "RoFormer"): checks, torch, and the Triton kernel.

The kernel of attention on a CPU turns queries and keys itself, by `angles_of_places`; see `run.cpu`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastbert import backend, reference
from fastbert.errors import ArgumentError
from fastbert.kernels import row_wise_choices
from fastbert.ops.common import cast_states, launcher
from fastbert.packing import Packing, check_dense


def rotary(qkv: Tensor, packing: Packing, base: float, scale: float = 1.0) -> Tensor:
    """Queries and keys turned by the angles of their places, so that a score depends on how far apart two tokens are.

    Columns `i` and `i + head_dim / 2` of a head turn together, by `scale * place * base ** (-2 i / head_dim)`. The
    packing keeps their cosines and sines for the layers to come.

    Args:
        qkv: floating `[rows, 3, heads, head_dim]`, an even `head_dim`; rows >= `packing.tokens`. On a GPU heads wider
            than 1024 are turned in torch.
        packing: whose `columns` are the places.
        base: above 1; 10,000 in the paper.
        scale: above 0; 1 in the paper.

    Returns:
        `[rows, 3, heads, head_dim]` in the dtype of `qkv`, computed in float32 (float64 for float64) and rounded once.
        Values, and rows beyond the tokens (slack), are as they were.

    Raises:
        ArgumentError: a shape, dtype or value is wrong.
        BackendError: the Triton path was forced and can't serve this call.
    """
    check_dense("qkv", qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2 or not qkv.is_floating_point():
        got = f"{qkv.dtype} of shape {tuple(qkv.shape)}"
        raise ArgumentError("qkv", got, "a floating [rows, 3, heads, head_dim] tensor, head_dim even")
    packing.check_rows("qkv", qkv)
    check_base(base, scale)
    (qkv,) = cast_states(qkv)
    head_dim = qkv.shape[3]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    angles = packing.kept(
        ("rotary", head_dim, base, scale, wide), lambda: reference.rotary_angles(packing, head_dim, base, wide, scale)
    )
    if backend.uses_triton("rotary", qkv, row_wise_choices.rotary_unserved(head_dim, qkv.dtype)):
        return launcher(rotary_forward, qkv)(qkv, angles, False)
    return reference.rotary(qkv, angles)


def check_base(base: float, scale: float) -> None:
    """Raise ArgumentError unless they are numbers, above 1 and above 0."""
    for name, value, least in (("base", base, 1), ("scale", scale, 0)):
        if not isinstance(value, int | float) or not least < value < math.inf:
            raise ArgumentError(name, value, f"a number above {least}")


def angles_of_places(places: int, head_dim: int, base: float, scale: float = 1.0) -> Tensor:
    """float32 `[at least places, 2, head_dim / 2]` on the CPU: cosine and sine of each place, as its kernels read them.

    They are made once for all that ask for as many places, up to the next power of two.

    Raises:
        ArgumentError: `base` is not above 1, or `scale` not above 0.
    """
    check_base(base, scale)
    return _angles(1 << max(places - 1, 0).bit_length(), head_dim, base, scale)


@lru_cache(maxsize=64)
def _angles(places: int, head_dim: int, base: float, scale: float) -> Tensor:
    with torch.inference_mode(False):  # what is made inside could not be read where autograd records
        line = Packing.from_lengths([places], device="cpu")
        angles = reference.rotary_angles(line, head_dim, base, torch.float32, scale)
        return angles.transpose(0, 1).contiguous()


@torch.library.custom_op("fastbert::rotary_forward", mutates_args=())
def rotary_forward(qkv: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    """The Triton kernel; see `fastbert.kernels.rotary.rotary_forward`."""
    from fastbert.kernels import rotary as kernel

    return kernel.rotary_forward(qkv, angles, inverse=inverse)


@rotary_forward.register_fake
def _(qkv: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, angles, ctx.inverse = inputs
    ctx.save_for_backward(angles)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
    (angles,) = ctx.saved_tensors
    return rotary_forward(dout, angles, not ctx.inverse), None, None


rotary_forward.register_autograd(_backward, setup_context=_save)
