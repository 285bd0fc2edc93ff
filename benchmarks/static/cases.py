"""What is compiled: calls of the launchers that reach every launch choice and every branch on a constexpr.

Nothing runs, so a tensor is only as large as its shape decides the code: Triton specialises on pointers and strides
that are multiples of 16, and on numbers that are 1 or multiples of 16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbert.kernels import attention_choices, precision
from fastbert.kernels.attention import attention_forward
from fastbert.kernels.attention_backward import attention_backward
from fastbert.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward, bias_gelu_quantize
from fastbert.kernels.embedding import embedding_backward, embedding_forward
from fastbert.kernels.layer_norm import layer_norm_backward, layer_norm_forward
from fastbert.kernels.linear_gelu import linear_gelu_forward
from fastbert.kernels.pooling import pool_backward, pool_forward
from fastbert.kernels.quantize_rows import quantize_rows
from fastbert.kernels.rotary import rotary_forward
from fastbert.kernels.target import Target
from fastbert.kernels.tile_table import tile_table

sys.path.append(str(Path(__file__).parent))
from machine_code import MATRIX

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 256)
WIDTHS = (100, 312, 384, 768, 1024, 4096, 8192)

HEADS = 12
BATCH = 4
WINDOW = 100
DROPOUT = 0.1
PADDED = 1200  # rows of a padded result
# rows and max_seqlen of BATCH sequences
LENGTHS = {"ragged": (1001, 300), "short": (150, 50), "aligned": (BATCH * 512, 512)}


@dataclass(frozen=True)
class Case:
    """A call of a launcher.

    Attributes:
        name: op, shape, dtype and options in words.
        run: the call.
        matrix: how the names begin of the instructions, one of which its matrix products must be; none where it has
            none, or they are of float32.
    """

    name: str
    run: Callable[[], object]
    matrix: tuple[str, ...] = ()


def main(target: Target) -> Iterator[Case]:
    """The shapes that BERT models spend their time in, in float16, and a few of them in float32."""
    for head_dim in (32, 64, 128):
        for lengths in LENGTHS:
            yield from attention(head_dim, torch.float16, target, lengths)
        yield from attention(head_dim, torch.float16, target, "ragged", store_lse=True)
    yield from attention(40, torch.float16, target, "ragged")  # its strides are multiples of 8 only
    yield from attention(64, torch.float16, target, "aligned", store_lse=True)
    yield from attention(64, torch.float32, target, "ragged")
    for option in ("bias", "relative", "alibi", "window", "dropout"):
        yield from attention(64, torch.float16, target, "ragged", **{option: True})
    for head_dim in (32, 64, 128):
        for lengths in ("ragged", "short"):
            yield from attention_gradient(head_dim, torch.float16, target, lengths)
    yield from attention_gradient(64, torch.float32, target, "ragged")
    for option in ("bias", "relative", "alibi", "window", "dropout"):
        yield from attention_gradient(64, torch.float16, target, "ragged", **{option: True})
    yield tiles(64)
    yield rotary(64, torch.float16)
    yield rotary(64, torch.float16, inverse=True)
    yield rotary(64, torch.float32)
    for width in (384, 768, 1024):
        yield layer_norm(width, torch.float16, residual=True, x_bias=True)
    yield layer_norm(768, torch.float16, residual=True, x_bias=True, dropout=True)
    yield layer_norm(768, torch.float16, residual=True, x_bias=True, unpack=True)
    yield layer_norm(768, torch.float32, residual=True, x_bias=True)
    yield embedding(768, torch.float16)
    for how in ("cls", "mean", "max"):
        yield pool(768, torch.float16, how)
    yield pool(768, torch.float16, "mean", normalise=True)
    yield bias_gelu(3072, torch.float16, "none")
    yield bias_gelu(3072, torch.float32, "none")
    yield bias_gelu(3072, torch.float16, "tanh")
    yield bias_gelu(1152, torch.float16, "none", bias=False, gated=True)
    yield linear_gelu(3072, 768, torch.float16, target)
    yield linear_gelu(3072, 768, torch.float16, target, store_product=True)
    for width in (384, 768, 1024):
        yield layer_norm_gradient(width, torch.float16, residual=True, x_bias=True)
    yield layer_norm_gradient(768, torch.float16, residual=True, x_bias=True, dropout=True)
    yield layer_norm_gradient(768, torch.float16, residual=True, x_bias=True, unpack=True)
    yield layer_norm_gradient(768, torch.float32, residual=True, x_bias=True)
    yield embedding_gradient(768, torch.float16)
    for how in ("cls", "mean", "max"):
        yield pool_gradient(768, torch.float16, how)
    yield pool_gradient(768, torch.float16, "mean", normalise=True)
    yield bias_gelu_gradient(3072, torch.float16, "none")
    yield bias_gelu_gradient(3072, torch.float32, "none")
    yield bias_gelu_gradient(3072, torch.float16, "tanh")
    yield bias_gelu_gradient(1152, torch.float16, "none", bias=False, gated=True)


def exhaustive(target: Target) -> Iterator[Case]:
    """Every launch choice and every branch, in every dtype."""
    every = {"bias", "relative", "alibi", "window", "dropout"}
    one = [{option} for option in sorted(every)]
    for block_m in (16, 32, 64, 128):
        yield tiles(block_m)
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for lengths in LENGTHS:
                yield from attention(head_dim, dtype, target, lengths)
                yield from attention(head_dim, dtype, target, lengths, store_lse=True)
            for options in (*one, every | {"store_lse"}):
                yield from attention(head_dim, dtype, target, "ragged", **dict.fromkeys(options, True))
            for lengths in LENGTHS:
                yield from attention_gradient(head_dim, dtype, target, lengths)
            for options in (*one, every):
                yield from attention_gradient(head_dim, dtype, target, "ragged", **dict.fromkeys(options, True))
            yield rotary(head_dim, dtype)
            yield rotary(head_dim, dtype, inverse=True)
        for width in WIDTHS:
            yield layer_norm(width, dtype)
            yield layer_norm(width, dtype, residual=True, x_bias=True)
            yield layer_norm(width, dtype, residual=True, x_bias=True, dropout=True, store_stats=True)
            yield layer_norm(width, dtype, residual=True, float_parameters=True)
            yield layer_norm(width, dtype, residual=True, x_bias=True, dropout=True, store_stats=True, unpack=True)
            yield embedding(width, dtype)
            yield embedding(width, dtype, token_types=False)
            yield embedding(width, dtype, dropout=True)
            yield layer_norm_gradient(width, dtype)
            yield layer_norm_gradient(width, dtype, dropout=True)
            yield layer_norm_gradient(width, dtype, residual=True, x_bias=True)
            yield layer_norm_gradient(width, dtype, residual=True, x_bias=True, dropout=True)
            yield layer_norm_gradient(width, dtype, residual=True, x_bias=True, float_parameters=True)
            yield layer_norm_gradient(width, dtype, residual=True, x_bias=True, dropout=True, unpack=True)
            yield embedding_gradient(width, dtype)
            yield embedding_gradient(width, dtype, token_types=False)
            yield embedding_gradient(width, dtype, dropout=True)
            yield embedding_gradient(width, dtype, token_types=False, dropout=True)
            for how in ("cls", "mean", "max"):
                for normalise in (False, True):
                    yield pool(width, dtype, how, normalise=normalise)
                    yield pool_gradient(width, dtype, how, normalise=normalise)
        for width in (100, 312, 1536, 3072, 4096):
            yield bias_gelu(width, dtype, "none")
            yield bias_gelu(width, dtype, "tanh")
            yield bias_gelu(width, dtype, "none", bias=False)
            yield bias_gelu(width, dtype, "none", gated=True)
            yield bias_gelu(width, dtype, "tanh", gated=True)
            yield bias_gelu_gradient(width, dtype, "none")
            yield bias_gelu_gradient(width, dtype, "tanh")
            yield bias_gelu_gradient(width, dtype, "none", bias=False)
            yield bias_gelu_gradient(width, dtype, "none", gated=True)
            yield bias_gelu_gradient(width, dtype, "tanh", gated=True)
        yield linear_gelu(3072, 768, dtype, target)
        yield linear_gelu(3072, 768, dtype, target, approximate="tanh", store_product=True)
        yield linear_gelu(112, 80, dtype, target, bias=False, store_product=True)
    if precision.fp8_unserved(torch.bfloat16, target) is None:
        for width in (384, 768, 1024, 1536, 3072, 4096):
            yield from quantized(width, torch.bfloat16)


def attention(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    lengths: str,
    *,
    bias: bool = False,
    relative: bool = False,
    alibi: bool = False,
    window: bool = False,
    dropout: bool = False,
    store_lse: bool = False,
) -> Iterator[Case]:
    """One case, or none where the kernel does not serve this shape on `target`."""
    if attention_choices.attention_unserved(head_dim, dtype, target, gradient=store_lse) is not None:
        return
    rows, max_seqlen = LENGTHS[lengths]
    run = partial(
        attention_forward,
        torch.empty(rows, 3, HEADS, head_dim, dtype=dtype),
        torch.empty(BATCH + 1, dtype=torch.int32),
        torch.empty(BATCH, 2, dtype=torch.int32),
        max_seqlen,
        store_lse=store_lse,
        **_attention_options(head_dim, dtype, max_seqlen, bias, relative, alibi, window, dropout),
    )
    options = {"bias": bias, "relative": relative, "alibi": alibi, "window": window, "dropout": dropout}
    name = _name(f"attention head_dim {head_dim} {lengths}", dtype, **options, lse=store_lse)
    yield Case(name, run, _matrix(dtype, target))


def attention_gradient(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    lengths: str,
    *,
    bias: bool = False,
    relative: bool = False,
    alibi: bool = False,
    window: bool = False,
    dropout: bool = False,
) -> Iterator[Case]:
    """The backward of `attention`, with the gradients of the biases where there are any."""
    if attention_choices.attention_unserved(head_dim, dtype, target, gradient=True) is not None:
        return
    rows, max_seqlen = LENGTHS[lengths]
    out = torch.empty(rows, HEADS, head_dim, dtype=dtype)
    run = partial(
        attention_backward,
        out,
        torch.empty(rows, 3, HEADS, head_dim, dtype=dtype),
        out,
        torch.empty(HEADS, rows),
        torch.empty(BATCH + 1, dtype=torch.int32),
        torch.empty(BATCH, 2, dtype=torch.int32),
        torch.empty(BATCH, 2, dtype=torch.int32),
        max_seqlen,
        tokens=rows,
        dbias_shape=(1, HEADS, max_seqlen, max_seqlen) if bias else None,
        needs_drelative=relative,
        **_attention_options(head_dim, dtype, max_seqlen, bias, relative, alibi, window, dropout),
    )
    name = f"attention backward head_dim {head_dim} {lengths}"
    matrix = _matrix(dtype, target)
    if head_dim == 256 and target.arch == "sm_90":  # the 64 rows of an HGMMA leave too few registers
        matrix += ("HMMA",)
    options = {"bias": bias, "relative": relative, "alibi": alibi, "window": window, "dropout": dropout}
    yield Case(_name(name, dtype, **options), run, matrix)


def _matrix(dtype: torch.dtype, target: Target) -> tuple[str, ...]:
    return () if dtype == torch.float32 else (MATRIX[target.arch],)


def _attention_options(
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen: int,
    bias: bool,
    relative: bool,
    alibi: bool,
    window: bool,
    dropout: bool,
) -> dict[str, Any]:
    """What forward and backward take alike; one bias for all sequences."""
    one_bias = torch.empty(1, HEADS, max_seqlen, max_seqlen, dtype=dtype)
    return {
        "scale": head_dim**-0.5,
        "bias": one_bias.expand(BATCH, -1, -1, -1) if bias else None,
        "relative": torch.empty(HEADS, 2 * max_seqlen - 1, dtype=dtype) if relative else None,
        "alibi_slopes": torch.empty(HEADS) if alibi else None,
        "window": WINDOW if window else None,
        "dropout": DROPOUT if dropout else 0.0,
        "seed": _seed() if dropout else None,
    }


def layer_norm(
    width: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    x_bias: bool = False,
    dropout: bool = False,
    store_stats: bool = False,
    float_parameters: bool = False,
    unpack: bool = False,
) -> Case:
    """LayerNorm of 1001 rows; `float_parameters` keeps its parameters in float32, as autocast does."""
    parameter = torch.empty(width, dtype=torch.float32 if float_parameters else dtype)
    run = partial(
        layer_norm_forward,
        torch.empty(1001, width, dtype=dtype),
        parameter,
        parameter,
        residual=torch.empty(1001, width, dtype=dtype) if residual else None,
        x_bias=parameter if x_bias else None,
        dropout=DROPOUT if dropout else 0.0,
        seed=_seed() if dropout else None,
        eps=1e-12,
        **({"out_rows": torch.arange(1001), "out_size": PADDED} if unpack else {}),
        store_stats=store_stats,
    )
    options = {
        "residual": residual,
        "bias": x_bias,
        "dropout": dropout,
        "statistics": store_stats,
        "float32 parameters": float_parameters,
        "unpack": unpack,
    }
    return Case(_name(f"layer_norm {width}", dtype, **options), run)


def embedding(width: int, dtype: torch.dtype, *, token_types: bool = True, dropout: bool = False) -> Case:
    """BERT's three tables and LayerNorm, for 1001 tokens."""
    ids = torch.arange(1001)
    run = partial(
        embedding_forward,
        ids,
        ids,
        ids if token_types else None,
        torch.empty(1001, width, dtype=dtype),
        torch.empty(512, width, dtype=dtype),
        torch.empty(2, width, dtype=dtype),
        torch.empty(width, dtype=dtype),
        torch.empty(width, dtype=dtype),
        dropout=DROPOUT if dropout else 0.0,
        seed=_seed() if dropout else None,
        eps=1e-12,
    )
    return Case(_name(f"embedding {width}", dtype, types=token_types, dropout=dropout), run)


def bias_gelu(width: int, dtype: torch.dtype, approximate: str, *, bias: bool = True, gated: bool = False) -> Case:
    """Bias and GELU of 1001 rows; `width` is that of the result."""
    columns = 2 * width if gated else width
    run = partial(
        bias_gelu_forward,
        torch.empty(1001, columns, dtype=dtype),
        torch.empty(columns, dtype=dtype) if bias else None,
        approximate=approximate,
        gated=gated,
    )
    return Case(_name(f"bias_gelu {width}", dtype, bias=bias, tanh=approximate == "tanh", gated=gated), run)


def linear_gelu(
    width: int,
    depth: int,
    dtype: torch.dtype,
    target: Target,
    *,
    approximate: str = "none",
    bias: bool = True,
    store_product: bool = False,
) -> Case:
    """Product, bias and GELU of 1001 rows."""
    run = partial(
        linear_gelu_forward,
        torch.empty(1001, depth, dtype=dtype),
        torch.empty(width, depth, dtype=dtype),
        torch.empty(width, dtype=dtype) if bias else None,
        approximate=approximate,
        store_product=store_product,
    )
    options = {"bias": bias, "tanh": approximate == "tanh", "product": store_product}
    return Case(_name(f"linear_gelu {width} from {depth}", dtype, **options), run, _matrix(dtype, target))


def quantized(width: int, dtype: torch.dtype) -> Iterator[Case]:
    """1001 rows to e4m3: by themselves, after GELU, and beside LayerNorm."""
    x, parameter = torch.empty(1001, width, dtype=dtype), torch.empty(width, dtype=dtype)
    yield Case(_name(f"quantize_rows {width}", dtype), partial(quantize_rows, x))
    for approximate in ("none", "tanh"):
        run = partial(bias_gelu_quantize, x, parameter, approximate=approximate)
        yield Case(_name(f"bias_gelu quantize {width}", dtype, tanh=approximate == "tanh"), run)
    rows = torch.empty(1001, width, dtype=torch.float8_e4m3fn), torch.empty(1001)
    options = {"residual": x, "x_bias": parameter, "eps": 1e-12, "quantized": rows}
    run = partial(layer_norm_forward, x, parameter, parameter, **options)
    yield Case(_name(f"layer_norm quantize {width}", dtype), run)


def layer_norm_gradient(
    width: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    x_bias: bool = False,
    dropout: bool = False,
    float_parameters: bool = False,
    unpack: bool = False,
) -> Case:
    """The backward of `layer_norm`."""
    x, statistic = torch.empty(1001, width, dtype=dtype), torch.empty(1001)
    dout = torch.empty(PADDED, width, dtype=dtype) if unpack else x
    parameter = torch.empty(width, dtype=torch.float32 if float_parameters else dtype)
    run = partial(
        layer_norm_backward,
        dout,
        x,
        parameter,
        statistic,
        statistic,
        residual=residual,
        x_bias=x_bias,
        dropout=DROPOUT if dropout else 0.0,
        seed=_seed() if dropout else None,
        out_rows=torch.arange(1001) if unpack else None,
    )
    options = {
        "residual": residual,
        "bias": x_bias,
        "dropout": dropout,
        "float32 parameters": float_parameters,
        "unpack": unpack,
    }
    return Case(_name(f"layer_norm backward {width}", dtype, **options), run)


def embedding_gradient(width: int, dtype: torch.dtype, *, token_types: bool = True, dropout: bool = False) -> Case:
    """The backward of `embedding`: the gradient of each token, and the sums for each table."""
    ids = torch.arange(1001)
    run = partial(
        embedding_backward,
        torch.empty(1001, width, dtype=dtype),
        ids,
        ids,
        ids if token_types else None,
        torch.empty(1001, width, dtype=dtype),
        torch.empty(512, width, dtype=dtype),
        torch.empty(2, width, dtype=dtype),
        torch.empty(width, dtype=dtype),
        dropout=DROPOUT if dropout else 0.0,
        seed=_seed() if dropout else None,
        eps=1e-12,
        padding_idx=0,
    )
    return Case(_name(f"embedding backward {width}", dtype, types=token_types, dropout=dropout), run)


def bias_gelu_gradient(
    width: int, dtype: torch.dtype, approximate: str, *, bias: bool = True, gated: bool = False
) -> Case:
    """The backward of `bias_gelu`."""
    columns = 2 * width if gated else width
    run = partial(
        bias_gelu_backward,
        torch.empty(1001, width, dtype=dtype),
        torch.empty(1001, columns, dtype=dtype),
        torch.empty(columns, dtype=dtype) if bias else None,
        approximate=approximate,
        gated=gated,
    )
    return Case(_name(f"bias_gelu backward {width}", dtype, bias=bias, tanh=approximate == "tanh", gated=gated), run)


def pool(width: int, dtype: torch.dtype, how: str, *, normalise: bool = False) -> Case:
    """Pooling as training runs it."""
    x, cu_seqlens = torch.empty(1001, width, dtype=dtype), torch.empty(BATCH + 1, dtype=torch.int32)
    run = partial(pool_forward, x, cu_seqlens, how=how, normalise=normalise, store_norm=True)
    return Case(_name(f"pool {how} {width}", dtype, normalise=normalise), run)


def tiles(block_m: int) -> Case:
    """The table of attention's tiles."""
    cu_seqlens = torch.empty(BATCH + 1, dtype=torch.int32)
    return Case(f"tile table {block_m}", partial(tile_table, cu_seqlens, 1001 // block_m + BATCH, block_m=block_m))


def rotary(head_dim: int, dtype: torch.dtype, *, inverse: bool = False) -> Case:
    """Heads turned; inverse is the backward."""
    qkv, angles = torch.empty(1001, 3, HEADS, head_dim, dtype=dtype), torch.empty(2, 1001, head_dim // 2)
    run = partial(rotary_forward, qkv, angles, inverse=inverse)
    return Case(_name(f"rotary head_dim {head_dim}", dtype, inverse=inverse), run)


def pool_gradient(width: int, dtype: torch.dtype, how: str, *, normalise: bool = False) -> Case:
    """The backward of `pool`."""
    x, cu_seqlens = torch.empty(1001, width, dtype=dtype), torch.empty(BATCH + 1, dtype=torch.int32)
    pooled, norm = torch.empty(BATCH, width), torch.empty(BATCH)
    saved = (pooled if normalise else None, norm, x if how == "max" else None, cu_seqlens)
    run = partial(pool_backward, pooled, *saved, rows=len(x), dtype=dtype, how=how, normalise=normalise)
    return Case(_name(f"pool backward {how} {width}", dtype, normalise=normalise), run)


def _seed() -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64)


def _name(call: str, dtype: torch.dtype, **options: bool) -> str:
    on = "".join(f" +{option}" for option, given in options.items() if given)
    return f"{call} {str(dtype).removeprefix('torch.')}{on}"
