"""attention: checks, the torch path, and the Triton kernel as a custom op."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend, reference
from fastbert.errors import ArgumentError
from fastbert.kernels import launch, target
from fastbert.ops.common import check_dropout, refuse_gradients, wants_gradient
from fastbert.packing import Packing


def attention(
    qkv: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention inside each sequence of a packed batch.

    Args:
        qkv: `[rows, 3, heads, head_dim]`, the QKV product as it is, read by strides; rows >= `packing.tokens`, and
            rows beyond them (slack) are neither read nor written. head_dim is a multiple of 8 up to 256.
        packing: where the sequences begin.
        scale: positive factor on the scores; `head_dim ** -0.5` by default.
        bias: floating, broadcastable to `[batch, heads, max_seqlen, max_seqlen]`; added to the scaled scores, indexed
            by a token's place in its sequence. -inf hides a key from a row.
        window: only keys at most this many places away are seen.
        dropout: probability in [0, 1) that a weight is dropped. The mask is a pure function of (seed, sequence,
            head, row, column): see `reference.keep_mask`.
        seed: int64 tensor of one element on the device of `qkv`; needed when `dropout > 0`.

    Returns:
        `[rows, heads, head_dim]` in the dtype of `qkv`. Softmax runs in float32. A row that may attend nothing is 0.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong.
        BackendError: the Triton path was forced and can't serve this call, or would need a gradient.
    """
    _check(qkv, packing, scale, bias, window, dropout, seed)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    unserved = launch.attention_unserved(qkv.shape[-1], qkv.dtype, target.of(qkv.device))
    if backend.uses_triton("attention", qkv, unserved):
        return _attention_triton(qkv, packing, scale, bias, window, dropout, seed)
    return _attention_torch(qkv, packing, scale, bias, window, dropout, seed)


def _check(
    qkv: Tensor,
    packing: Packing,
    scale: float | None,
    bias: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ArgumentError(
            "qkv", f"{qkv.dtype} of shape {tuple(qkv.shape)}", "a floating [rows, 3, heads, head_dim] tensor"
        )
    if qkv.shape[0] < packing.tokens:
        raise ArgumentError("qkv", f"{qkv.shape[0]} rows", f"at least the {packing.tokens} tokens of the packing")
    if qkv.device != packing.cu_seqlens.device:
        raise ArgumentError("packing", f"on {packing.cu_seqlens.device}", f"on {qkv.device}, the device of qkv")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ArgumentError("scale", scale, "a positive finite number")
    if bias is not None:
        full = (packing.batch, qkv.shape[2], packing.max_seqlen, packing.max_seqlen)
        fits = bias.dim() == 4 and all(b in (1, n) for b, n in zip(bias.shape, full, strict=True))
        if not fits or not bias.is_floating_point():
            raise ArgumentError(
                "bias", f"{bias.dtype} of shape {tuple(bias.shape)}", f"a floating tensor broadcastable to {full}"
            )
        if bias.device != qkv.device:
            raise ArgumentError("bias", f"on {bias.device}", f"on {qkv.device}, the device of qkv")
    if window is not None and window < 0:
        raise ArgumentError("window", window, "zero or more places to each side")
    check_dropout(dropout, seed, qkv)


def _attention_torch(
    qkv: Tensor,
    packing: Packing,
    scale: float,
    bias: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    if bias is None and window is None and dropout == 0.0 and not torch.compiler.is_compiling():
        attend = _attention_exact if wants_gradient(qkv) else _attention_in_lanes
        return attend(qkv, packing, scale)
    keep = None
    if dropout > 0.0 and seed is not None:
        keep = reference.attention_keep_mask(seed, packing.batch, qkv.shape[2], packing.max_seqlen, dropout)
    exact = qkv if qkv.dtype == torch.float64 else qkv.float()
    out, _ = reference.attention(exact, packing, scale=scale, bias=bias, window=window, keep=keep, dropout=dropout)
    return out.to(qkv.dtype)


def _attention_exact(qkv: Tensor, packing: Packing, scale: float) -> Tensor:
    """SDPA on each run of neighbours of one length: no padding, no gather, and few calls on a length-sorted batch."""
    rows, _, heads, head_dim = qkv.shape
    pieces = []
    begin = 0
    for count, length in packing.runs:
        end = begin + count * length
        query, key, value = qkv[begin:end].view(count, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
        begin = end
    pieces.append(qkv.new_zeros(rows - begin, heads, head_dim))
    return torch.cat(pieces)


# torch's SDPA on a CPU takes the exponentials of the columns beyond the last full vector one by one, which at BERT's
# lengths is half of its time. 16 floats are the widest vector there is.
LANES = 16


def _attention_in_lanes(qkv: Tensor, packing: Packing, scale: float) -> Tensor:
    """As `_attention_exact`, each sequence's keys filled up to a multiple of LANES and masked; without gradient.

    What fills them up are the rows that follow in the batch, read where they are. At its end, where none follow, the
    sequences are copied first. A mask does not stop a neighbour's infinity or NaN, so a result that is not finite is
    made again without neighbours.
    """
    rows, _, heads, head_dim = qkv.shape
    stride_row, stride_part, stride_head, stride_dim = qkv.stride()
    context = qkv.new_empty(rows, heads, head_dim)
    context[packing.tokens :] = 0
    begin = 0
    for count, length in packing.runs:
        width = -(-length // LANES) * LANES
        mask = qkv.new_zeros(width)
        mask[length:] = -math.inf
        followed = min(count, max(0, packing.tokens - begin - width + length) // length)
        for first, last in ((0, followed), (followed, count)):
            if first == last:
                continue
            start, end = begin + first * length, begin + last * length
            if last == followed:
                keys = qkv.as_strided(
                    (3, last - first, heads, width, head_dim),
                    (stride_part, length * stride_row, stride_head, stride_row, stride_dim),
                    qkv.storage_offset() + start * stride_row,
                )
            else:
                copy = qkv.new_zeros(last - first, width, 3, heads, head_dim)
                copy[:, :length] = qkv[start:end].unflatten(0, (-1, length))
                keys = copy.permute(2, 0, 3, 1, 4)
            query, key, value = keys[0, :, :, :length], keys[1], keys[2]
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(1, 1, 1, -1), scale=scale)
            context[start:end].unflatten(0, (-1, length)).copy_(out.transpose(1, 2))
        begin += count * length
    return context if context.sum(dtype=torch.float32).isfinite() else _attention_exact(qkv, packing, scale)


def _attention_triton(
    qkv: Tensor,
    packing: Packing,
    scale: float,
    bias: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    refuse_gradients("attention", qkv, bias)
    choice = launch.attention_forward(
        qkv.shape[-1],
        qkv.dtype,
        packing.max_seqlen,
        rows=qkv.shape[0],
        batch=packing.batch,
        extras=bias is not None or window is not None or dropout > 0.0,
        target=target.of(qkv.device),
    )
    if bias is not None:
        bias = bias.expand(packing.batch, qkv.shape[2], packing.max_seqlen, packing.max_seqlen)
    tiles = packing.tiles(choice.BLOCK_M)
    out, _ = attention_forward(qkv, packing.cu_seqlens, tiles, packing.max_seqlen, scale, bias, window, dropout, seed)
    return out


@torch.library.custom_op("fastbert::attention_forward", mutates_args=())
def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.attention.attention_forward`. Returns (out, lse)."""
    from fastbert.kernels import attention as kernel

    return kernel.attention_forward(
        qkv, cu_seqlens, tiles, max_seqlen, scale=scale, bias=bias, window=window, dropout=dropout, seed=seed
    )


@attention_forward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    scale: float,
    bias: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), qkv.new_empty(heads, 0, dtype=torch.float32)
