"""What each op means, in plain torch, in the dtype it is given. The tests run these in fp64.

Nothing is fused, nothing is done in place, every function is differentiable by autograd. Formulas follow
Vaswani et al. 2017 (attention), Ba et al. 2016 (LayerNorm), Hendrycks & Gimpel 2016 (GELU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.packing import Packing

Approximate = Literal["none", "tanh"]
Pooling = Literal["cls", "mean", "max"]

# Philox-4x32's multipliers and the steps of its key, from Salmon et al. 2011, table 2 and their Random123 library.
PHILOX_ROUNDS = 7
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
FOLD_M = 0xD256D193  # Philox-2x32's multiplier, of the same table
LOW = 0xFFFFFFFF  # the low 32 bits


class Dropout(NamedTuple):
    """What `keep_mask` is a function of on a CPU: a 64-bit seed, and the probability of a drop, in (0, 1)."""

    seed: int
    probability: float


def attention(
    qkv: Tensor,
    packing: Packing,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention inside each sequence of a packed batch.

    Args:
        qkv: `[rows, 3, heads, head_dim]`, rows >= tokens.
        scale: factor on the scores; `head_dim ** -0.5` by default.
        bias: added to the scaled scores, broadcastable to `[batch, heads, max_seqlen, max_seqlen]`.
        relative: `[heads, 2 * places - 1]`, `places >= max_seqlen`: a bias of distances, spread by `relative_bias`.
        alibi_slopes: float32 `[heads]`; each times `|row - column|` is taken off its head's scores (Press et al. 2022,
            made symmetric).
        window: only keys with `|row - column| <= window` are seen.
        keep: bool `[batch, heads, max_seqlen, max_seqlen]`; weights where it is False are dropped.
        dropout: probability that `keep` was drawn with; the rest is scaled by `drop_scale(dropout)`.

    Returns:
        out `[rows, heads, head_dim]`, and lse `[heads, rows]`: log of the sum of exponentials of each row's scores.
        A row that may attend nothing, and a row of slack, gives out 0 and lse +inf (so exp(score - lse) is 0).
    """
    rows, _, heads, head_dim = qkv.shape
    batch, width, tokens = packing.batch, packing.max_seqlen, packing.tokens
    grid = packing.grid
    padded = qkv.new_zeros(batch * width, 3, heads, head_dim).index_copy(0, grid, qkv[:tokens])
    query, key, value = padded.view(batch, width, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias[..., :width, :width].to(scores.dtype)
    if relative is not None:
        scores = scores + relative_bias(relative, width).to(scores.dtype)
    column = torch.arange(width, device=qkv.device)
    distance = (column[:, None] - column).abs()
    if alibi_slopes is not None:
        exact = alibi_slopes.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores - (exact[:, None, None] * distance).to(scores.dtype)
    seen = (column < packing.lengths[:, None])[:, None, None, :]
    if window is not None:
        seen = seen & (distance <= window)
    scores = scores.masked_fill(~seen, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True) if width else scores.new_zeros(batch, heads, 0, 1)
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # a row that may attend nothing: 0, not NaN, everywhere
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    lse = (total.log() + largest).masked_fill(total == 0.0, math.inf)
    if keep is not None:
        weights = weights * keep * drop_scale(dropout)
    out = (weights @ value).transpose(1, 2).reshape(batch * width, heads, head_dim)
    out_rows = qkv.new_zeros(rows, heads, head_dim).index_copy(
        0, torch.arange(tokens, device=qkv.device), out.index_select(0, grid)
    )
    lse_flat = lse.squeeze(-1).transpose(0, 1).reshape(heads, batch * width)
    lse_rows = qkv.new_full((heads, rows), math.inf).index_copy(
        1, torch.arange(tokens, device=qkv.device), lse_flat.index_select(1, grid)
    )
    return out_rows, lse_rows


def relative_bias(relative: Tensor, width: int) -> Tensor:
    """`relative[h, places - 1 + column - row]`, `[heads, width, width]`, of `[heads, 2 * places - 1]`."""
    place = torch.arange(width, device=relative.device)
    return relative[:, relative.shape[1] // 2 + place - place[:, None]]


def disentangled_bias(
    qkv: Tensor,
    packing: Packing,
    position_key: Tensor | None,
    position_query: Tensor | None,
    index: Tensor,
    scale: float,
) -> Tensor:
    """`scale * (query[i] . position_key[index[i, j]] + key[j] . position_query[index[i, j]])` (He et al. 2021).

    Args:
        qkv: `[rows, 3, heads, head_dim]`, rows >= tokens.
        position_key, position_query: `[number, heads, head_dim]`; None for a term that is left out.
        index: int64 `[max_seqlen, max_seqlen]`.

    Returns:
        `[batch, heads, max_seqlen, max_seqlen]`, 0 where the row or the column of a term is no token.
    """
    batch, width, tokens = packing.batch, packing.max_seqlen, packing.tokens
    padded = qkv.new_zeros(batch * width, *qkv.shape[1:]).index_copy(0, packing.grid, qkv[:tokens])
    query, key, _ = padded.view(batch, width, *qkv.shape[1:]).unbind(2)
    bias = qkv.new_zeros(batch, qkv.shape[2], width, width)
    if position_key is not None:
        bias = bias + torch.einsum("bihd,ijhd->bhij", query, position_key[index]) * scale
    if position_query is not None:
        bias = bias + torch.einsum("bjhd,ijhd->bhij", key, position_query[index]) * scale
    return bias


def rotary_angles(packing: Packing, head_dim: int, base: float, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """`[2, tokens, head_dim / 2]`: cosine and sine of `scale * column * base ** (-2 i / head_dim)` (Su et al. 2021).

    Angles are made in float64, because those of far columns have no digits left in float32's product.
    """
    i = torch.arange(head_dim // 2, dtype=torch.float64, device=packing.indices.device)
    angles = packing.columns[:, None] * (scale * base ** (-2.0 * i / head_dim))
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotary(qkv: Tensor, angles: Tensor) -> Tensor:
    """Queries and keys `[tokens, heads, head_dim]` of `[rows, 3, heads, head_dim]` turned by `rotary_angles`.

    Columns `i` and `i + head_dim / 2` turn together, in the dtype of the angles.
    """
    tokens = angles.shape[1]
    cos, sin = angles[:, :, None, None]  # [tokens, 1, 1, head_dim / 2]
    one, other = qkv[:tokens, :2].to(angles.dtype).chunk(2, -1)
    turned = torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(qkv.dtype)
    return torch.cat([torch.cat([turned, qkv[:tokens, 2:]], 1), qkv[tokens:]])


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    eps: float,
) -> Tensor:
    """LN(residual + dropout(x + x_bias)) over the last dimension of `[rows, hidden]`; variance in two passes."""
    total = x if x_bias is None else x + x_bias
    if keep is not None:
        total = total * keep * drop_scale(dropout)
    if residual is not None:
        total = residual + total
    centred = total - total.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # else the mean's rounding is all there is of a constant row
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd * weight + bias


def bias_gelu(x: Tensor, bias: Tensor | None, *, approximate: Approximate = "none", gated: bool = False) -> Tensor:
    """GELU(x + bias): `z * Phi(z)` exactly by erf, or its tanh approximation.

    Gated, the GELU of the first half of the columns times the second half (Shazeer 2020, "GLU variants improve
    transformer": GEGLU).
    """
    z = x if bias is None else x + bias
    if gated:
        z, gate = z.chunk(2, -1)
        return bias_gelu(z, None, approximate=approximate) * gate
    if approximate == "tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of float32 `[rows, width]` as float8_e4m3fn values and a float32 scale `[rows]`, about x together.

    The largest magnitude of a row becomes 448, the largest of e4m3; rounding is to nearest, ties to even.
    """
    largest = x.abs().amax(-1).clamp(min=1e-30)
    return (x * (448.0 / largest)[:, None]).to(torch.float8_e4m3fn), largest * (1.0 / 448.0)


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
    keep: Tensor | None = None,
    dropout: float = 0.0,
    eps: float,
) -> Tensor:
    """dropout(LN(word[id] + position[p] + token_type[t])); ids int64 `[tokens]`, no types means type 0."""
    type_row = token_type[0] if token_type_ids is None else token_type[token_type_ids]
    out = layer_norm(word[input_ids] + type_row + position[position_ids], weight, bias, eps=eps)
    return out if keep is None else out * keep * drop_scale(dropout)


def pool(x: Tensor, packing: Packing, how: Pooling, *, normalise: bool = False) -> Tensor:
    """One row a sequence, `[tokens, hidden]` -> `[batch, hidden]`: its first token, the mean, or the maximum.

    A zero-length sequence gives zeros. With `normalise` each is divided by its norm, or by 1e-12 if that is larger.
    """
    sequences = x[: packing.tokens].split(packing.lengths.tolist())
    reduce: dict[Pooling, Callable[[Tensor], Tensor]] = {
        "cls": lambda rows: rows[0],
        "mean": lambda rows: rows.mean(0),
        "max": lambda rows: rows.amax(0),
    }
    rows = [reduce[how](sequence) if len(sequence) else sequence.sum(0) for sequence in sequences]
    pooled = torch.stack(rows) if rows else x[:0]
    return pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12) if normalise else pooled


def keep_mask(
    seed: Tensor, row: Tensor, column: Tensor, dropout: float, *, head: Tensor | int = 0, sequence: Tensor | int = 0
) -> Tensor:
    """Which elements dropout keeps: bool, a pure function of (seed, sequence, head, row, column).

    Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), key the 64-bit
    seed, counter `(0, 0, head, sequence)`, gives four words; `_fold` makes of them two words of the row, and of those a
    word for each pair of columns. Its low half is the draw of the even column, its high half that of the odd one; an
    element is kept where its draw is at least `drop_threshold(dropout)`. docs/numerics.md says why.

    Args:
        seed: int64, one element.
        row, column, head, sequence: int64 tensors (or ints) that broadcast together.
    """
    x, key = row_words(seed, row, _beside(seed, head), _beside(seed, sequence))
    word = _fold(x ^ (column // 2), key)
    return ((word >> (column % 2 * 16)) & 0xFFFF) >= drop_threshold(dropout)


def _beside(seed: Tensor, number: Tensor | int) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.int64, device=seed.device)


def keep_pairs(
    seed: Tensor, row: Tensor, pair: Tensor, dropout: float, *, head: Tensor | int = 0, sequence: Tensor | int = 0
) -> Tensor:
    """`keep_mask` of the columns `2 * pair` and `2 * pair + 1`, which share a word: bool, `[2]` more at the end."""
    x, key = row_words(seed, row, _beside(seed, head), _beside(seed, sequence))
    draws = _fold(x ^ pair, key)[..., None].to(torch.int32).view(torch.int16)
    shifted = draws.bitwise_xor_(-(2**15))  # torch compares no unsigned integers; this keeps their order
    return shifted >= drop_threshold(dropout) - 2**15


def hidden_keep_mask(seed: Tensor, rows: int, hidden: int, dropout: float) -> Tensor:
    """bool `[rows, hidden]`: the elements that dropout keeps of a hidden state."""
    row = torch.arange(rows, device=seed.device)[:, None]
    pair = torch.arange(-(-hidden // 2), device=seed.device)
    return keep_pairs(seed, row, pair, dropout).flatten(1)[:, :hidden]


def attention_keep_mask(seed: Tensor, batch: int, heads: int, seqlen: int, dropout: float) -> Tensor:
    """bool `[batch, heads, seqlen, seqlen]`: the attention weights that dropout keeps."""
    position = torch.arange(seqlen, device=seed.device)[:, None]
    pair = torch.arange(-(-seqlen // 2), device=seed.device)
    sequence = torch.arange(batch, device=seed.device)[:, None, None, None]
    head = torch.arange(heads, device=seed.device)[:, None, None]
    return keep_pairs(seed, position, pair, dropout, head=head, sequence=sequence).flatten(-2)[..., :seqlen]


def row_words(seed: Tensor, row: Tensor, head: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The two words, int64 below 2^32, that one row of one head of one sequence draws from; see `keep_mask`."""
    zero = torch.zeros_like(seed.view(()))
    word0, word1, word2, word3 = _philox(seed.view(()), zero, zero, head, sequence)
    return _fold(row ^ word0, word1), _fold(row ^ word2, word3)


def _fold(x: Tensor, key: Tensor) -> Tensor:
    """A hash of 32-bit `x` under a key: twice the product with a constant, its high half xored to its low."""
    product = x * FOLD_M  # wrapping int64 keeps all 64 bits of the product
    product = (((product >> 32) ^ product) & LOW ^ key) * FOLD_M
    return ((product >> 32) ^ product) & LOW


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-7 in int64 arithmetic."""
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1  # wrapping int64 keeps all 64 bits of the product
        c0, c1, c2, c3 = (
            ((product1 >> 32) & LOW) ^ c1 ^ k0,
            product1 & LOW,
            ((product0 >> 32) & LOW) ^ c3 ^ k1,
            product0 & LOW,
        )
        k0, k1 = (k0 + PHILOX_W0) & LOW, (k1 + PHILOX_W1) & LOW
    return c0, c1, c2, c3
