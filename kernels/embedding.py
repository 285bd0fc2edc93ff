"""dropout(LN(word[id] + position[p] + token_type[t])): three gathers and a LayerNorm in one pass, and their gradients.

Tiles as in layer_norm. An id outside its table is never followed: its row becomes NaN, because a kernel can't raise.

The backward gathers again, and leaves the gradient of the gathered sum for each token. The gradient of a table adds
those of the tokens with one id: tokens are sorted by id, and each run of equal ids is summed in chunks of CHUNK, in
order. A run of one chunk is done then; the chunks of a longer one are added in a second launch. No atomics, so equal
inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import choices, row_wise_choices, target
from fastbert.kernels.dispatch import dispatch
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.kernels.pieces import keep_mask, moments, normalise, normalise_gradient

CHUNK = 64


@triton.jit
def gather_rows(ids, table_ptr, table_stride_row, table_rows, column, mask):
    """Rows `ids` of a table as float32 `[ROWS, BLOCK]`; an id outside the table gives a row of NaN without a read."""
    inside = ((ids >= 0) & (ids < table_rows))[:, None]
    other = tl.where(inside, 0.0, float("nan"))  # by the load itself: a select takes an instruction an element
    table_ptrs = table_ptr + ids[:, None] * table_stride_row + column[None, :]
    return tl.load(table_ptrs, mask=mask & inside, other=other).to(tl.float32)  # [ROWS, BLOCK]


@triton.jit
def embedding_forward_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    word_stride_row,
    position_stride_row,
    token_type_stride_row,
    out_stride_row,
    tokens,
    word_rows,
    position_rows,
    token_type_rows,
    eps,
    drop_threshold,
    drop_scale,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TYPES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """See `embedding_forward`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask_row = row < tokens
    mask_column = column < HIDDEN
    mask = mask_row[:, None] & mask_column[None, :]

    input_ids = tl.load(input_ids_ptr + row, mask=mask_row, other=0)  # [ROWS]
    x = gather_rows(input_ids, word_ptr, word_stride_row, word_rows, column, mask)
    position_ids = tl.load(position_ids_ptr + row, mask=mask_row, other=0)  # [ROWS]
    x += gather_rows(position_ids, position_ptr, position_stride_row, position_rows, column, mask)
    if HAS_TYPES:
        token_type_ids = tl.load(token_type_ids_ptr + row, mask=mask_row, other=0)  # [ROWS]
        x += gather_rows(token_type_ids, token_type_ptr, token_type_stride_row, token_type_rows, column, mask)
    else:
        x += tl.load(token_type_ptr + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]  # [BLOCK]
    weight = tl.load(weight_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
    bias = tl.load(bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]

    out, _, _ = normalise(x, mask_column[None, :], weight, bias, eps, HIDDEN)  # [ROWS, BLOCK]
    if HAS_DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), row, 0, 0, 0, drop_threshold, BLOCK)  # [ROWS, BLOCK]
        out *= tl.where(keep, drop_scale, 0.0)  # not a select of out: a row of NaN stays one
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_stride_row + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]


def embedding_forward(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float,
) -> Tensor:
    """Launch the forward kernel.

    Args:
        input_ids, position_ids, token_type_ids: int64 `[tokens]`; without token types every token has type 0.
        word, position, token_type: floating tables `[entries, hidden]`; copied once if not 16-byte aligned.
        weight, bias: `[hidden]`, in the dtype of `word` or float32.
        dropout, seed, eps: as in `fastbert.ops.embedding`.

    Returns:
        `[tokens, hidden]` in the dtype of `word`.
    """
    tokens, hidden = len(input_ids), word.shape[1]
    word, position, token_type = target.aligned(word), target.aligned(position), target.aligned(token_type)
    out = word.new_empty((tokens, hidden))
    if tokens == 0:
        return out
    choice = row_wise_choices.embedding_forward(hidden, word.dtype, target.of(word.device))
    dispatch(
        embedding_forward_kernel,
        (-(-tokens // choice.ROWS), 1, 1),
        input_ids.contiguous(),
        position_ids.contiguous(),
        None if token_type_ids is None else token_type_ids.contiguous(),
        word,
        position,
        token_type,
        weight.contiguous(),
        bias.contiguous(),
        seed,
        out,
        word.stride(0),
        position.stride(0),
        token_type.stride(0),
        out.stride(0),
        tokens,
        len(word),
        len(position),
        len(token_type),
        eps,
        drop_threshold(dropout),
        drop_scale(dropout),
        HIDDEN=hidden,
        ROWS=choice.ROWS,
        BLOCK=choices.row_block(hidden),
        HAS_TYPES=token_type_ids is not None,
        HAS_DROPOUT=dropout > 0.0,
        num_warps=choice.num_warps,
    )
    return out


@triton.jit
def embedding_backward_kernel(
    dout_ptr,
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    seed_ptr,
    dtotal_ptr,
    dweight_ptr,
    dbias_ptr,
    dtoken_type_ptr,
    dout_stride_row,
    word_stride_row,
    position_stride_row,
    token_type_stride_row,
    dtotal_stride_row,
    tokens,
    word_rows,
    position_rows,
    token_type_rows,
    eps,
    drop_threshold,
    drop_scale,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TYPES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """The gradient of word + position + token type, dtotal `[tokens, HIDDEN]`.

    dweight, dbias and, where every token has type 0, dtoken_type are the sums of each program, `[programs, HIDDEN]`.
    """
    column = tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    acc_dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    acc_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    if not HAS_TYPES:
        acc_dtoken_type = tl.zeros([ROWS, BLOCK], tl.float32)

    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask_row = row < tokens
        mask = mask_row[:, None] & mask_column[None, :]
        row_offset = row.to(tl.int64)[:, None]
        input_ids = tl.load(input_ids_ptr + row, mask=mask_row, other=0)  # [ROWS]
        x = gather_rows(input_ids, word_ptr, word_stride_row, word_rows, column, mask)
        position_ids = tl.load(position_ids_ptr + row, mask=mask_row, other=0)  # [ROWS]
        x += gather_rows(position_ids, position_ptr, position_stride_row, position_rows, column, mask)
        if HAS_TYPES:
            token_type_ids = tl.load(token_type_ids_ptr + row, mask=mask_row, other=0)  # [ROWS]
            x += gather_rows(token_type_ids, token_type_ptr, token_type_stride_row, token_type_rows, column, mask)
        else:
            x += tl.load(token_type_ptr + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]  # [BLOCK]
        dout_ptrs = dout_ptr + row_offset * dout_stride_row + column[None, :]
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if HAS_DROPOUT:
            keep = keep_mask(tl.load(seed_ptr), row, 0, 0, 0, drop_threshold, BLOCK)  # [ROWS, BLOCK]
            dout = tl.where(keep, dout * drop_scale, 0.0)

        _, centred, variance = moments(x, mask_column[None, :], HIDDEN)
        rstd = tl.where(mask_row, tl.rsqrt(variance + eps), 0.0)  # 0 makes a masked row's gradient 0
        normal = centred * rstd[:, None]
        acc_dweight = tl.fma(dout, normal, acc_dweight)
        acc_dbias += dout
        weight = tl.load(weight_ptr + column, mask=mask_column, other=0.0).to(tl.float32)  # [BLOCK]
        dtotal = normalise_gradient(dout, normal, mask_column[None, :], weight, rstd, HIDDEN)  # [ROWS, BLOCK]
        if not HAS_TYPES:
            acc_dtoken_type += dtotal
        dtotal_ptrs = dtotal_ptr + row_offset * dtotal_stride_row + column[None, :]
        tl.store(dtotal_ptrs, dtotal.to(dtotal_ptr.dtype.element_ty), mask=mask)  # [ROWS, BLOCK]

    sums = tl.program_id(0) * HIDDEN + column
    tl.store(dweight_ptr + sums, tl.sum(acc_dweight, 0), mask=mask_column)  # [BLOCK]
    tl.store(dbias_ptr + sums, tl.sum(acc_dbias, 0), mask=mask_column)  # [BLOCK]
    if not HAS_TYPES:
        tl.store(dtoken_type_ptr + sums, tl.sum(acc_dtoken_type, 0), mask=mask_column)  # [BLOCK]


@triton.jit
def embedding_chunks_kernel(
    dtotal_ptr,
    sorted_ids_ptr,
    order_ptr,
    first_ptr,
    last_ptr,
    dtable_ptr,
    sums_ptr,
    dtotal_stride_row,
    dtable_stride_row,
    table_rows,
    padding_idx,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of one chunk of equal ids: program `place` works where a chunk begins at that place of the sorted ids.

    A run of one chunk becomes a row of dtable, `[table_rows, HIDDEN]`. A chunk of a longer run goes to row
    2 * (place // CHUNK) + (first == place) of sums: only two chunks of long runs, the last of one and the first of
    another, can begin inside one window of CHUNK places.
    """
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    entry = tl.load(sorted_ids_ptr + place)
    first = tl.load(first_ptr + place)
    last = tl.load(last_ptr + place)  # one beyond the run
    wanted = (entry >= 0) & (entry < table_rows) & (entry != padding_idx)
    if wanted & ((place - first) % CHUNK == 0):
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        end = tl.minimum(last, place + CHUNK)
        for begin in range(place, end, ROWS):
            at = begin + tl.arange(0, ROWS)
            mask_at = at < end
            token = tl.load(order_ptr + at, mask=mask_at, other=0)  # [ROWS]
            dtotal_ptrs = dtotal_ptr + token[:, None] * dtotal_stride_row + column[None, :]
            acc += tl.load(dtotal_ptrs, mask=mask_at[:, None] & mask_column[None, :], other=0.0)  # [ROWS, BLOCK]
        total = tl.sum(acc, 0)
        if last - first <= CHUNK:
            dtable_ptrs = dtable_ptr + entry * dtable_stride_row + column
            tl.store(dtable_ptrs, total.to(dtable_ptr.dtype.element_ty), mask=mask_column)  # [BLOCK]
        else:
            slot = 2 * (place // CHUNK) + (first == place).to(tl.int32)
            tl.store(sums_ptr + slot.to(tl.int64) * HIDDEN + column, total, mask=mask_column)  # [BLOCK]


@triton.jit
def embedding_runs_kernel(
    sums_ptr,
    sorted_ids_ptr,
    first_ptr,
    last_ptr,
    dtable_ptr,
    dtable_stride_row,
    tokens,
    table_rows,
    padding_idx,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chunks of a long run added in order: program `window` works where one begins in those CHUNK places."""
    window = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_column = column < HIDDEN
    place = window * CHUNK + tl.arange(0, CHUNK)
    first = tl.load(first_ptr + place, mask=place < tokens, other=-1)  # [CHUNK]
    last = tl.load(last_ptr + place, mask=place < tokens, other=0)  # [CHUNK]
    begin = tl.max(tl.where((first == place) & (last - place > CHUNK), place, -1), 0)
    if begin >= 0:
        entry = tl.load(sorted_ids_ptr + begin)
        if (entry >= 0) & (entry < table_rows) & (entry != padding_idx):
            chunks = tl.cdiv(tl.load(last_ptr + begin) - begin, CHUNK)
            acc = tl.zeros([ROWS, BLOCK], tl.float32)
            for begin_chunk in range(0, chunks, ROWS):
                chunk = begin_chunk + tl.arange(0, ROWS)
                slot = 2 * (window + chunk) + (chunk == 0).to(tl.int32)
                sums_ptrs = sums_ptr + slot.to(tl.int64)[:, None] * HIDDEN + column[None, :]
                acc += tl.load(sums_ptrs, mask=(chunk < chunks)[:, None] & mask_column[None, :], other=0.0)
            dtable_ptrs = dtable_ptr + entry * dtable_stride_row + column
            tl.store(dtable_ptrs, tl.sum(acc, 0).to(dtable_ptr.dtype.element_ty), mask=mask_column)  # [BLOCK]


def table_gradient(dtotal: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None = None) -> Tensor:
    """Launch the two kernels that add the rows of `dtotal` with one id.

    Args:
        dtotal: contiguous `[tokens, hidden]`.
        ids: int64 `[tokens]`; one outside the table is left out.
        padding_idx: the entry whose gradient stays 0.

    Returns:
        `[entries, hidden]` in the dtype of `table`.
    """
    tokens, hidden = dtotal.shape
    dtable = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    if tokens == 0:
        return dtable
    sorted_ids, order = torch.sort(ids, stable=True)
    first = torch.searchsorted(sorted_ids, sorted_ids, out_int32=True)
    last = torch.searchsorted(sorted_ids, sorted_ids, out_int32=True, right=True)
    windows = -(-tokens // CHUNK)
    sums = table.new_empty((2 * windows, hidden), dtype=torch.float32)
    choice = row_wise_choices.embedding_backward_table(hidden, dtotal.dtype, target.of(table.device))
    blocks = -(-hidden // choice.BLOCK)
    shared = {"HIDDEN": hidden, "CHUNK": CHUNK, "ROWS": choice.ROWS, "BLOCK": choice.BLOCK}
    entries, skipped = len(table), -1 if padding_idx is None else padding_idx
    dispatch(
        embedding_chunks_kernel,
        (tokens, blocks, 1),
        dtotal,
        sorted_ids,
        order,
        first,
        last,
        dtable,
        sums,
        dtotal.stride(0),
        dtable.stride(0),
        entries,
        skipped,
        **shared,
        num_warps=choice.num_warps,
    )
    if tokens > CHUNK:
        dispatch(
            embedding_runs_kernel,
            (windows, blocks, 1),
            sums,
            sorted_ids,
            first,
            last,
            dtable,
            dtable.stride(0),
            tokens,
            entries,
            skipped,
            **shared,
            num_warps=choice.num_warps,
        )
    return dtable


def embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels; the sum that is normalised is gathered again.

    Args:
        dout: `[tokens, hidden]`, the gradient of the result.
        padding_idx: the entry of `word` whose gradient stays 0.
        others: what the forward was given.

    Returns:
        Gradients of word, position and token_type, each whole and in the dtype of its table; those of weight and bias,
        float32 `[2, hidden]`.
    """
    tokens, hidden = dout.shape
    dout = target.aligned(dout)
    aligned_word, aligned_position = target.aligned(word), target.aligned(position)
    aligned_token_type = target.aligned(token_type)
    dtotal = word.new_empty((tokens, hidden))
    choice = row_wise_choices.embedding_backward(hidden, word.dtype, target.of(word.device))
    programs = min(choice.PROGRAMS, -(-tokens // choice.ROWS))
    has_types = token_type_ids is not None
    sums = word.new_empty((2 if has_types else 3, programs, hidden), dtype=torch.float32)
    if tokens > 0:
        dispatch(
            embedding_backward_kernel,
            (programs, 1, 1),
            dout,
            input_ids.contiguous(),
            position_ids.contiguous(),
            None if token_type_ids is None else token_type_ids.contiguous(),
            aligned_word,
            aligned_position,
            aligned_token_type,
            weight.contiguous(),
            seed,
            dtotal,
            sums[0],
            sums[1],
            None if has_types else sums[2],
            dout.stride(0),
            aligned_word.stride(0),
            aligned_position.stride(0),
            aligned_token_type.stride(0),
            dtotal.stride(0),
            tokens,
            len(word),
            len(position),
            len(token_type),
            eps,
            drop_threshold(dropout),
            drop_scale(dropout),
            HIDDEN=hidden,
            BLOCK=choices.row_block(hidden),
            HAS_TYPES=has_types,
            HAS_DROPOUT=dropout > 0.0,
            **choices.arguments(choice),
        )
    totals = sums.sum(1)
    if token_type_ids is None:
        dtoken_type = torch.zeros_like(token_type, memory_format=torch.contiguous_format)
        dtoken_type[0] = totals[2]
    else:
        dtoken_type = table_gradient(dtotal, token_type_ids, token_type)
    dword = table_gradient(dtotal, input_ids, word, padding_idx)
    return dword, table_gradient(dtotal, position_ids, position), dtoken_type, totals[:2].clone()
