"""Bytes that each op's kernels load and store on a small ragged batch, beside the least there can be.

Run by interpreted.py. Launch choices are those of an H100. Torch's own kernels between ours (the last sums of a
gradient) are not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.kernels import attention_choices, bias_gelu_choices, choices, cost, row_wise_choices, target
from fastbert.kernels.attention import attention_forward
from fastbert.kernels.attention_backward import attention_backward
from fastbert.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from fastbert.kernels.embedding import embedding_backward, embedding_forward
from fastbert.kernels.layer_norm import layer_norm_backward, layer_norm_forward
from fastbert.kernels.linear_gelu import linear_gelu_forward
from fastbert.kernels.pooling import pool_backward, pool_forward
from fastbert.kernels.rotary import rotary_forward
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing

sys.path.append(str(Path(__file__).resolve().parent))
from recorder import Launch, recorded

TARGET = target.KNOWN["sm_90"]
DTYPE = torch.float16
HEADS, HEAD_DIM, HIDDEN, WIDTH = 2, 64, 128, 256
# "short" fits the one-pass backward, which needs at most 128 keys; "long" does not.
BATCHES = {"short": (5, 70, 0, 33, 1), "long": (7, 150, 40)}
SLACK = 37  # rows behind the packed ones; with them a dimension has a size that no other has
DROPOUT = 0.1


@dataclass(frozen=True)
class Case:
    """A call, the rows of it that hold tokens, those in memory, and the least bytes it can move.

    `sums` are the bytes by which the sums of each program exceed the gradients of parameters in `minimum`.
    """

    name: str
    run: Callable[[], object]
    tokens: int
    rows: int
    minimum: int
    sums: int = 0


def calls() -> Iterator[Case]:
    """Each op, forward and backward."""
    for name, lengths in BATCHES.items():
        yield from attention(name, lengths)
    yield from attention("long +relative", BATCHES["long"], relative=True)
    yield rotary()
    tokens = sum(BATCHES["long"])
    for dropout in (0.0, DROPOUT):
        yield from layer_norm(tokens, dropout)
    yield from layer_norm(tokens, 0.0, unpack=True)
    for gated in (False, True):
        yield from bias_gelu(tokens, gated)
    yield from linear_gelu(tokens)
    yield from embedding(tokens)
    for how in ("cls", "mean", "max"):
        for normalise in (False, True):
            yield from pool(how, normalise)


def rotary() -> Case:
    """Without rows behind the tokens, which would be copied."""
    tokens = sum(BATCHES["long"])
    qkv, angles = _states(tokens, 3, HEADS, HEAD_DIM), torch.ones(2, tokens, HEAD_DIM // 2)
    minimum = cost.rotary(tokens, HEADS, HEAD_DIM, DTYPE).min_bytes
    return Case("rotary", partial(rotary_forward, qkv, angles), tokens, tokens, minimum)


def attention(name: str, lengths: tuple[int, ...], slack: int = SLACK, *, relative: bool = False) -> Iterator[Case]:
    """The forward as training runs it, and the backward; buffers go on behind the tokens by `slack` rows."""
    packing = Packing.from_lengths(torch.tensor(lengths))
    tokens, rows = packing.tokens, packing.tokens + slack
    qkv, dout = _states(rows, 3, HEADS, HEAD_DIM), _states(rows, HEADS, HEAD_DIM)
    forward = attention_choices.attention_forward(
        HEAD_DIM,
        DTYPE,
        packing.max_seqlen,
        rows=rows,
        batch=packing.batch,
        extras=relative,
        bias=relative,
        target=TARGET,
    )
    by_query = attention_choices.attention_backward_query(HEAD_DIM, DTYPE, extras=relative, target=TARGET)
    by_key = attention_choices.attention_backward_key(
        HEAD_DIM, DTYPE, packing.max_seqlen, dbias=relative, extras=relative, target=TARGET
    )
    batch = (packing.cu_seqlens, tile_table(packing, forward.BLOCK_M), packing.max_seqlen)
    table = _states(HEADS, 2 * packing.max_seqlen - 1) if relative else None
    elements = 0 if table is None else table.numel()
    run = partial(attention_forward, qkv, *batch, scale=HEAD_DIM**-0.5, relative=table, store_lse=True)
    minimum = cost.attention(lengths, HEADS, HEAD_DIM, DTYPE, bias_elements=elements, lse=True).min_bytes
    yield Case(f"attention {name}", run, tokens, rows, minimum)
    out, lse = _states(rows, HEADS, HEAD_DIM), torch.full((HEADS, rows), 8.0)
    tiles = (tile_table(packing, by_query.BLOCK_M), tile_table(packing, by_key.BLOCK_N))
    run = partial(
        attention_backward, dout, qkv, out, lse, packing.cu_seqlens, *tiles, packing.max_seqlen, tokens=tokens,
        scale=HEAD_DIM**-0.5, relative=table, needs_drelative=relative,
    )  # fmt: skip
    minimum = cost.attention_backward(lengths, HEADS, HEAD_DIM, DTYPE, bias_elements=elements).min_bytes
    yield Case(f"attention backward {name}", run, tokens, rows, minimum)


def layer_norm(tokens: int, dropout: float, *, unpack: bool = False) -> Iterator[Case]:
    """With residual and bias, as an encoder layer calls it, or the last layer of a drop-in."""
    x, residual, dout = (_states(tokens + SLACK, HIDDEN)[:tokens] for _ in range(3))
    weight, bias, x_bias = (_states(HIDDEN) for _ in range(3))
    mean, rstd, seed = torch.ones(tokens), torch.ones(tokens), torch.zeros(1, dtype=torch.int64)
    drawn = {"dropout": dropout, "seed": seed if dropout else None}
    options = {"residual": True, "x_bias": True, "dropout": dropout > 0.0, "unpack": unpack}
    name = f"{' +dropout' if dropout else ''}{' +unpack' if unpack else ''}"
    out_rows, padded = None, 2 * tokens + 1
    if unpack:
        out_rows, dout = torch.arange(1, padded, 2), _states(padded, HIDDEN)
    drawn |= {"out_rows": out_rows}
    run = partial(
        layer_norm_forward, x, weight, bias, residual=residual, x_bias=x_bias, eps=1e-12, out_size=padded,
        store_stats=True, **drawn,
    )  # fmt: skip
    minimum = cost.layer_norm(tokens, HIDDEN, DTYPE, statistics=True, **options).min_bytes
    yield Case(f"layer_norm{name}", run, tokens, tokens + SLACK, minimum)
    run = partial(layer_norm_backward, dout, x, weight, mean, rstd, residual=True, x_bias=True, **drawn)
    minimum = cost.layer_norm_backward(tokens, HIDDEN, DTYPE, **options).min_bytes
    sums = _sums(tokens, 3 * HIDDEN, row_wise_choices.layer_norm_backward(HIDDEN, DTYPE, TARGET))
    yield Case(f"layer_norm backward{name}", run, tokens, tokens + SLACK, minimum, sums)


def bias_gelu(tokens: int, gated: bool) -> Iterator[Case]:
    """With a bias."""
    columns = 2 * WIDTH if gated else WIDTH
    x, dout = (_states(tokens + SLACK, width)[:tokens] for width in (columns, WIDTH))
    bias = _states(columns)
    rows, name = tokens + SLACK, " +gated" if gated else ""
    minimum = cost.bias_gelu(tokens, WIDTH, DTYPE, gated=gated).min_bytes
    yield Case(f"bias_gelu{name}", partial(bias_gelu_forward, x, bias, gated=gated), tokens, rows, minimum)
    minimum = cost.bias_gelu_backward(tokens, WIDTH, DTYPE, gated=gated).min_bytes
    sums = _sums(tokens, columns, bias_gelu_choices.bias_gelu_backward(WIDTH, DTYPE, TARGET, gated=gated))
    run = partial(bias_gelu_backward, dout, x, bias, gated=gated)
    yield Case(f"bias_gelu backward{name}", run, tokens, rows, minimum, sums)


def linear_gelu(tokens: int) -> Iterator[Case]:
    """As inference runs it, then training."""
    x, weight, bias = _states(tokens + SLACK, HIDDEN)[:tokens], _states(WIDTH, HIDDEN), _states(WIDTH)
    for store in (False, True):
        run = partial(linear_gelu_forward, x, weight, bias, store_product=store)
        minimum = cost.linear_gelu(tokens, HIDDEN, WIDTH, DTYPE, product=store).min_bytes
        yield Case(f"linear_gelu{' +product' if store else ''}", run, tokens, tokens + SLACK, minimum)


def embedding(tokens: int) -> Iterator[Case]:
    """Three tables; ids that repeat."""
    ids = [torch.arange(tokens + SLACK)[:tokens] % entries for entries in (61, 50, 2)]
    word, position, token_type = _states(100, HIDDEN), _states(50, HIDDEN), _states(2, HIDDEN)
    weight, bias, dout = _states(HIDDEN), _states(HIDDEN), _states(tokens + SLACK, HIDDEN)[:tokens]
    used = sum(len(each.unique()) for each in ids)
    run = partial(embedding_forward, *ids, word, position, token_type, weight, bias, eps=1e-12)
    minimum = cost.embedding(tokens, HIDDEN, DTYPE, entries=used).min_bytes
    yield Case("embedding", run, tokens, tokens + SLACK, minimum)
    run = partial(embedding_backward, dout, *ids, word, position, token_type, weight, eps=1e-12, padding_idx=0)
    minimum = cost.embedding_backward(tokens, HIDDEN, DTYPE, entries=used, table_entries=152).min_bytes
    yield Case("embedding backward", run, tokens, tokens + SLACK, minimum)


def pool(how: str, normalise: bool) -> Iterator[Case]:
    """As training runs it; the buffer goes on behind the tokens, and one sequence is empty."""
    lengths = BATCHES["short"]
    packing = Packing.from_lengths(torch.tensor(lengths))
    tokens, rows, batch = packing.tokens, packing.tokens + SLACK, packing.batch
    x, out, dout, norm = _states(rows, HIDDEN)[:tokens], *torch.ones(2, batch, HIDDEN), torch.ones(batch)
    options: dict[str, Any] = {"how": how, "normalise": normalise}
    name = f"{how}{' +normalise' if normalise else ''}"
    run = partial(pool_forward, x, packing.cu_seqlens, store_norm=True, **options)
    minimum = cost.pool(lengths, HIDDEN, DTYPE, norm=normalise, **options).min_bytes
    yield Case(f"pool {name}", run, tokens, rows, minimum)
    saved = (out if normalise else None, norm, x if how == "max" else None, packing.cu_seqlens)
    run = partial(pool_backward, dout, *saved, rows=tokens, dtype=DTYPE, **options)
    minimum = cost.pool_backward(lengths, HIDDEN, DTYPE, **options).min_bytes
    yield Case(f"pool backward {name}", run, tokens, rows, minimum)


def _sums(tokens: int, elements: int, choice: choices.StridedRows | choices.StridedBlock) -> int:
    """`Case.sums` of a backward with so many elements of gradients of parameters."""
    programs = min(choice.PROGRAMS, -(-tokens // choice.ROWS))
    return elements * (programs * torch.float32.itemsize - DTYPE.itemsize)


def _states(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=DTYPE)


def figures(case: Case) -> dict[str, float]:
    """What a case moved, in bytes; "once" counts each address once a launch."""
    with target.pretend(TARGET), recorded() as launches:
        case.run()
    moved = {
        "loaded": sum(_bytes(each.loads) for each in launches),
        "loaded_once": sum(bytes_once(each.loads) for each in launches),
        "stored": sum(_bytes(each.stores) for each in launches),
        "stored_once": sum(bytes_once(each.stores) for each in launches),
    }
    return {
        **moved,
        "launches": len(launches),
        "minimum": case.minimum,
        "sums": case.sums,
        "over_minimum": round((moved["loaded_once"] + moved["stored_once"] - case.sums) / case.minimum, 4),
        "past_tokens": sum(past_tokens(each, case.tokens, case.rows) for each in launches),
    }


def _bytes(accesses: list[tuple[np.ndarray, int]]) -> int:
    return sum(len(addresses) * size for addresses, size in accesses)


def bytes_once(accesses: list[tuple[np.ndarray, int]]) -> int:
    """Bytes of different addresses."""
    sizes = {size for _, size in accesses}
    return sum(size * len(np.unique(np.concatenate([a for a, s in accesses if s == size]))) for size in sizes)


def past_tokens(launch: Launch, tokens: int, rows: int) -> int:
    """Bytes that a launch touched behind the packed tokens or outside of every tensor it was given.

    Args:
        tokens, rows: a dimension of size `rows` counts rows, and those from `tokens` on are slack.
    """
    count = 0
    for addresses, size in launch.loads + launch.stores:
        inside = np.zeros(len(addresses), dtype=bool)
        for x in launch.tensors:
            offset = addresses - x.data_ptr()
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) * x.element_size()
            own = (offset >= 0) & (offset <= last) if x.numel() else inside & False
            for n, stride in zip(x.shape, x.stride(), strict=True):
                if n == rows:
                    own &= offset // x.element_size() // stride % n < tokens
            inside |= own
        count += int((~inside).sum()) * size
    return count
