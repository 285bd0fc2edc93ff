"""rotary: rotary positions of queries and keys (Su et al. 2021, "RoFormer"): checks, torch, and the Triton kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastbert import backend, reference
from fastbert.errors import ArgumentError
from fastbert.kernels import row_wise_choices
from fastbert.ops.common import cast_states, launcher
from fastbert.packing import Packing, check_dense


def rotary(qkv: Tensor, packing: Packing, base: float) -> Tensor:
    """Queries and keys turned by the angles of their places, so that a score depends on how far apart two tokens are.

    Columns `i` and `i + head_dim / 2` of a head turn together, by `place * base ** (-2 i / head_dim)`. The packing
    keeps their cosines and sines for the layers to come.

    Args:
        qkv: floating `[rows, 3, heads, head_dim]`, an even `head_dim`; rows >= `packing.tokens`. On a GPU heads wider
            than 1024 are turned in torch.
        packing: whose `columns` are the places.
        base: above 1; 10,000 in the paper.

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
    if not isinstance(base, int | float) or not 1.0 < base < math.inf:
        raise ArgumentError("base", base, "a number above 1")
    (qkv,) = cast_states(qkv)
    head_dim = qkv.shape[3]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    angles = packing.kept(
        ("rotary", head_dim, base, wide), lambda: reference.rotary_angles(packing, head_dim, base, wide)
    )
    if backend.uses_triton("rotary", qkv, row_wise_choices.rotary_unserved(head_dim, qkv.dtype)):
        return launcher(rotary_forward, qkv)(qkv, angles, False)
    return reference.rotary(qkv, angles)


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
