"""attention: checks, the torch path, and the Triton kernel as a custom op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import attention_choices, target
from fastbert.kernels.dropout import drop_scale
from fastbert.ops.common import cast_states, check_dropout, launched, native_machine, wants_gradient
from fastbert.ops.dropout import keep_lines
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Block, Packing, check_dense

# The kernel of a CPU is written out for each width of a head: wider ones would take seconds to compile.
WIDEST_HEAD = 256


def attention(
    qkv: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
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
    _check(qkv, packing, scale, bias, alibi_slopes, window, dropout, seed)
    (qkv,) = cast_states(qkv)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    gradient = wants_gradient(qkv, bias)
    unserved = attention_choices.attention_unserved(qkv.shape[-1], qkv.dtype, target.of(qkv.device), gradient=gradient)
    if backend.uses_triton("attention", qkv, unserved):
        filled = _filled(qkv)
        out = _attention_triton(filled, packing, scale, bias, alibi_slopes, window, dropout, seed, gradient)
        return out if filled is qkv else out[..., : qkv.shape[-1]]
    return _attention_torch(qkv, packing, scale, bias, alibi_slopes, window, dropout, seed)


def prepare_attention(qkv: Tensor, packing: Packing) -> Callable[[Tensor, Packing], Tensor] | None:
    """Inference without options as a function of tensors of one kind, see `run.prepared`; None: it can't be served.

    Raises:
        ArgumentError, BackendError: as `attention`.
    """
    from fastbert.kernels import attention as kernel

    _check(qkv, packing, None, None, None, None, 0.0, None)
    head_dim, here = qkv.shape[-1], target.of(qkv.device)
    unserved = attention_choices.attention_unserved(head_dim, qkv.dtype, here, gradient=False)
    if not backend.uses_triton("attention", qkv, unserved):
        return None
    filled = _filled(qkv)
    choice = attention_choices.attention_forward(
        filled.shape[-1], qkv.dtype, packing.max_seqlen, rows=len(qkv), batch=packing.batch, extras=False, target=here
    )
    tiles, scale = tile_table(packing, choice.BLOCK_M), head_dim**-0.5
    start = kernel.prepare_attention_forward(filled, packing.cu_seqlens, tiles, packing.max_seqlen, scale=scale)

    def run(qkv: Tensor, packing: Packing) -> Tensor:
        return start(_filled(qkv), packing.cu_seqlens, tile_table(packing, choice.BLOCK_M))[0]

    return run if filled is qkv else lambda qkv, packing: run(qkv, packing)[..., :head_dim]


def _filled(qkv: Tensor) -> Tensor:
    """Heads filled up with zeros to a multiple of 8, since the Triton kernels read them in pieces of 16 bytes.

    It changes no score, and the columns that come of it are left out of the result.
    """
    missing = -qkv.shape[-1] % 8
    return F.pad(qkv, (0, missing)) if missing else qkv


def _check(
    qkv: Tensor,
    packing: Packing,
    scale: float | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
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
    if bias is not None:
        check_dense("bias", bias)
        full = (packing.batch, qkv.shape[2], packing.max_seqlen, packing.max_seqlen)
        fits = bias.dim() == 4 and all(b in (1, n) for b, n in zip(bias.shape, full, strict=True))
        if not fits or not bias.is_floating_point():
            raise ArgumentError(
                "bias", f"{bias.dtype} of shape {tuple(bias.shape)}", f"a floating tensor broadcastable to {full}"
            )
        if bias.device != qkv.device:
            raise ArgumentError("bias", f"on {bias.device}", f"on {qkv.device}, the device of qkv")
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, qkv)
    if window is not None and window < 0:
        raise ArgumentError("window", window, "zero or more places to each side")
    check_dropout(dropout, seed, qkv)


def _check_slopes(alibi_slopes: Tensor, qkv: Tensor) -> None:
    if alibi_slopes.dtype != torch.float32 or alibi_slopes.shape != qkv.shape[2:3]:
        got = f"{alibi_slopes.dtype} of shape {tuple(alibi_slopes.shape)}"
        raise ArgumentError("alibi_slopes", got, f"float32 of shape ({qkv.shape[2]},), one of each head")
    if alibi_slopes.device != qkv.device:
        raise ArgumentError("alibi_slopes", f"on {alibi_slopes.device}", f"on {qkv.device}, the device of qkv")
    if alibi_slopes.requires_grad:
        raise ArgumentError("alibi_slopes", "a tensor that requires a gradient", "one without: pass it detached")


def _attention_torch(
    qkv: Tensor,
    packing: Packing,
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    if bias is None and alibi_slopes is None and window is None and not torch.compiler.is_compiling():
        if dropout > 0.0 and seed is not None:
            return _DroppedAttention.apply(qkv, packing, scale, dropout, seed)  # type: ignore[no-untyped-call]
        if wants_gradient(qkv):
            return _attention_exact(qkv, packing, scale)
        out = qkv.new_empty(len(qkv), *qkv.shape[2:])
        attend(qkv, packing, scale, out)
        return out
    keep = None
    if dropout > 0.0 and seed is not None:
        keep = reference.attention_keep_mask(seed, packing.batch, qkv.shape[2], packing.max_seqlen, dropout)
    exact = qkv if qkv.dtype == torch.float64 else qkv.float()
    out, _ = reference.attention(
        exact, packing, scale=scale, bias=bias, alibi_slopes=alibi_slopes, window=window, keep=keep, dropout=dropout
    )
    return out.to(qkv.dtype)


def _attention_exact(qkv: Tensor, packing: Packing, scale: float) -> Tensor:
    """SDPA on each run of neighbours of one length: no padding, no gather, and few calls on a length-sorted batch."""
    pieces = []
    for run in _runs(qkv, packing):
        query, key, value = run.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    pieces.append(qkv.new_zeros(len(qkv) - packing.tokens, *qkv.shape[2:]))
    return torch.cat(pieces)


def _runs(x: Tensor, packing: Packing) -> list[Tensor]:
    """`[rows, ...]` -> a view `[count, length, ...]` for each run of `packing`."""
    sizes = [count * length for count, length in packing.runs]
    parts = x[: packing.tokens].split(sizes) if sizes else ()
    return [part.unflatten(0, run) for part, run in zip(parts, packing.runs, strict=True)]


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout, by matrix products over each of the packing's blocks.

    Of the weights, `[heads, seqlen]` for a token, only which are kept is saved; the backward makes them again. Half
    types are multiplied in float32 where the products are scores, or their gradients, which differences are taken of;
    bfloat16 by itself in the others, as the kernels do: a CPU is two to four times as fast at it.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, packing: Packing, scale: float, dropout: float, seed: Tensor) -> Tensor:
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        out[packing.tokens :] = 0
        kept = []
        for block in packing.blocks:
            query, key, value = _on_grid(qkv, block)
            keep = _keep(block, qkv.shape[2], dropout, seed)
            weights = _weights(query, key, block, scale)
            weights.mul_(keep.to(weights.dtype))
            _from_grid(_product(weights.to(value.dtype), value, drop_scale(dropout)), block, out)
            kept.append(keep)
        ctx.save_for_backward(qkv, *kept)
        ctx.options = packing, scale, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *kept = ctx.saved_tensors
        packing, scale, dropout = ctx.options
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        dqkv[packing.tokens :] = 0
        for block, keep in zip(packing.blocks, kept, strict=True):
            query, key, value = grid = _on_grid(qkv, block)
            [dcontext] = _on_grid(dout[:, None], block)
            if block.shortest < block.seqlen:  # nothing comes from padding, where `_on_grid` repeats a row
                dcontext.view(block.batch, -1, *dcontext.shape[1:]).mul_(block.is_token[:, None, :, None])
            weights = _weights(query, key, block, scale)
            keep = keep.to(weights.dtype)
            kept_weights = (weights * keep).to(value.dtype)
            dweights = _product(_exact(dcontext), _exact(value).transpose(1, 2), drop_scale(dropout)).mul_(keep)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).to(value.dtype)
            gradient = torch.empty_like(grid)
            _product(dscores, key, scale, out=gradient[0])
            _product(dscores.transpose(1, 2), query, scale, out=gradient[1])
            _product(kept_weights.transpose(1, 2), dcontext, drop_scale(dropout), out=gradient[2])
            _from_grid(gradient, block, dqkv)
        return dqkv, None, None, None, None


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """`factor * (a @ b)` in one pass, of `[batch, m, k]` and `[batch, k, n]`; written to `out` where it is given."""
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


def _on_grid(x: Tensor, block: Block) -> Tensor:
    """Packed `[rows, parts, heads, head_dim]` -> `[parts, batch * heads, seqlen, head_dim]`; float16 as float32."""
    _, parts, heads, head_dim = x.shape
    fast = x if x.dtype == torch.bfloat16 else _exact(x)
    grid = fast.contiguous().view(-1, head_dim).index_select(0, block.to_grid(parts, heads))
    return grid.view(parts, block.batch * heads, block.seqlen, head_dim)


def _exact(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _from_grid(grid: Tensor, block: Block, x: Tensor) -> None:
    """Write `[parts, batch * heads, seqlen, head_dim]`, or one part, to the block's rows of packed `x`."""
    heads, head_dim = x.shape[-2:]
    parts = grid.numel() // (block.batch * heads * block.seqlen * head_dim)
    mine = x[block.begin : block.begin + len(block.places)].view(-1, head_dim)
    if grid.dtype == x.dtype:
        torch.index_select(grid.view(-1, head_dim), 0, block.from_grid(parts, heads), out=mine)
    else:
        mine.copy_(grid.view(-1, head_dim).index_select(0, block.from_grid(parts, heads)))


def _weights(query: Tensor, key: Tensor, block: Block, scale: float) -> Tensor:
    """`[batch * heads, seqlen, seqlen]`, 0 for keys that are padding."""
    scores = _product(_exact(query), _exact(key).transpose(1, 2), scale)
    if block.shortest < block.seqlen:
        hidden = torch.where(block.is_token[:, None, None, block.shortest :], 0.0, -math.inf).to(scores.dtype)
        scores.view(block.batch, -1, *scores.shape[1:])[..., block.shortest :].add_(hidden)
    return scores.softmax(-1)


def _keep(block: Block, heads: int, dropout: float, seed: Tensor) -> Tensor:
    """int8 `[batch * heads, seqlen, seqlen]`, 1 for the weights that dropout keeps."""
    row, head, sequence = block.lines(heads)
    keep = keep_lines(seed, row, head, sequence, block.seqlen, dropout)
    return keep.view(-1, block.seqlen, block.seqlen)


def attend(qkv: Tensor, packing: Packing, scale: float, out: Tensor) -> None:
    """Attention on a CPU without gradient, bias, window or dropout, by a kernel where there is one for it.

    Args:
        qkv, packing, scale: as in `attention`.
        out: contiguous `[rows, heads, head_dim]` <- the result.
    """
    out[packing.tokens :] = 0
    machine = native_machine(qkv)
    if machine is not None and qkv.shape[-1] <= WIDEST_HEAD:
        from fastbert.cpu import attention as kernel

        qkv, longest = qkv.contiguous(), packing.max_seqlen
        kernel.attention_forward(machine, qkv, packing.cu_seqlens, longest, scale, out).run()
        return
    begin = 0
    for (count, length), run in zip(packing.runs, _runs(qkv, packing), strict=True):
        query, key, value = run.permute(2, 0, 3, 1, 4)
        place = out[begin : begin + count * length].unflatten(0, (count, length))
        place.copy_(F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2))
        begin += count * length


def _attention_triton(
    qkv: Tensor,
    packing: Packing,
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
    gradient: bool,
) -> Tensor:
    head_dim, dtype, max_seqlen = qkv.shape[-1], qkv.dtype, packing.max_seqlen
    extras = bias is not None or alibi_slopes is not None or window is not None or dropout > 0.0
    here = target.of(qkv.device)
    forward = attention_choices.attention_forward(
        head_dim,
        dtype,
        max_seqlen,
        rows=qkv.shape[0],
        batch=packing.batch,
        extras=extras,
        bias=bias is not None,
        target=here,
    )
    tiles = [tile_table(packing, forward.BLOCK_M)]
    if gradient:
        dbias = bias is not None and bias.requires_grad
        by_query = attention_choices.attention_backward_query(head_dim, dtype, extras=extras, target=here)
        by_key = attention_choices.attention_backward_key(
            head_dim, dtype, max_seqlen, dbias=dbias, extras=extras, target=here
        )
        tiles += [tile_table(packing, by_query.BLOCK_M), tile_table(packing, by_key.BLOCK_N)]
    out, _ = launched(attention_forward, qkv, bias)(
        qkv, packing.cu_seqlens, tiles, max_seqlen, packing.tokens, scale, bias, alibi_slopes, window, dropout, seed
    )
    return out


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
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        window=window,
        dropout=dropout,
        seed=seed,
        store_lse=len(tiles) > 1,
    )


@attention_forward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Sequence[Tensor],
    max_seqlen: int,
    tokens: int,
    scale: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(heads, rows if len(tiles) > 1 else 0, dtype=torch.float32)
    return qkv.new_empty(rows, heads, head_dim), lse


@torch.library.custom_op("fastbert::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    max_seqlen: int,
    tokens: int,
    scale: float,
    bias: Tensor | None,
    needs_dbias: bool,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernels; see `fastbert.kernels.attention_backward`. Returns (dqkv, dbias or `[0]`)."""
    from fastbert.kernels import attention_backward as kernel

    dqkv, dbias = kernel.attention_backward(
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
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        window=window,
        dropout=dropout,
        seed=seed,
    )
    return dqkv, lse.new_empty(0) if dbias is None else dbias


@attention_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    max_seqlen: int,
    tokens: int,
    scale: float,
    bias: Tensor | None,
    needs_dbias: bool,
    alibi_slopes: Tensor | None,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), lse.new_empty(bias.shape if bias is not None and needs_dbias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, tiles, max_seqlen, tokens, scale, bias, alibi_slopes, window, dropout, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of lse
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, bias, alibi_slopes, seed, *tiles[1:])
    ctx.tables = len(tiles)
    ctx.options = max_seqlen, tokens, scale, window, dropout


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    no_tables = [None] * ctx.tables
    if dout is None:
        return None, None, no_tables, None, None, None, None, None, None, None, None
    if ctx.tables == 1:
        raise BackendError(
            "attention_forward", "a gradient asked for with one table of tiles", "the backward's tables in the forward"
        )
    qkv, out, lse, cu_seqlens, bias, alibi_slopes, seed, query_tiles, key_tiles = ctx.saved_tensors
    max_seqlen, tokens, scale, window, dropout = ctx.options
    needs_dbias = ctx.needs_input_grad[6]
    dqkv, dbias = attention_backward(
        dout, qkv, out, lse, cu_seqlens, query_tiles, key_tiles, max_seqlen, tokens, scale, bias, needs_dbias,
        alibi_slopes, window, dropout, seed,
    )  # fmt: skip
    dbias = dbias.to(bias.dtype) if needs_dbias else None
    return dqkv, None, no_tables, None, None, None, dbias, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save)
