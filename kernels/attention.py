"""Packed bidirectional attention: softmax(scale * Q K^T + biases - slope * distance) V inside each sequence.

One program owns BLOCK_M query rows of one head of one sequence and walks over that sequence's keys in blocks of
BLOCK_N, keeping a running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). Scores are kept in units of
log2, so that the exponential is one `exp2` of one fused multiply-add. The grid is one-dimensional: a table of
(sequence, first row) keeps it dense for ragged batches, times the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import attention_choices, choices, precision, target
from fastbert.kernels.dispatch import Prepared
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.kernels.pieces import keep_mask, load_relative, load_rows

LOG2E = math.log2(math.e)


@triton.jit
def attend_block(
    acc,
    row_max,
    row_sum,
    query,
    key_ptr,
    value_ptr,
    bias_ptr,
    tile_offsets,
    bias_offsets,
    start,
    seqlen,
    rows,
    scale_log2e,
    slope_log2e,
    window,
    seed,
    head,
    sequence,
    drop_threshold,
    relative_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys folded into the running softmax; `start` is its first column."""
    columns = start + tl.arange(0, BLOCK_N)
    mask_columns = columns < seqlen
    key = load_rows(key_ptr + tile_offsets, mask_columns, MASKED, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    value = load_rows(value_ptr + tile_offsets, mask_columns, MASKED, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        mask_bias = (rows < seqlen)[:, None]
        if MASKED:
            mask_bias = mask_bias & mask_columns[None, :]
        bias = tl.load(bias_ptr + bias_offsets, mask=mask_bias, other=0.0)  # [BLOCK_M, BLOCK_N]
        scores = tl.fma(scores, scale_log2e, bias.to(tl.float32) * 1.4426950408889634)  # [BLOCK_M, BLOCK_N]
    elif HAS_RELATIVE or HAS_ALIBI:
        scores = scores * scale_log2e
    if HAS_RELATIVE:
        relative = load_relative(relative_ptr, rows[:, None], columns[None, :], seqlen)  # [BLOCK_M, BLOCK_N]
        scores = tl.fma(relative.to(tl.float32), 1.4426950408889634, scores)
    if HAS_ALIBI:  # in float32 from the start: a conversion of each distance would cost more than the rest
        distance = tl.abs(rows.to(tl.float32)[:, None] - columns.to(tl.float32)[None, :])
        scores = tl.fma(distance, -slope_log2e, scores)  # [BLOCK_M, BLOCK_N]
    if HAS_WINDOW:
        distance = rows[:, None] - columns[None, :]
        scores = tl.where((distance <= window) & (distance >= -window), scores, float("-inf"))
    if MASKED:
        scores = tl.where(mask_columns[None, :], scores, float("-inf"))

    if HAS_BIAS or HAS_RELATIVE or HAS_ALIBI:  # scores are in units of log2 already
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)
    if HAS_BIAS or HAS_RELATIVE or HAS_WINDOW:  # a row may have seen no key yet: -inf - -inf must not become NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        shift = new_max
    if HAS_BIAS or HAS_RELATIVE or HAS_ALIBI:
        weights = tl.exp2(scores - shift[:, None])
    else:
        weights = tl.exp2(tl.fma(scores, scale_log2e, -shift[:, None]))
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    if HAS_DROPOUT:
        weights = tl.where(keep_mask(seed, rows, start, head, sequence, drop_threshold, BLOCK_N), weights, 0.0)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    return acc, new_max, row_sum


@triton.jit
def attention_forward_kernel(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    tiles_ptr,
    qkv_stride_row,
    qkv_stride_part,
    qkv_stride_head,
    out_stride_row,
    out_stride_head,
    lse_stride_head,
    heads,
    scale_log2e,
    bias_ptr,
    bias_stride_sequence,
    bias_stride_head,
    bias_stride_row,
    bias_stride_column,
    slopes_ptr,
    window,
    seed_ptr,
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
    STORE_LSE: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one tile of query rows of one head; see the module's docstring.

    The arguments of what may be off come last, so that those before them have the same places as in a kernel without.
    """
    if HEAD_DIM % 16 != 0:  # Triton only sees strides divisible by 16; `target.aligned` promises 16 bytes
        qkv_stride_row = qkv_stride_row // VECTOR * VECTOR
        qkv_stride_part = qkv_stride_part // VECTOR * VECTOR
        qkv_stride_head = qkv_stride_head // VECTOR * VECTOR
        out_stride_row = out_stride_row // VECTOR * VECTOR
        out_stride_head = out_stride_head // VECTOR * VECTOR
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
    sequence_ptr = qkv_ptr + begin.to(tl.int64) * qkv_stride_row + head.to(tl.int64) * qkv_stride_head
    # Only scalar bases are 64-bit: a tile's own offsets fit 32 bits (`target.aligned` sees to it) and save registers.
    query_ptr = sequence_ptr + first_row.to(tl.int64) * qkv_stride_row
    query_offsets = lanes[:, None] * qkv_stride_row + dims[None, :]
    query = load_rows(query_ptr + query_offsets, rows < seqlen, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    if HAS_WINDOW:
        first_key = tl.maximum(first_row - window, 0) // BLOCK_N * BLOCK_N
        end_key = tl.minimum(first_row + BLOCK_M + window, seqlen)
    else:
        first_key = seqlen * 0
        end_key = seqlen
    tile_offsets = tl.arange(0, BLOCK_N)[:, None] * qkv_stride_row + dims[None, :]  # [BLOCK_N, BLOCK_D]
    key_ptr = sequence_ptr + qkv_stride_part + first_key.to(tl.int64) * qkv_stride_row
    value_ptr = key_ptr + qkv_stride_part
    bias_offsets = 0
    if HAS_BIAS:
        bias_ptr += sequence.to(tl.int64) * bias_stride_sequence + head.to(tl.int64) * bias_stride_head
        bias_ptr += first_row.to(tl.int64) * bias_stride_row + first_key.to(tl.int64) * bias_stride_column
        bias_offsets = lanes[:, None] * bias_stride_row + (
            tl.arange(0, BLOCK_N)[None, :] * bias_stride_column
        )  # [BLOCK_M, BLOCK_N]
    if HAS_RELATIVE:  # to the middle of the head's line, which is of distance 0
        relative_ptr += head.to(tl.int64) * relative_stride_head + relative_stride_head // 2
    slope_log2e = 0.0
    if HAS_ALIBI:
        slope_log2e = tl.load(slopes_ptr + head) * 1.4426950408889634
    seed = seed_ptr
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    step = tl.cast(BLOCK_N, tl.int64) * qkv_stride_row
    bias_step = tl.cast(BLOCK_N, tl.int64) * bias_stride_column
    begin_tail = first_key
    if SPLIT_TAIL:
        begin_tail = end_key // BLOCK_N * BLOCK_N
    for masked in tl.static_range(0 if SPLIT_TAIL else 1, 2):  # full blocks of keys, then the masked tail
        begin_loop = begin_tail if masked else first_key
        end_loop = end_key if masked else begin_tail
        # A tail is one block, so there is nothing to pipeline: its buffers' addresses would only take registers.
        for start in tl.range(begin_loop, end_loop, BLOCK_N, num_stages=1 if SPLIT_TAIL and masked else None):
            acc, row_max, row_sum = attend_block(
                acc, row_max, row_sum, query, key_ptr, value_ptr, bias_ptr, tile_offsets, bias_offsets, start, seqlen,
                rows, scale_log2e, slope_log2e, window, seed, head, sequence, drop_threshold, relative_ptr, HEAD_DIM,
                BLOCK_N, BLOCK_D, masked, HAS_BIAS, HAS_RELATIVE, HAS_ALIBI, HAS_WINDOW, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
            key_ptr += step
            value_ptr += step
            if HAS_BIAS:
                bias_ptr += bias_step

    inverse = 1.0 / row_sum
    if HAS_BIAS or HAS_RELATIVE or HAS_WINDOW:  # a row that may attend nothing
        inverse = tl.where(row_sum > 0.0, inverse, 0.0)
    if HAS_DROPOUT:
        inverse = inverse * drop_scale
    # Masks in another form than before the loop, or the compiler keeps those in registers meanwhile.
    mask_rows = lanes < seqlen - first_row
    mask_query = mask_rows[:, None]
    if HEAD_DIM != BLOCK_D:
        mask_query = mask_query & (dims < HEAD_DIM)[None, :]
    out_ptr += (begin + first_row).to(tl.int64) * out_stride_row + head.to(tl.int64) * out_stride_head
    out_offsets = lanes[:, None] * out_stride_row + dims[None, :]
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, out, mask=mask_query)  # [BLOCK_M, BLOCK_D]
    if STORE_LSE:
        lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
        if HAS_BIAS or HAS_RELATIVE or HAS_WINDOW:
            lse = tl.where(row_sum > 0.0, lse, float("inf"))
        tl.store(lse_ptr + head.to(tl.int64) * lse_stride_head + begin + rows, lse, mask=mask_rows)  # [BLOCK_M]


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    store_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        qkv: `[rows, 3, heads, head_dim]`, any strides; copied once if they are not 16-byte aligned.
        cu_seqlens: int32 `[batch + 1]`.
        tiles: int32 `[tiles, 2]`, (sequence, first row) for the BLOCK_M of `attention_choices.attention_forward`.
        max_seqlen: length of the longest sequence.
        scale: positive factor on the scores.
        bias: `[batch, heads, max_seqlen, max_seqlen]`, expanded (strides may be 0).
        relative: `[heads, 2 * places - 1]`, contiguous, `places >= max_seqlen`.
        alibi_slopes: float32 `[heads]`, contiguous.
        window, dropout, seed: as in `fastbert.ops.attention`.
        store_lse: whether the backward will need lse.

    Returns:
        out `[rows, heads, head_dim]` (rows of slack are left unwritten), and lse fp32 `[heads, rows]`, or `[heads, 0]`.
    """
    qkv = target.aligned(qkv)
    if bias is not None and max(bias.stride()[2:]) >= 1 << 22:  # as `aligned`: offsets in a tile are 32-bit
        bias = bias.contiguous()
    run = prepare_attention_forward(
        qkv, cu_seqlens, tiles, max_seqlen, scale=scale, bias=bias, relative=relative, alibi_slopes=alibi_slopes,
        window=window, dropout=dropout, store_lse=store_lse,
    )  # fmt: skip
    return run(qkv, cu_seqlens, tiles, bias, relative, alibi_slopes, seed)


def prepare_attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    store_lse: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`attention_forward` as a function of tensors that are as these but for contents and rows, 16-byte aligned.

    `attention_choices.attention_regime` must be the same for them. It takes qkv, cu_seqlens, tiles, bias, relative,
    alibi_slopes and seed; those left out at the end are None. An lse that it need not store is the same empty tensor
    each time.
    """
    rows, _, heads, head_dim = qkv.shape
    strides = *qkv.stride()[:3], heads * head_dim, head_dim
    bias_strides = (0, 0, 0, 0) if bias is None else bias.stride()
    relative_stride_head = 1 if relative is None else relative.shape[1]
    no_lse = None if store_lse else qkv.new_empty((heads, 0), dtype=torch.float32)
    options = 0 if window is None else window, drop_threshold(dropout), drop_scale(dropout)
    here = target.of(qkv.device)
    choice = attention_choices.attention_forward(
        head_dim,
        qkv.dtype,
        max_seqlen,
        rows=rows,
        batch=len(cu_seqlens) - 1,
        extras=any(extra is not None for extra in (bias, relative, alibi_slopes, window)) or dropout > 0.0,
        bias=bias is not None or relative is not None,
        target=here,
    )
    start = Prepared(
        attention_forward_kernel,
        HEAD_DIM=head_dim,
        BLOCK_D=attention_choices.attention_block_d(head_dim),
        HAS_BIAS=bias is not None,
        HAS_RELATIVE=relative is not None,
        HAS_ALIBI=alibi_slopes is not None,
        HAS_WINDOW=window is not None,
        HAS_DROPOUT=dropout > 0.0,
        STORE_LSE=store_lse,
        VECTOR=16 // qkv.element_size(),
        PRECISION=precision.float32_precision(qkv.dtype, precision.float32_asked(), here),
        **choices.arguments(choice),
    )

    def run(
        qkv: Tensor,
        cu_seqlens: Tensor,
        tiles: Tensor,
        bias: Tensor | None = None,
        relative: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows, entries = qkv.shape[0], tiles.shape[0]  # `len` of a tensor is Python's, and takes three times as long
        out = qkv.new_empty(rows, heads, head_dim)
        lse = qkv.new_empty((heads, rows), dtype=torch.float32) if no_lse is None else no_lse
        if entries > 0:
            start(
                (entries * heads, 1, 1), qkv, out, lse, cu_seqlens, tiles, *strides, rows if store_lse else 1, heads,
                scale * LOG2E, bias, *bias_strides, alibi_slopes, options[0], seed, *options[1:], relative,
                relative_stride_head,
            )  # fmt: skip
        return out, lse

    return run
