"""dropout(LN(word[id] + position[p] + token_type[t])): three gathers and a LayerNorm in one pass.

Tiles as in layer_norm. An id outside its table is never followed: its row becomes NaN, because a kernel can't raise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch, target
from fastbert.kernels.pieces import keep_mask, normalise


@triton.jit
def gather_rows(ids, table_ptr, table_stride_row, table_rows, column, mask):
    """Rows `ids` of a table as float32 `[ROWS, BLOCK]`; an id outside the table gives a row of NaN without a read."""
    inside = ((ids >= 0) & (ids < table_rows))[:, None]
    found = tl.load(table_ptr + ids[:, None] * table_stride_row + column[None, :], mask=mask & inside, other=0.0)
    return tl.where(inside, found.to(tl.float32), float("nan"))  # [ROWS, BLOCK]


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
    out = torch.empty((tokens, hidden), dtype=word.dtype, device=word.device)
    if tokens == 0:
        return out
    choice = launch.embedding_forward(hidden, word.dtype, target.of(word.device))
    with target.guard(word):
        embedding_forward_kernel[(triton.cdiv(tokens, choice.ROWS),)](
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
            launch.drop_threshold(dropout),
            launch.drop_scale(dropout),
            HIDDEN=hidden,
            ROWS=choice.ROWS,
            BLOCK=launch.row_block(hidden),
            HAS_TYPES=token_type_ids is not None,
            HAS_DROPOUT=dropout > 0.0,
            num_warps=choice.num_warps,
        )
    return out
