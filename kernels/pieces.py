"""Arithmetic on tiles already loaded: GELU, LayerNorm, their gradients, the dropout mask. No loads or stores."""

from __future__ import annotations

import triton
import triton.language as tl

FOLD_M: tl.constexpr = tl.constexpr(0xD256D193)


@triton.jit
def gelu_erf(z):
    """z * Phi(z) for float32 results: the library's erf, 28 instructions an element."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def lower_tail(a):
    """Phi(-a) and exp(-a^2 / 2) for float16 and bfloat16 results; a is float32, at least 0 and at most 100.

    Abramowitz & Stegun 7.1.26: a polynomial in t = 1 / (1 + 0.23164189 a) times the exponential, one exp2 in all.
    """
    root = tl.rsqrt(1.0 + 0.23164189 * a)  # t as a squared rsqrt: a division costs four times as much
    t = root * root
    # 7.1.26's coefficients halved, because Phi(-a) = erfc(a / sqrt 2) / 2
    poly = tl.fma(t, 0.5307027145, -0.7265760135)
    poly = tl.fma(t, poly, 0.7107068705)
    poly = tl.fma(t, poly, -0.142248368)
    poly = tl.fma(t, poly, 0.127414796)
    bell = tl.exp2(a * a * -0.7213475204444817)  # log2(e) / 2
    return poly * t * bell, bell


@triton.jit
def gelu_erf_half(z):
    """z * Phi(z) for float16 and bfloat16 results; z is float32.

    Over all half values the error against float64 is at most 3.3e-7 (the erf form in float32: 4.2e-7), which rounding
    hides. In the deep negative tail the relative error grows (1.6e-3 at -5, 1e-2 at -8, 3e-2 at -12), slower than that
    of 1 + erf, which is off by 4e-2 at -5 and 0 below -5.4.
    """
    a = tl.minimum(tl.abs(z), 100.0)  # the tail is 0 long before; an infinity would make it 0 * inf
    tail, _ = lower_tail(a)
    return tl.fma(-a, tail, tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def gelu_tanh(z):
    """The tanh approximation of GELU, as z * sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)) by one exp2; z is float32."""
    exponent = z * tl.fma(z * z, -0.10294324, -2.3022082)  # -2 sqrt(2 / pi) log2(e), times 0.044715 and 1
    return z / (1.0 + tl.exp2(exponent))


@triton.jit
def mirrored(z, a, tail, falling):
    """A GELU at z and its derivative there, from what it has at -|z|.

    `a` is |z|, `tail` the factor of z at -a, and `falling` the derivative at -a.
    """
    value = tl.fma(-a, tail, tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return value, tl.where(z < 0.0, falling, 1.0 - falling)


@triton.jit
def gelu_erf_and_gradient(z):
    """z * Phi(z) and its derivative, Phi(z) + z phi(z), for float32 results."""
    a = tl.minimum(tl.abs(z), 100.0, propagate_nan=tl.PropagateNan.ALL)  # as in gelu_erf_half, but NaN stays
    bell = tl.exp2(a * a * -0.7213475204444817)
    tail = 0.5 * (1.0 - tl.erf(a * 0.7071067811865476))
    return mirrored(z, a, tail, tail - a * 0.3989422804014327 * bell)  # 1 / sqrt(2 pi)


@triton.jit
def gelu_erf_half_and_gradient(z):
    """As gelu_erf_and_gradient, for float16 and bfloat16 results: Phi and phi share the one exp2 of `lower_tail`."""
    a = tl.minimum(tl.abs(z), 100.0, propagate_nan=tl.PropagateNan.ALL)
    tail, bell = lower_tail(a)
    return mirrored(z, a, tail, tl.fma(a * -0.3989422804014327, bell, tail))


@triton.jit
def gelu_tanh_and_gradient(z):
    """gelu_tanh and its derivative; z is float32.

    With s the sigmoid and u its argument it is s + z s (1 - s) u'. Here it is taken at -|z|, where 1 - s needs no
    subtraction, and mirrored.
    """
    a = tl.minimum(tl.abs(z), 100.0, propagate_nan=tl.PropagateNan.ALL)
    square = a * a
    tail = tl.exp2(a * tl.fma(square, -0.10294324, -2.3022082))  # at most 1
    sigmoid = 1.0 / (1.0 + tail)
    slope = tl.fma(square, 0.214064449, 1.5957691)  # u': 2 sqrt(2 / pi), times 3 * 0.044715 and 1
    return mirrored(z, a, tail * sigmoid, tail * sigmoid * tl.fma(-a * slope, sigmoid, 1.0))


@triton.jit
def share(total, WIDTH: tl.constexpr):
    """total / WIDTH, a float32, rounded to nearest: where the quotient is a float32, it is just that.

    The product with 1 / WIDTH is up to an ulp off, and a compiler may fuse it with a subtraction that follows; what a
    fused multiply-add gives, none does.
    """
    near = total * (1.0 / WIDTH)
    return tl.fma(tl.fma(near, -1.0 * WIDTH, total), 1.0 / WIDTH, near)


@triton.jit
def moments(x, mask, WIDTH: tl.constexpr):
    """Mean, centred values and variance of each row of `x`, float32 `[ROWS, BLOCK]`, over the WIDTH columns in `mask`.

    In two passes: the mean of squares less the square of the mean cancels where the mean is large. The mean is taken
    again of the centred values: the rounding of a row's sum, divided by the root of an eps of 1e-12, would be all
    there is of a row of one value. That row's centred values are a few of its ulps, all the same, so their sum and
    their mean are exact, and it becomes 0. Columns outside the mask must be 0 in `x` and are 0 in the centred values.
    """
    mean = share(tl.sum(x, 1), WIDTH)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rest = share(tl.sum(centred, 1), WIDTH)
    centred = tl.where(mask, centred - rest[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1.0 / WIDTH)
    # The second part is told only where values lie so near to their mean that it matters to them: a sum of half types
    # is nearly exact, and that of their differences is not.
    return tl.where(variance < mean * mean * 5.9604645e-8, mean + rest, mean), centred, variance


@triton.jit
def normalise(x, mask, weight, bias, eps, WIDTH: tl.constexpr):
    """LayerNorm of each row of `x`, float32 `[ROWS, BLOCK]` as in `moments`; weight and bias `[BLOCK]`.

    Returns the result, and the mean and reciprocal standard deviation of each row.
    """
    mean, centred, variance = moments(x, mask, WIDTH)
    rstd = tl.rsqrt(variance + eps)
    weight = tl.broadcast_to(weight[None, :], x.shape)
    bias = tl.broadcast_to(bias[None, :], x.shape)
    return tl.fma(centred * rstd[:, None], weight, bias), mean, rstd


@triton.jit
def normalise_gradient(dout, normal, mask, weight, rstd, WIDTH: tl.constexpr):
    """Gradient of what `normalise` was given, float32 `[ROWS, BLOCK]`, over the WIDTH columns in `mask`.

    `normal` is (x - mean) * rstd, `weight` `[BLOCK]`, `rstd` `[ROWS]`. The mean of the gradient is taken off twice, as
    in `moments`, and before the slope is summed: of an upstream gradient of one value nothing is left. Columns outside
    the mask must be 0 in `dout`; of the result they are garbage.
    """
    dnormal = dout * weight[None, :]
    mean = share(tl.sum(dnormal, 1), WIDTH)
    centred = tl.where(mask, dnormal - mean[:, None], 0.0)
    rest = share(tl.sum(centred, 1), WIDTH)
    slope = share(tl.sum(centred * normal, 1), WIDTH)
    return tl.fma(normal, -slope[:, None], centred - rest[:, None]) * rstd[:, None]


@triton.jit
def fold(x, key):
    """A hash of uint32 `x` under a uint32 key: twice the product with a constant, its high half xored to its low."""
    x = tl.umulhi(x, FOLD_M) ^ (x * FOLD_M) ^ key
    return tl.umulhi(x, FOLD_M) ^ (x * FOLD_M)


@triton.jit
def quantize(x):
    """Each row of float32 `[ROWS, BLOCK]` as e4m3 values and a scale, `[ROWS]`; their product is about `x`.

    The largest magnitude becomes 448, the largest of e4m3. The bits of `reference.quantize_rows`.
    """
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)  # a row of zeros stays one
    values = (x * tl.div_rn(448.0, largest)[:, None]).to(tl.float8e4nv)
    return values, largest * (1.0 / 448.0)


@triton.jit
def keep_mask(seed, rows, first_column, head, sequence, drop_threshold, BLOCK: tl.constexpr):
    """Which elements of a tile dropout keeps: bool `[len(rows), BLOCK]`, the bits of `reference.keep_mask`.

    Two neighbouring columns share a hash. Most layouts have both in one thread, where the compiler hashes once, and
    nothing moves between threads.

    Args:
        seed: int64 scalar.
        rows: int32 `[ROWS]`.
        first_column: int32 scalar, even; the tile's columns are the BLOCK from there.
        head, sequence: int32 scalars; 0 for a hidden state.
        drop_threshold: 16-bit draws below this are dropped.
    """
    zero = tl.cast(0, tl.int32)
    word0, word1, word2, word3 = tl.philox(
        seed, zero, zero, tl.cast(head, tl.int32), tl.cast(sequence, tl.int32), n_rounds=7
    )
    row = rows.to(tl.uint32)
    x, key = fold(row ^ word0, word1), fold(row ^ word2, word3)  # [ROWS]
    lane = tl.arange(0, BLOCK)[None, :]
    pair = (lane // 2 + first_column // 2).to(tl.uint32)
    word = fold(x[:, None] ^ pair, key[:, None])  # [ROWS, BLOCK]
    draw = tl.where(lane % 2 == 0, word << 16, word)  # in the high half
    return draw >= (tl.cast(drop_threshold, tl.uint32) << 16)


@triton.jit
def load_rows(ptrs, mask_rows, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile `[rows, BLOCK_D]` of a head: 0 in columns beyond HEAD_DIM and, if MASKED, in rows not in `mask_rows`."""
    mask_dims = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if MASKED and HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=mask_rows[:, None] & mask_dims, other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=mask_dims, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_relative(relative_ptr, rows, columns, seqlen):
    """What a bias of distances has for a tile; `relative_ptr` points at distance 0 of the head's line.

    `rows` and `columns` have a dimension of 1 each where the tile has the other. Those beyond the end get the value of
    the last place: that costs an operation a row, and a mask of the tile one a score.
    """
    last = seqlen - 1
    return tl.load(relative_ptr - tl.minimum(rows, last) + tl.minimum(columns, last))
