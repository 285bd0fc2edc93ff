"""The gradients of packed attention, without atomics: equal inputs give equal bits.

The weights are made again from the forward's row sums (lse). Two kernels share the work: one owns a tile of queries
and walks over the keys, the other owns a tile of keys and walks over the queries. Where a tile holds every key of a
sequence, the second does both in one pass. A third sums the gradient of a bias, a fourth that of a bias of distances.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import attention_choices, choices, precision, target
from fastbert.kernels.dispatch import dispatch
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.kernels.pieces import keep_mask, load_relative, load_rows


@triton.jit
def weights_from_lse(
    scores,
    minus_lse,
    bias_ptr,
    bias_offsets,
    rows,
    columns,
    seqlen,
    scale,
    window,
    slope,
    relative_ptr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The forward's weights of a tile, made again from its row sums.

    `rows`, `columns` and `minus_lse`, -lse in units of log2, have a dimension of 1 each where the tile has the other,
    so a tile may stand upright or transposed. `relative_ptr` points at distance 0 of the head's line. Without MASKED
    the weight of a key beyond the end, which scores 0, is exp2(minus_lse), and may be infinite.
    """
    shift = minus_lse
    if HAS_BIAS:
        bias = tl.load(bias_ptr + bias_offsets, mask=(rows < seqlen) & (columns < seqlen), other=0.0).to(tl.float32)
        shift = tl.fma(bias, 1.4426950408889634, shift)
    if HAS_RELATIVE:
        relative = load_relative(relative_ptr, rows, columns, seqlen)
        shift = tl.fma(relative.to(tl.float32), 1.4426950408889634, shift)
    if HAS_ALIBI:
        shift -= tl.abs(rows.to(tl.float32) - columns.to(tl.float32)) * (slope * 1.4426950408889634)
    weights = tl.exp2(tl.fma(scores, scale * 1.4426950408889634, shift))
    if HAS_WINDOW:
        weights = tl.where((rows - columns <= window) & (columns - rows <= window), weights, 0.0)
    if MASKED:
        weights = tl.where(columns < seqlen, weights, 0.0)
    return weights


@triton.jit
def attention_backward_query_kernel(
    qkv_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    row_pairs_ptr,
    dqkv_ptr,
    bias_ptr,
    slopes_ptr,
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
    relative_ptr,
    relative_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries in one tile of rows.

    Writes what the kernels after it need of each row, as a pair: -lse in units of log2, and delta = rowsum(dout * out).
    """
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

    lanes = tl.arange(0, BLOCK_M)
    rows = first_row + lanes
    dims = tl.arange(0, BLOCK_D)
    mask_rows = rows < seqlen
    sequence_ptr = qkv_ptr + begin.to(tl.int64) * qkv_stride_row + head.to(tl.int64) * qkv_stride_head
    # Only scalar bases are 64-bit, as in attention.py.
    query_ptr = sequence_ptr + first_row.to(tl.int64) * qkv_stride_row
    query_offsets = lanes[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    row_in_batch = (begin + first_row).to(tl.int64)
    out_base = row_in_batch * out_stride_row + head.to(tl.int64) * out_stride_head
    out_offsets = lanes[:, None] * out_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    query = load_rows(query_ptr + query_offsets, mask_rows, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    out = load_rows(out_ptr + out_base + out_offsets, mask_rows, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr + out_base + out_offsets, mask_rows, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    row_base = row_in_batch + head.to(tl.int64) * lse_stride_head
    lse = tl.load(lse_ptr + row_base + lanes, mask=mask_rows, other=0.0)  # [BLOCK_M]
    minus_lse = lse * -1.4426950408889634
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DROPOUT:  # drop_scale is taken out of the gradients of the weights, and multiplied in at the end
        delta = delta / drop_scale
    pair_ptrs = row_pairs_ptr + row_base * 2 + lanes * 2
    tl.store(pair_ptrs, minus_lse, mask=mask_rows)  # [BLOCK_M]
    tl.store(pair_ptrs + 1, delta, mask=mask_rows)  # [BLOCK_M]
    if HAS_RELATIVE:  # as in attention.py
        relative_ptr += head.to(tl.int64) * relative_stride_head + relative_stride_head // 2
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head)
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    if HAS_WINDOW:
        first_key = tl.maximum(first_row - window, 0) // BLOCK_N * BLOCK_N
        end_key = tl.minimum(first_row + BLOCK_M + window, seqlen)
    else:
        first_key = seqlen * 0
        end_key = seqlen
    begin_tail = first_key
    if SPLIT_TAIL:
        begin_tail = end_key // BLOCK_N * BLOCK_N
    key_offsets = tl.arange(0, BLOCK_N)[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_N, BLOCK_D]
    key_ptr = sequence_ptr + qkv_stride_part + first_key.to(tl.int64) * qkv_stride_row
    value_ptr = key_ptr + qkv_stride_part
    step = tl.cast(BLOCK_N, tl.int64) * qkv_stride_row
    bias_offsets = 0
    if HAS_BIAS:
        bias_ptr += sequence.to(tl.int64) * bias_stride_sequence + head.to(tl.int64) * bias_stride_head
        bias_ptr += first_row.to(tl.int64) * bias_stride_row + first_key.to(tl.int64) * bias_stride_column
        bias_offsets = lanes[:, None] * bias_stride_row + (
            tl.arange(0, BLOCK_N)[None, :] * bias_stride_column
        )  # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for masked in tl.static_range(0 if SPLIT_TAIL else 1, 2):  # full blocks of keys, then the masked tail
        for start in tl.range(begin_tail if masked else first_key, end_key if masked else begin_tail, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            mask_columns = columns < seqlen
            key = load_rows(key_ptr + key_offsets, mask_columns, masked, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            value = load_rows(value_ptr + key_offsets, mask_columns, masked, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            weights = weights_from_lse(
                scores, minus_lse[:, None], bias_ptr, bias_offsets, rows[:, None], columns[None, :], seqlen, scale,
                window, slope, relative_ptr, masked, HAS_BIAS, HAS_RELATIVE, HAS_ALIBI, HAS_WINDOW,
            )  # fmt: skip
            dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if HAS_DROPOUT:
                keep = keep_mask(seed, rows, start, head, sequence, drop_threshold, BLOCK_N)
                dweights = tl.where(keep, dweights, 0.0)
            dscores = weights * (dweights - delta[:, None])
            acc = tl.dot(dscores.to(key.dtype), key, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
            key_ptr += step
            value_ptr += step
            if HAS_BIAS:
                bias_ptr += tl.cast(BLOCK_N, tl.int64) * bias_stride_column

    if HAS_DROPOUT:
        scale = scale * drop_scale
    dqkv_ptr += row_in_batch * dqkv_stride_row + head.to(tl.int64) * dqkv_stride_head
    grad_offsets = lanes[:, None] * dqkv_stride_row + dims[None, :]
    mask_query = mask_rows[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dqkv_ptr + grad_offsets, (acc * scale).to(dqkv_ptr.dtype.element_ty), mask=mask_query)


@triton.jit
def attention_backward_key_kernel(
    qkv_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    row_pairs_ptr,
    dqkv_ptr,
    bias_ptr,
    slopes_ptr,
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
    relative_ptr,
    relative_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_TAIL: tl.constexpr,
    ONE_PASS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
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

    lanes = tl.arange(0, BLOCK_N)
    columns = first_column + lanes
    dims = tl.arange(0, BLOCK_D)
    mask_columns = columns < seqlen
    sequence_ptr = qkv_ptr + begin.to(tl.int64) * qkv_stride_row + head.to(tl.int64) * qkv_stride_head
    # Only scalar bases are 64-bit, as in attention.py.
    key_ptr = sequence_ptr + qkv_stride_part + first_column.to(tl.int64) * qkv_stride_row
    key_offsets = lanes[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_N, BLOCK_D]
    key = load_rows(key_ptr + key_offsets, mask_columns, True, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    value = load_rows(key_ptr + qkv_stride_part + key_offsets, mask_columns, True, HEAD_DIM, BLOCK_D)
    if HAS_RELATIVE:  # as in attention.py
        relative_ptr += head.to(tl.int64) * relative_stride_head + relative_stride_head // 2
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head)
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    if HAS_WINDOW:
        first_row = tl.maximum(first_column - window, 0) // BLOCK_M * BLOCK_M
        end_row = tl.minimum(first_column + BLOCK_N + window, seqlen)
    else:
        first_row = seqlen * 0
        end_row = seqlen
    begin_tail = first_row
    if SPLIT_TAIL:
        begin_tail = end_row // BLOCK_M * BLOCK_M
    row_lanes = tl.arange(0, BLOCK_M)
    query_offsets = row_lanes[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    out_offsets = row_lanes[:, None] * out_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    pair_offsets = row_lanes[:, None] * 2 + tl.arange(0, 2)[None, :]  # [BLOCK_M, 2]
    grad_offsets = row_lanes[:, None] * dqkv_stride_row + dims[None, :]  # [BLOCK_M, BLOCK_D]
    row_in_batch = (begin + first_row).to(tl.int64)
    query_ptr = sequence_ptr + first_row.to(tl.int64) * qkv_stride_row
    dout_ptr += row_in_batch * out_stride_row + head.to(tl.int64) * out_stride_head
    row_base = row_in_batch + head.to(tl.int64) * lse_stride_head
    dqkv_ptr += begin.to(tl.int64) * dqkv_stride_row + head.to(tl.int64) * dqkv_stride_head
    if ONE_PASS:
        out_ptr += row_in_batch * out_stride_row + head.to(tl.int64) * out_stride_head
        lse_ptr += row_base
    else:
        row_pairs_ptr += row_base * 2
    query_step = tl.cast(BLOCK_M, tl.int64) * qkv_stride_row
    out_step = tl.cast(BLOCK_M, tl.int64) * out_stride_row
    bias_offsets = 0
    if HAS_BIAS:
        bias_ptr += sequence.to(tl.int64) * bias_stride_sequence + head.to(tl.int64) * bias_stride_head
        bias_ptr += first_row.to(tl.int64) * bias_stride_row + first_column.to(tl.int64) * bias_stride_column
        bias_offsets = lanes[:, None] * bias_stride_column + row_lanes[None, :] * bias_stride_row  # [BLOCK_N, BLOCK_M]
    grad_scale = scale
    if HAS_DROPOUT:  # drop_scale is taken out of the gradients of the weights, as it is of delta
        grad_scale = scale * drop_scale
    acc_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for masked in tl.static_range(0 if SPLIT_TAIL else 1, 2):  # full blocks of rows, then the masked tail
        for start in tl.range(begin_tail if masked else first_row, end_row if masked else begin_tail, BLOCK_M):
            rows = start + row_lanes
            mask_rows = rows < seqlen
            query = load_rows(query_ptr + query_offsets, mask_rows, masked, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            dout = load_rows(dout_ptr + out_offsets, mask_rows, masked, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            # A row beyond the end gets weight exp2(-1e30) = 0; its delta does not matter then.
            if ONE_PASS:
                out = load_rows(out_ptr + out_offsets, mask_rows, masked, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
                if HAS_DROPOUT:
                    delta = delta / drop_scale
                if masked:
                    lse = tl.load(lse_ptr + row_lanes, mask=mask_rows, other=1e30)  # [BLOCK_M]
                else:
                    lse = tl.load(lse_ptr + row_lanes)  # [BLOCK_M]
                minus_lse = lse * -1.4426950408889634
            else:
                if masked:
                    pairs = tl.load(row_pairs_ptr + pair_offsets, mask=mask_rows[:, None], other=-1e30)  # [BLOCK_M, 2]
                else:
                    pairs = tl.load(row_pairs_ptr + pair_offsets)  # [BLOCK_M, 2]
                minus_lse, delta = tl.split(pairs)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            # What is wrong in a key beyond the end stays in its own rows of acc_key and acc_value, which are not
            # stored. The gradient of a query is a sum over keys, so there those are masked.
            weights = weights_from_lse(
                scores, minus_lse[None, :], bias_ptr, bias_offsets, rows[None, :], columns[:, None], seqlen, scale,
                window, slope, relative_ptr, ONE_PASS, HAS_BIAS, HAS_RELATIVE, HAS_ALIBI, HAS_WINDOW,
            )  # fmt: skip
            dweights = tl.dot(value, tl.trans(dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            dropped = weights
            if HAS_DROPOUT:
                keep = tl.trans(keep_mask(seed, rows, first_column, head, sequence, drop_threshold, BLOCK_N))
                dropped = tl.where(keep, weights, 0.0)
                dweights = tl.where(keep, dweights, 0.0)
            acc_value = tl.dot(
                dropped.to(value.dtype), dout, acc_value, input_precision=PRECISION
            )  # [BLOCK_N, BLOCK_D]
            dscores = (weights * (dweights - delta[None, :])).to(key.dtype)
            acc_key = tl.dot(dscores, query, acc_key, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
            if ONE_PASS:
                dquery = tl.dot(tl.trans(dscores), key, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
                dquery = (dquery * grad_scale).to(dqkv_ptr.dtype.element_ty)
                dquery_ptr = dqkv_ptr + tl.cast(start, tl.int64) * dqkv_stride_row
                if masked or HEAD_DIM != BLOCK_D:
                    mask_query = mask_rows[:, None] & (dims < HEAD_DIM)[None, :]
                    tl.store(dquery_ptr + grad_offsets, dquery, mask=mask_query)  # [BLOCK_M, BLOCK_D]
                else:
                    tl.store(dquery_ptr + grad_offsets, dquery)  # [BLOCK_M, BLOCK_D]
                out_ptr += out_step
                lse_ptr += BLOCK_M
            else:
                row_pairs_ptr += BLOCK_M * 2
            query_ptr += query_step
            dout_ptr += out_step
            if HAS_BIAS:
                bias_ptr += tl.cast(BLOCK_M, tl.int64) * bias_stride_row

    if HAS_DROPOUT:
        acc_value = acc_value * drop_scale
    dkey_ptr = dqkv_ptr + dqkv_stride_part + first_column.to(tl.int64) * dqkv_stride_row
    dkey_ptrs = dkey_ptr + lanes[:, None] * dqkv_stride_row + dims[None, :]
    mask_key = mask_columns[:, None] & (dims < HEAD_DIM)[None, :]
    dtype = dqkv_ptr.dtype.element_ty
    tl.store(dkey_ptrs, (acc_key * grad_scale).to(dtype), mask=mask_key)  # [BLOCK_N, BLOCK_D]
    tl.store(dkey_ptrs + dqkv_stride_part, acc_value.to(dtype), mask=mask_key)  # [BLOCK_N, BLOCK_D]


@triton.jit
def score_gradients(
    qkv_ptr,
    dout_ptr,
    row_pairs_ptr,
    bias_ptr,
    relative_ptr,
    seed,
    rows,
    columns,
    first_column,
    begin,
    seqlen,
    sequence,
    head,
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
    relative_stride_head,
    scale,
    window,
    slope,
    drop_threshold,
    drop_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of one sequence's scaled scores, `[BLOCK_M, BLOCK_N]`; 0 beyond its end."""
    dims = tl.arange(0, BLOCK_D)
    mask_dims = dims < HEAD_DIM
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
    pair_ptrs = row_pairs_ptr + (tl.cast(head, tl.int64) * lse_stride_head + row_in_batch) * 2
    minus_lse = tl.load(pair_ptrs, mask=mask_rows, other=-1e30)  # [BLOCK_M]
    delta = tl.load(pair_ptrs + 1, mask=mask_rows, other=0.0)  # [BLOCK_M]
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    bias_offsets = 0
    if HAS_BIAS:
        bias_ptr += tl.cast(sequence, tl.int64) * bias_stride_sequence + tl.cast(head, tl.int64) * bias_stride_head
        bias_rows = rows.to(tl.int64)[:, None] * bias_stride_row
        bias_offsets = bias_rows + columns.to(tl.int64)[None, :] * bias_stride_column  # [BLOCK_M, BLOCK_N]
    if HAS_RELATIVE:  # as in attention.py
        relative_ptr += tl.cast(head, tl.int64) * relative_stride_head + relative_stride_head // 2
    weights = weights_from_lse(
        scores, minus_lse[:, None], bias_ptr, bias_offsets, rows[:, None], columns[None, :], seqlen, scale, window,
        slope, relative_ptr, True, HAS_BIAS, HAS_RELATIVE, HAS_ALIBI, HAS_WINDOW,
    )  # fmt: skip
    dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_DROPOUT:
        keep = keep_mask(seed, rows, first_column, head, sequence, drop_threshold, BLOCK_N)
        dweights = tl.where(keep, dweights * drop_scale, 0.0)
        delta = delta * drop_scale
    return weights * (dweights - delta[:, None])


@triton.jit
def attention_backward_bias_kernel(
    qkv_ptr,
    dout_ptr,
    row_pairs_ptr,
    dbias_ptr,
    bias_ptr,
    slopes_ptr,
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
    relative_ptr,
    relative_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_SEQUENCE: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
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
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, count):
        sequence = first_sequence + i // heads_shared
        head = first_head + i % heads_shared
        begin = tl.load(cu_seqlens_ptr + sequence)
        seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + head)
        if first_row < seqlen and first_column < seqlen:
            acc += score_gradients(
                qkv_ptr, dout_ptr, row_pairs_ptr, bias_ptr, relative_ptr, seed, rows, columns, first_column, begin,
                seqlen, sequence, head, qkv_stride_row, qkv_stride_part, qkv_stride_head, out_stride_row,
                out_stride_head, lse_stride_head, bias_stride_sequence, bias_stride_head, bias_stride_row,
                bias_stride_column, relative_stride_head, scale, window, slope, drop_threshold, drop_scale, HEAD_DIM,
                BLOCK_N, BLOCK_D, True, HAS_RELATIVE, HAS_ALIBI, HAS_WINDOW, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    mask = (rows < max_seqlen)[:, None] & (columns < max_seqlen)[None, :]
    grad_ptr = dbias_ptr + tl.cast(place, tl.int64) * max_seqlen * max_seqlen
    grad_ptrs = grad_ptr + rows.to(tl.int64)[:, None] * max_seqlen + columns[None, :]
    tl.store(grad_ptrs, acc, mask=mask)  # [BLOCK_M, BLOCK_N]


@triton.jit
def attention_backward_relative_kernel(
    qkv_ptr,
    dout_ptr,
    row_pairs_ptr,
    sums_ptr,
    bias_ptr,
    slopes_ptr,
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
    parts,
    blocks,
    before,
    scale,
    window,
    drop_threshold,
    drop_scale,
    relative_ptr,
    relative_stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the scores summed over all tiles that lie alike about the diagonal, for one head.

    The tiles of a program begin `first_column - first_row` apart, the same for all of them, so that an element of the
    sum has one distance, and nothing is turned or gathered in the loop. A program owns its sum, and the order is fixed.
    `parts` programs share the sequences. The diagonals of the sums, `[parts, heads, BLOCK_M, blocks * BLOCK_N]`, are
    added up by the launcher: they are long as the longest sequence, never as its square.
    """
    tl.static_assert(BLOCK_M % BLOCK_N == 0, "a tile must not begin before the first column, nor end after it")
    if HEAD_DIM % 16 != 0:  # as in attention.py
        qkv_stride_row = qkv_stride_row // VECTOR * VECTOR
        qkv_stride_part = qkv_stride_part // VECTOR * VECTOR
        qkv_stride_head = qkv_stride_head // VECTOR * VECTOR
        out_stride_row = out_stride_row // VECTOR * VECTOR
        out_stride_head = out_stride_head // VECTOR * VECTOR
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    part = tl.program_id(0) // blocks // heads
    apart = (block - before) * BLOCK_N
    lanes = tl.arange(0, BLOCK_M)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head)
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sequence in tl.range(part, batch, parts):
        begin = tl.load(cu_seqlens_ptr + sequence)
        seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin
        begin_loop = tl.cdiv(tl.maximum(-apart, 0), BLOCK_M) * BLOCK_M
        for first_row in tl.range(begin_loop, tl.minimum(seqlen, seqlen - apart), BLOCK_M):
            rows = first_row + lanes
            first_column = first_row + apart
            columns = first_column + tl.arange(0, BLOCK_N)
            acc += score_gradients(
                qkv_ptr, dout_ptr, row_pairs_ptr, bias_ptr, relative_ptr, seed, rows, columns, first_column, begin,
                seqlen, sequence, head, qkv_stride_row, qkv_stride_part, qkv_stride_head, out_stride_row,
                out_stride_head, lse_stride_head, bias_stride_sequence, bias_stride_head, bias_stride_row,
                bias_stride_column, relative_stride_head, scale, window, slope, drop_threshold, drop_scale, HEAD_DIM,
                BLOCK_N, BLOCK_D, HAS_BIAS, HAS_RELATIVE, HAS_ALIBI, HAS_WINDOW, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    line = (part * heads + head).to(tl.int64) * BLOCK_M + lanes  # [BLOCK_M]
    sums_ptrs = sums_ptr + line[:, None] * (blocks * BLOCK_N) + block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(sums_ptrs, acc)  # [BLOCK_M, BLOCK_N]


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
    relative: Tensor | None = None,
    needs_drelative: bool = False,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the backward kernels: two, or one where a tile holds every key of a sequence; one more for each bias.

    Args:
        dout: `[rows, heads, head_dim]`, upstream.
        qkv, out, lse: the forward's input and outputs.
        query_tiles, key_tiles: (sequence, first row) for BLOCK_M of `attention_choices.attention_backward_query` and
            BLOCK_N of `attention_choices.attention_backward_key`.
        tokens: rows beyond these are slack; their gradient is 0.
        dbias_shape: the shape that `bias` had before it was expanded; None where it needs no gradient.
        relative: `[heads, 2 * places - 1]`, contiguous.
        needs_drelative: whether that needs a gradient.

    Returns:
        gradient of qkv `[rows, 3, heads, head_dim]` in its dtype, of the bias, float32 `dbias_shape`, or None, and of
        `relative`, float32, or None. No atomics: the same inputs give the same bits.
    """
    rows, _, heads, head_dim = qkv.shape
    qkv, out, dout = target.aligned(qkv), target.aligned(out), target.aligned(dout)
    if bias is not None and max(bias.stride()[2:]) >= 1 << 22:  # as in attention.py
        bias = bias.contiguous()
    dout = dout if dout.stride() == out.stride() else dout.contiguous()
    dqkv = qkv.new_empty((rows, 3, heads, head_dim))
    dqkv[tokens:] = 0
    dbias = None if dbias_shape is None else torch.zeros(dbias_shape, dtype=torch.float32, device=qkv.device)
    drelative = None
    if relative is not None and needs_drelative:
        drelative = torch.zeros(relative.shape, dtype=torch.float32, device=qkv.device)
    if tokens == 0:
        return dqkv, dbias, drelative
    extras = any(extra is not None for extra in (bias, relative, alibi_slopes, window)) or dropout > 0.0
    here = target.of(qkv.device)
    by_key = attention_choices.attention_backward_key(
        head_dim, qkv.dtype, max_seqlen, dbias=not (dbias is None and drelative is None), extras=extras, target=here
    )
    shape = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": attention_choices.attention_block_d(head_dim),
        "HAS_RELATIVE": relative is not None,
        "HAS_ALIBI": alibi_slopes is not None,
        "HAS_WINDOW": window is not None,
        "HAS_DROPOUT": dropout > 0.0,
        "VECTOR": 16 // qkv.element_size(),
        "PRECISION": precision.float32_precision(qkv.dtype, precision.float32_asked(), here),
    }
    strides_bias = (0, 0, 0, 0) if bias is None else bias.stride()
    scalars = (
        scale, 0 if window is None else window, drop_threshold(dropout), drop_scale(dropout), relative,
        1 if relative is None else relative.shape[1],
    )  # fmt: skip
    row_pairs = None if by_key.ONE_PASS else lse.new_empty((*lse.shape, 2), dtype=torch.float32)
    if not by_key.ONE_PASS:
        by_query = attention_choices.attention_backward_query(head_dim, qkv.dtype, extras=extras, target=here)
        dispatch(
            attention_backward_query_kernel, (len(query_tiles) * heads, 1, 1),
            qkv, out, dout, lse, row_pairs, dqkv, bias, alibi_slopes, seed, cu_seqlens, query_tiles,
            *qkv.stride()[:3], *out.stride()[:2], dqkv.stride(0), dqkv.stride(2), lse.stride(0),
            *strides_bias, heads, *scalars, HAS_BIAS=bias is not None, **shape, **choices.arguments(by_query),
        )  # fmt: skip
    dispatch(
        attention_backward_key_kernel, (len(key_tiles) * heads, 1, 1),
        qkv, out, dout, lse, row_pairs, dqkv, bias, alibi_slopes, seed, cu_seqlens, key_tiles,
        *qkv.stride()[:3], *out.stride()[:2], *dqkv.stride()[:3], lse.stride(0),
        *strides_bias, heads, *scalars, HAS_BIAS=bias is not None, **shape, **choices.arguments(by_key),
    )  # fmt: skip
    if bias is not None and dbias is not None:
        beside = attention_choices.attention_backward_bias_beside_relative
        choose = attention_choices.attention_backward_bias if relative is None else beside
        by_bias = choose(head_dim, qkv.dtype, here)
        full = qkv.new_empty((*dbias.shape[:2], max_seqlen, max_seqlen), dtype=torch.float32)
        tiles = -(-max_seqlen // by_bias.BLOCK_M) * -(-max_seqlen // by_bias.BLOCK_N)
        dispatch(
            attention_backward_bias_kernel, (full.shape[0] * full.shape[1] * tiles, 1, 1),
            qkv, dout, row_pairs, full, bias, alibi_slopes, seed, cu_seqlens,
            *qkv.stride()[:3], *out.stride()[:2], lse.stride(0), *strides_bias,
            len(cu_seqlens) - 1, heads, max_seqlen, *scalars,
            ONE_SEQUENCE=full.shape[0] > 1, ONE_HEAD=full.shape[1] > 1, **shape, **choices.arguments(by_bias),
        )  # fmt: skip
        dbias = full.sum_to_size(dbias.shape)
    if drelative is not None:
        by_distance = attention_choices.attention_backward_relative(head_dim, qkv.dtype, here)
        block_m, block_n = by_distance.BLOCK_M, by_distance.BLOCK_N
        farthest = min(max_seqlen - 1, max_seqlen if window is None else window)
        before = -(-farthest // block_n)  # blocks of columns to the left of a tile's first row
        blocks = before + (farthest + block_m - 1) // block_n + 1
        batch = len(cu_seqlens) - 1
        parts = attention_choices.attention_backward_relative_parts(heads * blocks, batch)
        sums = qkv.new_empty((parts, heads, block_m, blocks * block_n), dtype=torch.float32)
        dispatch(
            attention_backward_relative_kernel, (parts * heads * blocks, 1, 1),
            qkv, dout, row_pairs, sums, bias, alibi_slopes, seed, cu_seqlens,
            *qkv.stride()[:3], *out.stride()[:2], lse.stride(0), *strides_bias, batch, heads, parts, blocks, before,
            *scalars, HAS_BIAS=bias is not None, **shape, **choices.arguments(by_distance),
        )  # fmt: skip
        # Row i of a tile has distance d in column d + i of its line, so distances are the diagonals of `sums`.
        part, head, row, column = sums.stride()
        diagonals = sums.as_strided(
            (parts, heads, 2 * farthest + 1, block_m), (part, head, column, row + column), before * block_n - farthest
        )
        middle = drelative.shape[1] // 2
        torch.sum(diagonals, (0, 3), out=drelative[:, middle - farthest : middle + farthest + 1])
    return dqkv, dbias, drelative
