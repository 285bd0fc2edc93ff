"""embedding: checks, the torch path, and the Triton kernels as custom ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import backend
from fastbert.cpu.memory import room
from fastbert.errors import ArgumentError
from fastbert.kernels import row_wise_choices
from fastbert.ops.common import (
    check_dropout,
    check_parameter,
    check_rows,
    described,
    in_full,
    launcher,
    native_machine,
    parameter,
    wants_gradient,
)
from fastbert.ops.dropout import drop
from fastbert.ops.layer_norm import check_eps, normalise
from fastbert.packing import check_dense


def embedding(
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
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """dropout(LN(word[input_ids] + position[position_ids] + token_type[token_type_ids])), rounded once.

    Args:
        input_ids, position_ids: int64 `[tokens]`.
        token_type_ids: int64 `[tokens]`, or None where every token has type 0.
        word, position, token_type: floating tables `[entries, hidden]`; the last two in the dtype of `word` or float32.
        weight, bias: `[hidden]`, in the dtype of `word` or float32.
        dropout: probability in [0, 1) that an element of the result is dropped. The mask is a pure function of
            (seed, row, column): see `reference.keep_mask`.
        seed: int64 tensor of one element beside the tables; needed when `dropout > 0`.
        eps: added to the variance.
        padding_idx: the entry of `word` that gets no gradient.
        sparse: on the CPU the gradient of `word` is a sparse tensor, as that of `nn.Embedding(sparse=True)`.

    Returns:
        `[tokens, hidden]` in the dtype of `word`. Gradients of the other tables are dense. On a GPU a token with an id
        outside its table gives a row of NaN: to raise, the host would have to wait for the device.

    Raises:
        ArgumentError: a shape, dtype, device or value is wrong; on the CPU also an id outside its table.
        BackendError: the Triton path was forced and can't serve this call.
    """
    _check_tables(word, position, token_type, weight, bias)
    _check_ids("input_ids", input_ids, input_ids, word)
    _check_ids("position_ids", position_ids, input_ids, word)
    if token_type_ids is not None:
        _check_ids("token_type_ids", token_type_ids, input_ids, word)
    check_dropout(dropout, seed, word)
    check_eps(eps)
    if padding_idx is not None and not 0 <= padding_idx < len(word):
        raise ArgumentError("padding_idx", padding_idx, f"None, or an entry of word, from 0 to {len(word) - 1}")
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type, weight, bias)
    if backend.uses_triton("embedding", word, row_wise_choices.row_wise_unserved(word.shape[1], word.dtype)):
        return launcher(embedding_forward, *tables)(*ids, *tables, dropout, seed, eps, padding_idx)
    return _embedding_torch(ids, tables, dropout, seed, eps, padding_idx, sparse)


def _check_tables(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_rows("word", word)
    entries, hidden = word.shape
    if entries == 0 or hidden == 0:
        raise ArgumentError("word", f"shape {tuple(word.shape)}", "at least one entry and one column")
    for name, table in (("position", position), ("token_type", token_type)):
        check_rows(name, table)
        check_parameter(name, table, (max(len(table), 1), hidden), word)
    check_parameter("weight", weight, (hidden,), word)
    check_parameter("bias", bias, (hidden,), word)


def _check_ids(name: str, ids: Tensor, input_ids: Tensor, word: Tensor) -> None:
    check_dense(name, ids)
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape != input_ids.shape or ids.device != word.device:
        raise ArgumentError(name, described(ids), f"int64 [tokens], as many as input_ids, on {word.device}")


def check_inside(name: str, ids: Tensor, table: Tensor) -> None:
    """Raise ArgumentError for an id outside its table; only on the CPU, where looking costs no wait for a device."""
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    lowest, highest = map(int, torch.aminmax(ids))
    if lowest < 0 or highest >= len(table):
        expected = f"ids from 0 to {len(table) - 1}, the rows of the table"
        raise ArgumentError(name, f"ids from {lowest} to {highest}", expected)


def _embedding_torch(
    ids: tuple[Tensor, Tensor, Tensor | None],
    tables: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dropout: float,
    seed: Tensor | None,
    eps: float,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    (input_ids, position_ids, token_type_ids), (word, position, token_type, weight, bias) = ids, tables
    check_inside("input_ids", input_ids, word)
    check_inside("position_ids", position_ids, position)
    if token_type_ids is not None:
        check_inside("token_type_ids", token_type_ids, token_type)
    machine = native_machine(*tables, *ids)
    if machine is not None and dropout == 0.0 and not wants_gradient(*tables):
        from fastbert.cpu import embedding as kernel

        out = room((len(input_ids), word.shape[1]), word.dtype)
        kernel.embedding(
            machine,
            input_ids.contiguous(),
            position_ids.contiguous(),
            None if token_type_ids is None else token_type_ids.contiguous(),
            word.contiguous(),
            position.contiguous(),
            token_type.contiguous(),
            (parameter(weight), parameter(bias), eps),
            out,
        ).run()
        return out
    total = F.embedding(input_ids, word, padding_idx=padding_idx, sparse=sparse)
    total = in_full(total) + F.embedding(position_ids, position)
    if token_type_ids is None:
        total = total + token_type[0]
    else:
        total = total + F.embedding(token_type_ids, token_type)
    if seed is None or dropout == 0.0:
        return normalise(total, weight, bias, eps, word.dtype)
    return drop(normalise(total, weight, bias, eps, total.dtype), seed, dropout).to(word.dtype)


@torch.library.custom_op("fastbert::embedding_forward", mutates_args=())
def embedding_forward(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    padding_idx: int | None,
) -> Tensor:
    """The Triton kernel; see `fastbert.kernels.embedding.embedding_forward`."""
    from fastbert.kernels import embedding as kernel

    return kernel.embedding_forward(
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        dropout=dropout,
        seed=seed,
        eps=eps,
    )


@embedding_forward.register_fake
def _(input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, word: Tensor, *_: Any) -> Tensor:
    return word.new_empty(input_ids.shape[0], word.shape[1])


@torch.library.custom_op("fastbert::embedding_backward", mutates_args=())
def embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton kernels; see `fastbert.kernels.embedding.embedding_backward`.

    Returns (dword, dposition, dtoken_type, dparameters).
    """
    from fastbert.kernels import embedding as kernel

    return kernel.embedding_backward(
        dout,
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        dropout=dropout,
        seed=seed,
        eps=eps,
        padding_idx=padding_idx,
    )


@embedding_backward.register_fake
def _(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dword, dposition, dtoken_type = (table.new_empty(table.shape) for table in (word, position, token_type))
    return dword, dposition, dtoken_type, word.new_empty(2, word.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dropout, seed, ctx.eps, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *ids, word, position, token_type, weight, bias, seed = ctx.saved_tensors
    dword, dposition, dtoken_type, (dweight, dbias) = embedding_backward(
        dout, *ids, word, position, token_type, weight, ctx.dropout, seed, ctx.eps, ctx.padding_idx
    )
    dparameters = (dweight.to(weight.dtype), dbias.to(bias.dtype))
    return (None, None, None, dword, dposition, dtoken_type, *dparameters, None, None, None, None)


embedding_forward.register_autograd(_backward, setup_context=_save)
