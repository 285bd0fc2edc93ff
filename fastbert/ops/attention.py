"""attention: its checks, and the choice between the Triton kernels and torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fastbert import backend
from fastbert.errors import ArgumentError
from fastbert.kernels import attention_choices, target
from fastbert.ops.attention_extras import Extras
from fastbert.ops.attention_torch import attention_torch
from fastbert.ops.attention_triton import attention_triton, prepare_attention_triton
from fastbert.ops.common import cast_states, wants_gradient
from fastbert.packing import Packing, check_dense


def attention(
    qkv: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention inside each sequence of a packed batch.

    Args:
        qkv: `[rows, 3, heads, head_dim]`, the QKV product as it is, read by strides; rows >= `packing.tokens`, and
            rows beyond them (slack) are neither read nor written. On a GPU heads that are no multiple of 8 wide are
            copied, filled up with zeros, and those wider than 256 run in torch.
        packing: where the sequences begin.
        scale: positive factor on the scores; `head_dim ** -0.5` by default.
        bias: floating, broadcastable to `[batch, heads, max_seqlen, max_seqlen]`; added to the scaled scores, indexed
            by a token's place in its sequence. -inf hides a key from a row.
        relative: floating `[heads, 2 * places - 1]`, `places >= packing.max_seqlen`, on the device of `qkv`: a bias of
            distances. `relative[h, places - 1 + column - row]` is added to the scaled scores of head h.
        alibi_slopes: float32 `[heads]`, finite, on the device of `qkv`, without gradient: `slope * |row - column|` is
            taken off the scaled scores of its head, the bidirectional form of ALiBi.
        window: only keys at most this many places away are seen.
        dropout: probability in [0, 1) that a weight is dropped. The mask is a pure function of (seed, sequence,
            head, row, column): see `reference.keep_mask`.
        seed: int64 tensor of one element on the device of `qkv`; needed when `dropout > 0`.

    Returns:
        `[rows, heads, head_dim]` in the dtype of `qkv`. Softmax runs in float32. A row that may attend nothing is 0.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
        BackendError: the Triton path was forced and can't serve this call.
    """
    extras = Extras(bias, relative, alibi_slopes, window, dropout, seed)
    _check(qkv, packing, scale, extras)
    (qkv,) = cast_states(qkv)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    gradient = wants_gradient(qkv, bias, relative)
    if _uses_triton(qkv, gradient=gradient):
        return attention_triton(qkv, packing, scale, extras, gradient=gradient)
    return attention_torch(qkv, packing, scale, extras)


def prepare_attention(qkv: Tensor, packing: Packing) -> Callable[[Tensor, Packing], Tensor] | None:
    """Inference without extras as a function of tensors of one kind, see `run.prepared`; None: it can't be served.

    The function takes rows of queries, keys and values one after another, `[rows, 3 * heads * head_dim]`, and gives
    `[rows, heads * head_dim]`: a view costs the host as much as the call of a kernel.

    Raises:
        ArgumentError, BackendError: as `attention`.
    """
    _check(qkv, packing, None, Extras())
    return prepare_attention_triton(qkv, packing) if _uses_triton(qkv, gradient=False) else None


def _uses_triton(qkv: Tensor, *, gradient: bool) -> bool:
    unserved = attention_choices.attention_unserved(qkv.shape[-1], qkv.dtype, target.of(qkv.device), gradient=gradient)
    return backend.uses_triton("attention", qkv, unserved)


def _check(qkv: Tensor, packing: Packing, scale: float | None, extras: Extras) -> None:
    check_dense("qkv", qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ArgumentError(
            "qkv", f"{qkv.dtype} of shape {tuple(qkv.shape)}", "a floating [rows, 3, heads, head_dim] tensor"
        )
    packing.check_rows("qkv", qkv)
    if qkv.shape[3] == 0:
        raise ArgumentError("qkv", f"shape {tuple(qkv.shape)}", "heads of at least one column")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ArgumentError("scale", scale, "a positive finite number")
    extras.check(qkv, packing)
