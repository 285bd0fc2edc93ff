"""The gradients of packed attention, without atomics: equal inputs give equal bits.

The weights are made again from the forward's row sums (lse). Two kernels share the work: one owns a tile of queries
and walks over the keys, the other owns a tile of keys and walks over the queries. Where a tile holds every key of a
sequence, the second does both in one pass. A third sums the gradient of a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch, target
from fastbert.kernels.pieces import keep_mask


@triton.jit
def weights_from_lse(
    scores,
    lse_log2,
    bias_ptr,
    rows,
    columns,
    seqlen,
    scale,
    window,
    bias_stride_row,
    bias_stride_column,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The forward's weights of a tile, made again from its row sums.

    `rows`, `columns` and `lse_log2` have a dimension of 1 each where the tile has the other, so a tile may stand
    upright or transposed. `bias_ptr` is that of the sequence and head.
    """
    scale_log2e = scale * 1.4426950408889634
    mask = columns < seqlen  # a key beyond the end scores 0, and exp2(0 - lse) may overflow
    if HAS_BIAS:
        bias_ptrs = bias_ptr + rows.to(tl.int64) * bias_stride_row + columns.to(tl.int64) * bias_stride_column
        bias = tl.load(bias_ptrs, mask=(rows < seqlen) & mask, other=0.0).to(tl.float32)
        weights = tl.exp2(tl.fma(scores, scale_log2e, bias * 1.4426950408889634 - lse_log2))
    else:
        weights = tl.exp2(tl.fma(scores, scale_log2e, -lse_log2))
    if HAS_WINDOW:
        mask = mask & (rows - columns <= window) & (columns - rows <= window)
    return tl.where(mask, weights, 0.0)


@triton.jit
def attention_backward_query_kernel(
    qkv_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    bias_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    tiles_ptr,
    qkv_stride_row,
    qkv_stride_part,
    qkv_stride_head,
    out_stride_row,
    out_stride_head,
    dqkv_stride_row,
    dqkv_stride_head,
    lse_stride_head,
    bias_stride_sequence,
    bias_stride_head,
    bias_stride_row,
    bias_stride_column,
    heads,
    scale,
    window,
    drop_threshold,
    drop_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries in one tile of rows; writes delta = rowsum(dout * out) for the kernels after it."""
    if HEAD_DIM % 16 != 0:  # as in attention.py
        qkv_stride_row = qkv_stride_row // VECTOR * VECTOR
        qkv_stride_part = qkv_stride_part // VECTOR * VECTOR
        qkv_stride_head = qkv_stride_head // VECTOR * VECTOR
        out_stride_row = out_stride_row // VECTOR * VECTOR
        out_stride_head = out_stride_head // VECTOR * VECTOR
        dqkv_stride_row = dqkv_stride_row // VECTOR * VECTOR
        dqkv_stride_head = dqkv_stride_head // VECTOR * VECTOR
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    sequence = tl.load(tiles_ptr + tile * 2)
    if sequence < 0:  # a spare entry of the table
        return
    first_row = tl.load(tiles_ptr + tile * 2 + 1)
    begin = tl.load(cu_seqlens_ptr + sequence)
    seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin

    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    mask_rows = rows < seqlen
    mask_dims = dims < HEAD_DIM
    mask_query = mask_rows[:, None] & mask_dims[None, :]
    sequence_ptr = qkv_ptr + begin.to(tl.int64) * qkv_stride_row + head.to(tl.int64) * qkv_stride_head
    row_in_batch = (begin + rows).to(tl.int64)
    out_offsets = row_in_batch[:, None] * out_stride_row + head.to(tl.int64) * out_stride_head + dims[None, :]
    lse_offsets = head.to(tl.int64) * lse_stride_head + row_in_batch
    query_ptrs = sequence_ptr + rows.to(tl.int64)[:, None] * qkv_stride_row + dims[None, :]
    query = tl.load(query_ptrs, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
    out = tl.load(out_ptr + out_offsets, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
    dout = tl.load(dout_ptr + out_offsets, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + lse_offsets, delta, mask=mask_rows)  # [BLOCK_M]
    lse_log2 = tl.load(lse_ptr + lse_offsets, mask=mask_rows, other=0.0) * 1.4426950408889634  # [BLOCK_M]
    if HAS_BIAS:
        bias_ptr += sequence.to(tl.int64) * bias_stride_sequence + head.to(tl.int64) * bias_stride_head
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    if HAS_WINDOW:
        first_key = tl.maximum(first_row - window, 0) // BLOCK_N * BLOCK_N
        end_key = tl.minimum(first_row + BLOCK_M + window, seqlen)
    else:
        first_key = seqlen * 0
        end_key = seqlen
    tile_offsets = tl.arange(0, BLOCK_N)[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_N, BLOCK_D]
    key_ptr = sequence_ptr + qkv_stride_part + first_key.to(tl.int64) * qkv_stride_row
    step = tl.cast(BLOCK_N, tl.int64) * qkv_stride_row
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(first_key, end_key, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask_key = (columns < seqlen)[:, None] & mask_dims[None, :]
        key = tl.load(key_ptr + tile_offsets, mask=mask_key, other=0.0)  # [BLOCK_N, BLOCK_D]
        value = tl.load(key_ptr + qkv_stride_part + tile_offsets, mask=mask_key, other=0.0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        weights = weights_from_lse(
            scores, lse_log2[:, None], bias_ptr, rows[:, None], columns[None, :], seqlen, scale, window,
            bias_stride_row, bias_stride_column, HAS_BIAS, HAS_WINDOW,
        )  # fmt: skip
        dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if HAS_DROPOUT:
            keep = keep_mask(seed, rows, start, head, sequence, drop_threshold, BLOCK_N)
            dweights = tl.where(keep, dweights * drop_scale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        acc = tl.dot(dscores.to(key.dtype), key, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        key_ptr += step

    grad_offsets = row_in_batch[:, None] * dqkv_stride_row + head.to(tl.int64) * dqkv_stride_head + dims[None, :]
    tl.store(dqkv_ptr + grad_offsets, (acc * scale).to(dqkv_ptr.dtype.element_ty), mask=mask_query)


@triton.jit
def attention_backward_key_kernel(
    qkv_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    bias_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    tiles_ptr,
    qkv_stride_row,
    qkv_stride_part,
    qkv_stride_head,
    out_stride_row,
    out_stride_head,
    dqkv_stride_row,
    dqkv_stride_part,
    dqkv_stride_head,
    lse_stride_head,
    bias_stride_sequence,
    bias_stride_head,
    bias_stride_row,
    bias_stride_column,
    heads,
    scale,
    window,
    drop_threshold,
    drop_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_PASS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and values in one tile of columns; all products stand transposed, [BLOCK_N, BLOCK_M].

    With ONE_PASS the tile holds all keys of its sequence, so the gradient of the queries is made here too, and delta
    where it is used: five products in one launch instead of seven in two.
    """
    if HEAD_DIM % 16 != 0:  # as in attention.py
        qkv_stride_row = qkv_stride_row // VECTOR * VECTOR
        qkv_stride_part = qkv_stride_part // VECTOR * VECTOR
        qkv_stride_head = qkv_stride_head // VECTOR * VECTOR
        out_stride_row = out_stride_row // VECTOR * VECTOR
        out_stride_head = out_stride_head // VECTOR * VECTOR
        dqkv_stride_row = dqkv_stride_row // VECTOR * VECTOR
        dqkv_stride_part = dqkv_stride_part // VECTOR * VECTOR
        dqkv_stride_head = dqkv_stride_head // VECTOR * VECTOR
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    sequence = tl.load(tiles_ptr + tile * 2)
    if sequence < 0:  # a spare entry of the table
        return
    first_column = tl.load(tiles_ptr + tile * 2 + 1)
    begin = tl.load(cu_seqlens_ptr + sequence)
    seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin

    columns = first_column + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    mask_dims = dims < HEAD_DIM
    mask_key = (columns < seqlen)[:, None] & mask_dims[None, :]
    sequence_ptr = qkv_ptr + begin.to(tl.int64) * qkv_stride_row + head.to(tl.int64) * qkv_stride_head
    key_ptrs = sequence_ptr + qkv_stride_part + columns.to(tl.int64)[:, None] * qkv_stride_row + dims[None, :]
    key = tl.load(key_ptrs, mask=mask_key, other=0.0)  # [BLOCK_N, BLOCK_D]
    value = tl.load(key_ptrs + qkv_stride_part, mask=mask_key, other=0.0)  # [BLOCK_N, BLOCK_D]
    if HAS_BIAS:
        bias_ptr += sequence.to(tl.int64) * bias_stride_sequence + head.to(tl.int64) * bias_stride_head
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    if HAS_WINDOW:
        begin_row = tl.maximum(first_column - window, 0) // BLOCK_M * BLOCK_M
        end_row = tl.minimum(first_column + BLOCK_N + window, seqlen)
    else:
        begin_row = seqlen * 0
        end_row = seqlen
    lanes = tl.arange(0, BLOCK_M)
    query_offsets = lanes[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    out_offsets = lanes[:, None] * out_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    grad_offsets = lanes[:, None] * dqkv_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    dqkv_ptr += begin.to(tl.int64) * dqkv_stride_row + head.to(tl.int64) * dqkv_stride_head
    acc_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(begin_row, end_row, BLOCK_M):
        rows = start + lanes
        mask_rows = rows < seqlen
        mask_query = mask_rows[:, None] & mask_dims[None, :]
        row_in_batch = (begin + start).to(tl.int64)
        query_ptr = sequence_ptr + tl.cast(start, tl.int64) * qkv_stride_row
        out_base = row_in_batch * out_stride_row + head.to(tl.int64) * out_stride_head
        lse_base = row_in_batch + head.to(tl.int64) * lse_stride_head
        query = tl.load(query_ptr + query_offsets, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
        dout = tl.load(dout_ptr + out_base + out_offsets, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
        # A row beyond the end gets weight exp2(-1e30) = 0.
        lse = tl.load(lse_ptr + lse_base + lanes, mask=mask_rows, other=1e30)  # [BLOCK_M]
        if ONE_PASS:
            out = tl.load(out_ptr + out_base + out_offsets, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
            delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + lse_base + lanes, mask=mask_rows, other=0.0)  # [BLOCK_M]
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        weights = weights_from_lse(
            scores, (lse * 1.4426950408889634)[None, :], bias_ptr, rows[None, :], columns[:, None], seqlen, scale,
            window, bias_stride_row, bias_stride_column, HAS_BIAS, HAS_WINDOW,
        )  # fmt: skip
        dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if HAS_DROPOUT:
            keep = tl.trans(keep_mask(seed, rows, first_column, head, sequence, drop_threshold, BLOCK_N))
            dropped = tl.where(keep, weights * drop_scale, 0.0)
            dweights = tl.where(keep, dweights * drop_scale, 0.0)
        else:
            dropped = weights
        acc_value = tl.dot(dropped.to(value.dtype), dout, acc_value, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        dscores = (weights * (dweights - delta[None, :])).to(key.dtype)
        acc_key = tl.dot(dscores, query, acc_key, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        if ONE_PASS:
            dquery = tl.dot(tl.trans(dscores), key, input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_D]
            query_grad_ptrs = dqkv_ptr + tl.cast(start, tl.int64) * dqkv_stride_row + grad_offsets
            tl.store(query_grad_ptrs, dquery.to(dqkv_ptr.dtype.element_ty), mask=mask_query)

    dkey_ptrs = dqkv_ptr + dqkv_stride_part + columns.to(tl.int64)[:, None] * dqkv_stride_row + dims[None, :]
    dtype = dqkv_ptr.dtype.element_ty
    tl.store(dkey_ptrs, (acc_key * scale).to(dtype), mask=mask_key)  # [BLOCK_N, BLOCK_D]
    tl.store(dkey_ptrs + dqkv_stride_part, acc_value.to(dtype), mask=mask_key)  # [BLOCK_N, BLOCK_D]


@triton.jit
def attention_backward_bias_kernel(
    qkv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dbias_ptr,
    bias_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    qkv_stride_row,
    qkv_stride_part,
    qkv_stride_head,
    out_stride_row,
    out_stride_head,
    lse_stride_head,
    bias_stride_sequence,
    bias_stride_head,
    bias_stride_row,
    bias_stride_column,
    batch,
    heads,
    max_seqlen,
    scale,
    window,
    drop_threshold,
    drop_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_SEQUENCE: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the gradient of the bias, summed in registers over the sequences and heads that share it.

    ONE_SEQUENCE: the bias differs between sequences, so this tile belongs to one; ONE_HEAD likewise. The order of the
    sum is fixed, so the result is too.
    """
    if HEAD_DIM % 16 != 0:  # as in attention.py
        qkv_stride_row = qkv_stride_row // VECTOR * VECTOR
        qkv_stride_part = qkv_stride_part // VECTOR * VECTOR
        qkv_stride_head = qkv_stride_head // VECTOR * VECTOR
        out_stride_row = out_stride_row // VECTOR * VECTOR
        out_stride_head = out_stride_head // VECTOR * VECTOR
    blocks_n = tl.cdiv(max_seqlen, BLOCK_N)
    blocks_m = tl.cdiv(max_seqlen, BLOCK_M)
    place = tl.program_id(0) // (blocks_m * blocks_n)
    first_row = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    first_column = tl.program_id(0) % blocks_n * BLOCK_N
    heads_here = heads if ONE_HEAD else 1
    first_sequence = place // heads_here if ONE_SEQUENCE else 0
    first_head = place % heads_here
    count = (1 if ONE_SEQUENCE else batch) * (1 if ONE_HEAD else heads)
    heads_shared = 1 if ONE_HEAD else heads

    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    mask_dims = dims < HEAD_DIM
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, count):
        sequence = first_sequence + i // heads_shared
        head = first_head + i % heads_shared
        begin = tl.load(cu_seqlens_ptr + sequence)
        seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin
        if first_row < seqlen and first_column < seqlen:
            mask_rows = rows < seqlen
            mask_query = mask_rows[:, None] & mask_dims[None, :]
            mask_key = (columns < seqlen)[:, None] & mask_dims[None, :]
            sequence_ptr = qkv_ptr + begin.to(tl.int64) * qkv_stride_row + tl.cast(head, tl.int64) * qkv_stride_head
            row_in_batch = (begin + rows).to(tl.int64)
            query_ptrs = sequence_ptr + rows.to(tl.int64)[:, None] * qkv_stride_row + dims[None, :]
            key_ptrs = sequence_ptr + qkv_stride_part + columns.to(tl.int64)[:, None] * qkv_stride_row + dims[None, :]
            out_ptrs = dout_ptr + row_in_batch[:, None] * out_stride_row + tl.cast(head, tl.int64) * out_stride_head
            query = tl.load(query_ptrs, mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
            dout = tl.load(out_ptrs + dims[None, :], mask=mask_query, other=0.0)  # [BLOCK_M, BLOCK_D]
            key = tl.load(key_ptrs, mask=mask_key, other=0.0)  # [BLOCK_N, BLOCK_D]
            value = tl.load(key_ptrs + qkv_stride_part, mask=mask_key, other=0.0)  # [BLOCK_N, BLOCK_D]
            lse_offsets = tl.cast(head, tl.int64) * lse_stride_head + row_in_batch
            lse = tl.load(lse_ptr + lse_offsets, mask=mask_rows, other=1e30)  # [BLOCK_M]
            delta = tl.load(delta_ptr + lse_offsets, mask=mask_rows, other=0.0)  # [BLOCK_M]
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            weights = weights_from_lse(
                scores, (lse * 1.4426950408889634)[:, None],
                bias_ptr + tl.cast(sequence, tl.int64) * bias_stride_sequence
                + tl.cast(head, tl.int64) * bias_stride_head,
                rows[:, None], columns[None, :], seqlen, scale, window, bias_stride_row, bias_stride_column, True,
                HAS_WINDOW,
            )  # fmt: skip
            dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if HAS_DROPOUT:
                keep = keep_mask(seed, rows, first_column, head, sequence, drop_threshold, BLOCK_N)
                dweights = tl.where(keep, dweights * drop_scale, 0.0)
            acc += weights * (dweights - delta[:, None])
    mask = (rows < max_seqlen)[:, None] & (columns < max_seqlen)[None, :]
    grad_ptr = dbias_ptr + tl.cast(place, tl.int64) * max_seqlen * max_seqlen
    grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * max_seqlen + columns[None, :]
    tl.store(grad_ptrs, acc, mask=mask)  # [BLOCK_M, BLOCK_N]


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    max_seqlen: int,
    *,
    tokens: int,
    scale: float,
    bias: Tensor | None = None,
    dbias_shape: Sequence[int] | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernels: two, or one where a tile holds every key of a sequence; one more for the bias.

    Args:
        dout: `[rows, heads, head_dim]`, upstream.
        qkv, out, lse: the forward's input and outputs.
        query_tiles, key_tiles: (sequence, first row) for BLOCK_M of `launch.attention_backward_query` and BLOCK_N of
            `launch.attention_backward_key`.
        tokens: rows beyond these are slack; their gradient is 0.
        dbias_shape: the shape that `bias` had before it was expanded; None where it needs no gradient.

    Returns:
        gradient of qkv `[rows, 3, heads, head_dim]` in its dtype, and of the bias, float32 `dbias_shape`, or None.
        No atomics: the same inputs give the same bits.
    """
    rows, _, heads, head_dim = qkv.shape
    qkv, out, dout = target.aligned(qkv), target.aligned(out), target.aligned(dout)
    dout = dout if dout.stride() == out.stride() else dout.contiguous()
    dqkv = torch.empty((rows, 3, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    dqkv[tokens:] = 0
    dbias = None if dbias_shape is None else torch.zeros(dbias_shape, dtype=torch.float32, device=qkv.device)
    if tokens == 0:
        return dqkv, dbias
    extras = bias is not None or window is not None or dropout > 0.0
    here = target.of(qkv.device)
    by_key = launch.attention_backward_key(
        head_dim, qkv.dtype, max_seqlen, dbias=dbias is not None, extras=extras, target=here
    )
    delta = torch.empty_like(lse)
    shape = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": launch.attention_block_d(head_dim),
        "HAS_WINDOW": window is not None,
        "HAS_DROPOUT": dropout > 0.0,
        "VECTOR": 16 // qkv.element_size(),
        "PRECISION": "ieee",
    }
    strides_bias = (0, 0, 0, 0) if bias is None else bias.stride()
    scalars = (scale, 0 if window is None else window, launch.drop_threshold(dropout), launch.drop_scale(dropout))
    with target.guard(qkv):
        if not by_key.ONE_PASS:
            by_query = launch.attention_backward_query(head_dim, qkv.dtype, here)
            attention_backward_query_kernel[(len(query_tiles) * heads,)](
                qkv, out, dout, lse, delta, dqkv, bias, seed, cu_seqlens, query_tiles,
                *qkv.stride()[:3], *out.stride()[:2], dqkv.stride(0), dqkv.stride(2), lse.stride(0),
                *strides_bias, heads, *scalars, HAS_BIAS=bias is not None, **shape, **launch.arguments(by_query),
            )  # fmt: skip
        attention_backward_key_kernel[(len(key_tiles) * heads,)](
            qkv, out, dout, lse, delta, dqkv, bias, seed, cu_seqlens, key_tiles,
            *qkv.stride()[:3], *out.stride()[:2], *dqkv.stride()[:3], lse.stride(0),
            *strides_bias, heads, *scalars, HAS_BIAS=bias is not None, **shape, **launch.arguments(by_key),
        )  # fmt: skip
        if bias is not None and dbias is not None:
            by_bias = launch.attention_backward_bias(head_dim, qkv.dtype, here)
            full = torch.empty((*dbias.shape[:2], max_seqlen, max_seqlen), dtype=torch.float32, device=qkv.device)
            tiles = triton.cdiv(max_seqlen, by_bias.BLOCK_M) * triton.cdiv(max_seqlen, by_bias.BLOCK_N)
            attention_backward_bias_kernel[(full.shape[0] * full.shape[1] * tiles,)](
                qkv, dout, lse, delta, full, bias, seed, cu_seqlens,
                *qkv.stride()[:3], *out.stride()[:2], lse.stride(0), *strides_bias,
                len(cu_seqlens) - 1, heads, max_seqlen, *scalars,
                ONE_SEQUENCE=full.shape[0] > 1, ONE_HEAD=full.shape[1] > 1, **shape, **launch.arguments(by_bias),
            )  # fmt: skip
            dbias = full.sum_to_size(dbias.shape)
    return dqkv, dbias
