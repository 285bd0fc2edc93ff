"""FLOPs and minimum bytes of each op for a shape: what a roofline, and the count of traffic, are held against.

A fused multiply-add is two FLOPs; exp, erf, tanh, a division and a root are one each. `min_bytes` is the traffic of a
kernel that reads each input and writes each output once. Neither depends on how a kernel does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# An element of LayerNorm: 1 for the mean's sum, 1 to centre, 2 for the sum of squares, 1 to scale, 2 for weight, bias.
LAYER_NORM_FLOPS = 7
# A row: 2 divisions, eps, the root and its reciprocal.
LAYER_NORM_ROW_FLOPS = 5
# An element of its gradient: 2 for the normal value again, 1 for the weight, 3 for the two means, 4 for the result, 3
# for the sums of dweight and dbias.
LAYER_NORM_BACKWARD_FLOPS = 13


@dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes that must cross the memory bus."""

    flops: int
    min_bytes: int


def layer_norm(
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    x_bias: bool = False,
    dropout: bool = False,
    statistics: bool = False,
    unpack: bool = False,
    parameters: torch.dtype | None = None,
) -> Cost:
    """LN(residual + dropout(x + x_bias)) on `[rows, hidden]`.

    Args:
        statistics: whether what the backward reads is written: the sum, if it is not x, and mean and rstd, float32.
        unpack: whether the result is padded, its row of each token read from an int64 vector; padding is not counted.
        parameters: dtype of weight, bias and x_bias; `dtype` by default.
    """
    per_element = LAYER_NORM_FLOPS + residual + x_bias + dropout
    states = 2 + residual + (statistics and (residual or x_bias or dropout))
    vectors = 2 + x_bias
    itemsize = (parameters or dtype).itemsize
    return Cost(
        flops=rows * hidden * per_element + rows * LAYER_NORM_ROW_FLOPS,
        min_bytes=rows * hidden * states * dtype.itemsize
        + hidden * vectors * itemsize
        + (rows * 2 * 4 if statistics else 0)
        + (rows * 8 if unpack else 0)
        + (8 if dropout else 0),
    )


def layer_norm_backward(
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    x_bias: bool = False,
    dropout: bool = False,
    unpack: bool = False,
    parameters: torch.dtype | None = None,
) -> Cost:
    """Gradients of x, residual, weight, bias and x_bias; that of residual is that of x where dropout is off.

    Args:
        unpack: as in `layer_norm`.
        parameters: dtype of weight and of the gradients of weight, bias and x_bias; `dtype` by default.
    """
    per_element = LAYER_NORM_BACKWARD_FLOPS + x_bias + dropout
    states = 3 + (residual and dropout)
    vectors = 3 + x_bias
    return Cost(
        flops=rows * hidden * per_element + rows * 2,
        min_bytes=rows * hidden * states * dtype.itemsize
        + hidden * vectors * (parameters or dtype).itemsize
        + rows * 2 * 4
        + (rows * 8 if unpack else 0)
        + (8 if dropout else 0),
    )


def bias_gelu(
    rows: int, width: int, dtype: torch.dtype, *, bias: bool = True, approximate: str = "none", gated: bool = False
) -> Cost:
    """GELU(x + bias) on `[rows, width]`; gated, `[rows, 2 * width]` become `[rows, width]`."""
    halves = 1 + gated
    per_element = {"none": 5, "tanh": 8}[approximate] + bias * halves + gated
    return Cost(
        flops=rows * width * per_element,
        min_bytes=(rows * width * (1 + halves) + (halves * width if bias else 0)) * dtype.itemsize,
    )


def bias_gelu_backward(
    rows: int, width: int, dtype: torch.dtype, *, bias: bool = True, approximate: str = "none", gated: bool = False
) -> Cost:
    """Gradients of x and bias; `width` is that of the result."""
    halves = 1 + gated
    # Gated: 2 for GELU itself, which shares what its derivative needs, 1 for the gate's gradient, 1 to apply the gate.
    per_element = {"none": 10, "tanh": 14}[approximate] + 2 * bias * halves + 4 * gated
    return Cost(
        flops=rows * width * per_element,
        min_bytes=(rows * width * (1 + 2 * halves) + (2 * halves * width if bias else 0)) * dtype.itemsize,
    )


def embedding(
    tokens: int, hidden: int, dtype: torch.dtype, *, entries: int, token_types: bool = True, dropout: bool = False
) -> Cost:
    """dropout(LN(word + position + token_type)) on `[tokens, hidden]`.

    Args:
        entries: how many different rows of the three tables are used, all together; each must be read once.
        token_types: whether token type ids are given.
    """
    ids = 3 if token_types else 2
    return Cost(
        flops=tokens * hidden * (2 + LAYER_NORM_FLOPS + dropout) + tokens * LAYER_NORM_ROW_FLOPS,
        min_bytes=(tokens + entries + 2) * hidden * dtype.itemsize + tokens * ids * 8 + (8 if dropout else 0),
    )


def embedding_backward(
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    entries: int,
    table_entries: int,
    token_types: bool = True,
    dropout: bool = False,
) -> Cost:
    """Gradients of the three tables, whole, and of weight and bias.

    Args:
        entries, token_types: as in `embedding`.
        table_entries: rows of the three tables, all together; each row of their gradients is written once.
    """
    ids = 3 if token_types else 2
    per_element = 2 + LAYER_NORM_FLOPS - 2 + LAYER_NORM_BACKWARD_FLOPS - 2 + 3 + dropout
    return Cost(
        flops=tokens * hidden * per_element + tokens * LAYER_NORM_ROW_FLOPS,
        min_bytes=(tokens + entries + table_entries + 3) * hidden * dtype.itemsize
        + tokens * ids * 8
        + (8 if dropout else 0),
    )


def pool(
    lengths: Sequence[int], hidden: int, dtype: torch.dtype, *, how: str, normalise: bool = False, norm: bool = False
) -> Cost:
    """One float32 row a sequence of these lengths: its first row ("cls"), the mean ("mean"), or the maximum ("max").

    Args:
        normalise: whether each is divided by its norm.
        norm: whether the norms, float32, are written.
    """
    batch = len(lengths)
    rows = sum(length > 0 for length in lengths) if how == "cls" else sum(lengths)
    # A row: none to copy, else one. A result: a division for a mean; for the norm 2, a root a row, and a division.
    per_row, per_result = how != "cls", (how == "mean") + 3 * normalise
    return Cost(
        flops=rows * hidden * per_row + batch * (hidden * per_result + normalise),
        min_bytes=rows * hidden * dtype.itemsize + batch * hidden * 4 + (batch + 1) * 4 + (batch * 4 if norm else 0),
    )


def pool_backward(
    lengths: Sequence[int], hidden: int, dtype: torch.dtype, *, how: str, normalise: bool = False
) -> Cost:
    """Gradient of the rows, from that of the result; and from the rows for "max", the result where it is normalised."""
    batch, tokens = len(lengths), sum(lengths)
    # An element of a maximum: 1 to find it, 2 to count it, 1 to look for it. A result: a division for mean and max; for
    # the norm 2 for the slope, 2 to take it off, and a division.
    per_element, per_result = 4 * (how == "max"), (how != "cls") + 5 * normalise
    states, results = 1 + (how == "max"), 1 + normalise
    return Cost(
        flops=tokens * hidden * per_element + batch * hidden * per_result,
        min_bytes=tokens * hidden * states * dtype.itemsize
        + batch * hidden * results * 4
        + (batch + 1) * 4
        + (batch * 4 if normalise else 0),
    )


def attention(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    bias_elements: int = 0,
    dropout: bool = False,
    lse: bool = False,
) -> Cost:
    """softmax(scale * Q K^T + bias) V inside sequences of these lengths.

    Args:
        bias_elements: elements of the bias, by places or by distances, as it is stored, in `dtype`; 0 for none.
        lse: whether it is written, float32.
    """
    tokens = sum(lengths)
    scores = heads * sum(length * length for length in lengths)
    # A score: 2 for each of the two products' head_dim, scale and shift, maximum, exp, sum.
    per_score = 4 * head_dim + 5 + (bias_elements > 0) + dropout
    return Cost(
        flops=scores * per_score + tokens * heads * (head_dim + 1),
        min_bytes=tokens * heads * head_dim * 4 * dtype.itemsize
        + (len(lengths) + 1) * 4
        + bias_elements * dtype.itemsize
        + (tokens * heads * 4 if lse else 0)
        + (8 if dropout else 0),
    )


def attention_backward(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    bias_elements: int = 0,
    dropout: bool = False,
) -> Cost:
    """Gradients of qkv and the bias, from qkv, the bias, the output, its gradient and lse.

    Args:
        bias_elements: as in `attention`; the gradient of each is written in float32.
    """
    tokens = sum(lengths)
    scores = heads * sum(length * length for length in lengths)
    # A score: 2 for each of the five products' head_dim, scale and shift, exp, less delta, by the weight, scale.
    per_score = 10 * head_dim + 6 + 2 * (bias_elements > 0) + 2 * dropout
    return Cost(
        flops=scores * per_score + tokens * heads * 2 * head_dim,
        min_bytes=tokens * heads * head_dim * 8 * dtype.itemsize
        + (len(lengths) + 1) * 4
        + tokens * heads * 4
        + bias_elements * (dtype.itemsize + 4)
        + (8 if dropout else 0),
    )


def rotary(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> Cost:
    """Queries and keys of `[rows, 3, heads, head_dim]` turned, values copied; cosines and sines are float32."""
    # An element of a query or key: two products and their sum.
    return Cost(
        flops=rows * 2 * heads * head_dim * 3,
        min_bytes=rows * (2 * 3 * heads * head_dim * dtype.itemsize + head_dim * 4),
    )


def linear(rows: int, columns: int, out: int, dtype: torch.dtype) -> Cost:
    """`[rows, columns] x [columns, out]`; a bias is counted with the op that adds it."""
    return Cost(
        flops=2 * rows * columns * out, min_bytes=(rows * columns + columns * out + rows * out) * dtype.itemsize
    )


def linear_gelu(
    rows: int, columns: int, out: int, dtype: torch.dtype, *, bias: bool = True, product: bool = False
) -> Cost:
    """GELU(`[rows, columns] x [columns, out]` + bias); `product`: whether it is written too, for the backward."""
    multiplied, activated = linear(rows, columns, out, dtype), bias_gelu(rows, out, dtype, bias=bias)
    written = (rows * out * product - rows * out * 2) * dtype.itemsize
    return Cost(multiplied.flops + activated.flops, multiplied.min_bytes + activated.min_bytes + written)


def linear_backward(rows: int, columns: int, out: int, dtype: torch.dtype) -> Cost:
    """Gradients of the input and of the weight: two products, the output's gradient read once."""
    return Cost(
        flops=4 * rows * columns * out,
        min_bytes=(2 * rows * columns + 2 * columns * out + rows * out) * dtype.itemsize,
    )
