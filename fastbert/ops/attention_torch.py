"""attention in torch; and on a CPU by its own kernels, where no bias of pairs is asked for."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import as_kernels_read, room
from fastbert.kernels.dropout import drop_scale
from fastbert.ops.attention_extras import Extras
from fastbert.ops.common import gradients, in_full, native_machine, observed, torch_differentiates, wants_gradient
from fastbert.ops.dropout import keep_lines
from fastbert.packing import Block, Packing
from fastbert.reference import Dropout

# The kernel of a CPU is written out for each width of a head: wider ones would take seconds to compile.
WIDEST_HEAD = 256

PLAIN = Extras()


def attention_torch(qkv: Tensor, packing: Packing, scale: float, extras: Extras) -> Tensor:
    """`attention`, of arguments that were checked."""
    bias, relative, alibi_slopes, window, dropout, seed = extras
    if bias is None and not torch.compiler.is_compiling():
        recorded = wants_gradient(qkv, relative)
        if dropout == 0.0 and not recorded and (not extras.wanted() or _kernel_machine(qkv, extras) is not None):
            out = qkv.new_empty(len(qkv), *qkv.shape[2:])
            attend(qkv, packing, scale, out, extras)
            return out
        plain = alibi_slopes is None and window is None
        if plain and relative is None and qkv.dtype == torch.float32:
            machine = _kernel_machine(qkv, extras)
            if machine is not None:
                return _NativeAttention.apply(machine, qkv, packing, scale, extras)  # type: ignore[no-untyped-call]
        if plain and dropout == 0.0:
            return _attention_exact(qkv, packing, scale, relative)
        if plain and relative is None and seed is not None:
            return _DroppedAttention.apply(qkv, packing, scale, dropout, seed)  # type: ignore[no-untyped-call]
    keep = None
    if dropout > 0.0 and seed is not None:
        keep = reference.attention_keep_mask(seed, packing.batch, qkv.shape[2], packing.max_seqlen, dropout)
    out, _ = reference.attention(
        in_full(qkv), packing,
        scale=scale, bias=bias, relative=relative, alibi_slopes=alibi_slopes, window=window, keep=keep, dropout=dropout,
    )  # fmt: skip
    return out.to(qkv.dtype)


def _kernel_machine(qkv: Tensor, extras: Extras) -> Machine | None:
    """The CPU whose kernel serves these heads; None where none does."""
    return native_machine(qkv, extras.relative, extras.alibi_slopes) if qkv.shape[-1] <= WIDEST_HEAD else None


def attend(qkv: Tensor, packing: Packing, scale: float, out: Tensor, extras: Extras = PLAIN) -> None:
    """Attention on a CPU without gradient or bias of pairs, by a kernel where there is one for it.

    Args:
        qkv, packing, scale: as in `attention`.
        out: contiguous `[rows, heads, head_dim]` <- the result.
        extras: any of `relative`, `alibi_slopes`, `window` and `dropout`, where there is a kernel.
    """
    out[packing.tokens :] = 0
    machine, relative, alibi_slopes = _kernel_machine(qkv, extras), extras.relative, extras.alibi_slopes
    if machine is not None:
        from fastbert.cpu import attention as kernel

        packing.check_ends()
        kernel.attention_forward(
            machine, qkv.contiguous(), packing.cu_seqlens, packing.max_seqlen, scale, out,
            window=extras.window,
            alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
            relative=None if relative is None else relative.float().contiguous(),
            dropout=_drawn(extras),
        ).run()  # fmt: skip
        return
    begin = 0
    for (count, length), run in zip(packing.runs, _runs(qkv, packing), strict=True):
        query, key, value = run.permute(2, 0, 3, 1, 4)
        place = out[begin : begin + count * length].unflatten(0, (count, length))
        place.copy_(F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2))
        begin += count * length


def _attention_exact(qkv: Tensor, packing: Packing, scale: float, relative: Tensor | None) -> Tensor:
    """SDPA on each run of neighbours of one length: no padding, no gather, and few calls on a length-sorted batch.

    A bias of distances is spread once, over the places of the longest sequence.
    """
    spread = None if relative is None else reference.relative_bias(in_full(relative), packing.max_seqlen)
    pieces = []
    for run in _runs(qkv, packing):
        query, key, value = run.permute(2, 0, 3, 1, 4)
        length = run.shape[1]
        bias = None if spread is None else spread[None, :, :length, :length].to(qkv.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    pieces.append(qkv.new_zeros(len(qkv) - packing.tokens, *qkv.shape[2:]))
    return torch.cat(pieces)


def _runs(x: Tensor, packing: Packing) -> list[Tensor]:
    """`[rows, ...]` -> a view `[count, length, ...]` for each run of `packing`."""
    sizes = [count * length for count, length in packing.runs]
    parts = x[: packing.tokens].split(sizes) if sizes else ()
    return [part.unflatten(0, run) for part, run in zip(parts, packing.runs, strict=True)]


class _NativeAttention(torch.autograd.Function):
    """Attention in float32 and its gradient by kernels of this CPU; only queries, keys and values are saved."""

    @staticmethod
    def forward(ctx: Any, machine: Machine, qkv: Tensor, packing: Packing, scale: float, extras: Extras) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.options = machine, packing, scale, _drawn(extras)
        out = room((len(qkv), *qkv.shape[2:]), qkv.dtype)
        attend(qkv, packing, scale, out, extras)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        machine, packing, scale, dropout = ctx.options
        if torch_differentiates(dout) or observed():
            again = partial(_attention_again, packing=packing, scale=scale, dropout=dropout)
            return None, *gradients(again, [qkv], dout), None, None, None
        from fastbert.cpu import attention_backward as kernel

        packing.check_ends()
        dqkv = room(qkv.shape, qkv.dtype)
        dqkv[packing.tokens :] = 0
        kernel.attention_backward(
            machine, as_kernels_read(qkv), packing.cu_seqlens, packing.max_seqlen, scale, as_kernels_read(dout), dqkv,
            dropout=dropout,
        ).run()  # fmt: skip
        return None, dqkv, None, None, None


def _drawn(extras: Extras) -> Dropout | None:
    """The dropout that is asked for, as kernels of a CPU take it; None for none."""
    return None if extras.seed is None or extras.dropout == 0.0 else Dropout(int(extras.seed), extras.dropout)


def _attention_again(qkv: Tensor, packing: Packing, scale: float, dropout: Dropout | None) -> Tensor:
    """In torch's ops, which torch differentiates as often as asked; half types in float32."""
    keep, probability = None, 0.0
    if dropout is not None:
        seed, probability = torch.tensor([dropout.seed], dtype=torch.int64, device=qkv.device), dropout.probability
        keep = reference.attention_keep_mask(seed, packing.batch, qkv.shape[2], packing.max_seqlen, probability)
    return reference.attention(in_full(qkv), packing, scale=scale, keep=keep, dropout=probability)[0]


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
        ctx.save_for_backward(qkv, seed, *kept)
        ctx.options = packing, scale, dropout
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, seed, *kept = ctx.saved_tensors
        packing, scale, dropout = ctx.options
        if torch_differentiates(dout):
            dropped = Dropout(int(seed), dropout)
            again = partial(_attention_again, packing=packing, scale=scale, dropout=dropped)
            return *gradients(again, [qkv], dout), None, None, None, None
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
            dweights = _product(in_full(dcontext), in_full(value).transpose(1, 2), drop_scale(dropout)).mul_(keep)
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
    fast = x if x.dtype == torch.bfloat16 else in_full(x)
    grid = fast.contiguous().view(-1, head_dim).index_select(0, block.to_grid(parts, heads))
    return grid.view(parts, block.batch * heads, block.seqlen, head_dim)


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
    scores = _product(in_full(query), in_full(key).transpose(1, 2), scale)
    if block.shortest < block.seqlen:
        hidden = torch.where(block.is_token[:, None, None, block.shortest :], 0.0, -math.inf).to(scores.dtype)
        scores.view(block.batch, -1, *scores.shape[1:])[..., block.shortest :].add_(hidden)
    return scores.softmax(-1)


def _keep(block: Block, heads: int, dropout: float, seed: Tensor) -> Tensor:
    """int8 `[batch * heads, seqlen, seqlen]`, 1 for the weights that dropout keeps."""
    row, head, sequence = block.lines(heads)
    keep = keep_lines(seed, row, head, sequence, block.seqlen, dropout)
    return keep.view(-1, block.seqlen, block.seqlen)
