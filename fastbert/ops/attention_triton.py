"""attention by the Triton kernels, which are custom ops with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.errors import BackendError
from fastbert.kernels import attention_choices, target
from fastbert.ops.attention_extras import Extras
from fastbert.ops.common import launcher
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing


def attention_triton(qkv: Tensor, packing: Packing, scale: float, extras: Extras, *, gradient: bool) -> Tensor:
    """`attention`, of arguments that were checked; `gradient`: whether one is wanted."""
    bias, relative, more, dtype, here = extras.bias, extras.relative, extras.wanted(), qkv.dtype, target.of(qkv.device)
    biased = bias is not None or relative is not None
    filled, max_seqlen = _filled(qkv), packing.max_seqlen
    rows, _, _, head_dim = filled.shape
    forward = attention_choices.attention_forward(
        head_dim, dtype, max_seqlen,
        rows=rows, batch=packing.batch, extras=more, bias=biased, target=here,
    )  # fmt: skip
    tiles = [tile_table(packing, forward.BLOCK_M)]
    if gradient:
        dbias = any(x is not None and x.requires_grad for x in (bias, relative))
        by_query = attention_choices.attention_backward_query(head_dim, dtype, extras=more, target=here)
        by_key = attention_choices.attention_backward_key(
            head_dim, dtype, max_seqlen, dbias=dbias, extras=more, target=here
        )
        tiles += [tile_table(packing, by_query.BLOCK_M), tile_table(packing, by_key.BLOCK_N)]
    out, _ = launcher(attention_forward, filled, bias, relative)(
        filled, packing.cu_seqlens, tiles, max_seqlen, packing.tokens, scale, *extras
    )
    return out if filled is qkv else out[..., : qkv.shape[-1]]


def prepare_attention_triton(qkv: Tensor, packing: Packing) -> Callable[[Tensor, Packing], Tensor]:
    """See `attention.prepare_attention`."""
    from fastbert.kernels import attention as kernel

    heads, head_dim, filled = qkv.shape[2], qkv.shape[3], _filled(qkv)
    choice = attention_choices.attention_forward(
        filled.shape[-1], qkv.dtype, packing.max_seqlen,
        rows=len(qkv), batch=packing.batch, extras=False, target=target.of(qkv.device),
    )  # fmt: skip
    tiles, scale = tile_table(packing, choice.BLOCK_M), head_dim**-0.5
    start = kernel.prepare_attention_forward(filled, packing.cu_seqlens, tiles, packing.max_seqlen, scale=scale)

    def run(qkv: Tensor, packing: Packing) -> Tensor:
        return start(qkv, packing.cu_seqlens, tile_table(packing, choice.BLOCK_M))[0]

    if filled is qkv:
        return lambda qkv, packing: run(qkv, packing).flatten(1)
    return lambda qkv, packing: run(_filled(qkv.view(-1, 3, heads, head_dim)), packing)[..., :head_dim].flatten(1)


def _filled(qkv: Tensor) -> Tensor:
    """Heads filled up with zeros to a multiple of 8, since the Triton kernels read them in pieces of 16 bytes.

    It changes no score, and the columns that come of it are left out of the result.
    """
    missing = -qkv.shape[-1] % 8
    return F.pad(qkv, (0, missing)) if missing else qkv


def _expanded(bias: Tensor | None, cu_seqlens: Tensor, heads: int, max_seqlen: int) -> Tensor | None:
    return None if bias is None else bias.expand(len(cu_seqlens) - 1, heads, max_seqlen, max_seqlen)


@torch.library.custom_op("fastbert::attention_forward", mutates_args=())
def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Sequence[Tensor],
    max_seqlen: int,
    tokens: int,
    scale: float,
    bias: Tensor | None,
    relative: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel; see `fastbert.kernels.attention.attention_forward`. Returns (out, lse).

    `tiles` holds the forward's table, followed by the two of the backward where a gradient is wanted; only then lse is
    stored.
    """
    from fastbert.kernels import attention as kernel

    return kernel.attention_forward(
        qkv,
        cu_seqlens,
        tiles[0],
        max_seqlen,
        scale=scale,
        bias=_expanded(bias, cu_seqlens, qkv.shape[2], max_seqlen),
        relative=None if relative is None else relative.contiguous(),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        window=window,
        dropout=dropout,
        seed=seed,
        store_lse=len(tiles) > 1,
    )


@attention_forward.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, tiles: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, head_dim = qkv.shape[0], *qkv.shape[2:]
    lse = qkv.new_empty(heads, rows if len(tiles) > 1 else 0, dtype=torch.float32)
    return qkv.new_empty(rows, heads, head_dim), lse


@torch.library.custom_op("fastbert::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    needs_dbias: bool,
    needs_drelative: bool,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    relative: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    max_seqlen: int,
    tokens: int,
    scale: float,
    window: int | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernels; see `fastbert.kernels.attention_backward`.

    Returns (dqkv, dbias or `[0]`, drelative or `[0]`).
    """
    from fastbert.kernels import attention_backward as kernel

    dqkv, dbias, drelative = kernel.attention_backward(
        dout,
        qkv,
        out,
        lse,
        cu_seqlens,
        query_tiles,
        key_tiles,
        max_seqlen,
        tokens=tokens,
        scale=scale,
        bias=_expanded(bias, cu_seqlens, qkv.shape[2], max_seqlen),
        dbias_shape=bias.shape if bias is not None and needs_dbias else None,
        relative=None if relative is None else relative.contiguous(),
        needs_drelative=needs_drelative,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        window=window,
        dropout=dropout,
        seed=seed,
    )
    dbias = lse.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)
    drelative = lse.new_empty(0) if relative is None or drelative is None else drelative.to(relative.dtype)
    return dqkv, dbias, drelative


@attention_backward.register_fake
def _(
    dout: Tensor,
    needs_dbias: bool,
    needs_drelative: bool,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    relative: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and needs_dbias else lse.new_empty(0)
    drelative = relative.new_empty(relative.shape) if relative is not None and needs_drelative else lse.new_empty(0)
    return qkv.new_empty(qkv.shape), dbias, drelative


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, tiles, max_seqlen, tokens, scale, bias, relative, alibi_slopes, window, dropout, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of lse
    ctx.tables = len(tiles)
    # both as `attention_backward` takes them
    ctx.save_for_backward(qkv, out, lse, bias, relative, alibi_slopes, seed, cu_seqlens, *tiles[1:])
    ctx.options = max_seqlen, tokens, scale, window, dropout


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    no_tables = [None] * ctx.tables
    if dout is None:
        return None, None, no_tables, None, None, None, None, None, None, None, None, None
    if ctx.tables == 1:
        raise BackendError(
            "attention_forward", "a gradient asked for with one table of tiles", "the backward's tables in the forward"
        )
    needs = ctx.needs_input_grad[6:8]
    dqkv, *found = attention_backward(dout, *needs, *ctx.saved_tensors, *ctx.options)
    biases = (dx if needed else None for dx, needed in zip(found, needs, strict=True))
    return dqkv, None, no_tables, None, None, None, *biases, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save)
