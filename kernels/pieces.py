"""Arithmetic on tiles already loaded: GELU, LayerNorm, their gradients, the dropout mask. No loads or stores."""

from __future__ import annotations

import triton
import triton.language as tl


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
def gelu_erf_gradient(z):
    """Phi(z) + z phi(z), the derivative of z * Phi(z), for float32 results."""
    a = tl.minimum(tl.abs(z), 100.0, propagate_nan=tl.PropagateNan.ALL)  # as in gelu_erf_half, but NaN stays
    bell = tl.exp2(a * a * -0.7213475204444817)
    falling = 0.5 * (1.0 - tl.erf(a * 0.7071067811865476)) - a * 0.3989422804014327 * bell  # 1 / sqrt(2 pi)
    return tl.where(z < 0.0, falling, 1.0 - falling)


@triton.jit
def gelu_erf_half_gradient(z):
    """As gelu_erf_gradient, for float16 and bfloat16 results: Phi and phi share the one exp2 of `lower_tail`."""
    a = tl.minimum(tl.abs(z), 100.0, propagate_nan=tl.PropagateNan.ALL)
    tail, bell = lower_tail(a)
    falling = tl.fma(a * -0.3989422804014327, bell, tail)
    return tl.where(z < 0.0, falling, 1.0 - falling)


@triton.jit
def gelu_tanh_gradient(z):
    """The derivative of gelu_tanh; z is float32.

    With s the sigmoid and u its argument it is s + z s (1 - s) u'. Here it is taken at -|z|, where 1 - s needs no
    subtraction, and mirrored.
    """
    a = tl.minimum(tl.abs(z), 100.0, propagate_nan=tl.PropagateNan.ALL)
    square = a * a
    tail = tl.exp2(a * tl.fma(square, -0.10294324, -2.3022082))  # at most 1
    sigmoid = 1.0 / (1.0 + tail)
    slope = tl.fma(square, 0.214064449, 1.5957691)  # u': 2 sqrt(2 / pi), times 3 * 0.044715 and 1
    falling = tail * sigmoid * tl.fma(-a * slope, sigmoid, 1.0)
    return tl.where(z < 0.0, falling, 1.0 - falling)


@triton.jit
def moments(x, mask, WIDTH: tl.constexpr):
    """Mean, centred values and variance of each row of `x`, float32 `[ROWS, BLOCK]`, over the WIDTH columns in `mask`.

    In two passes: the mean of squares less the square of the mean cancels where the mean is large. Columns outside
    the mask must be 0 in `x` and are 0 in the centred values.
    """
    mean = tl.sum(x, 1) * (1.0 / WIDTH)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1.0 / WIDTH)
    return mean, centred, variance


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
def normalise_gradient(dout, normal, weight, rstd, WIDTH: tl.constexpr):
    """Gradient of what `normalise` was given, float32 `[ROWS, BLOCK]`.

    `normal` is (x - mean) * rstd, `weight` `[BLOCK]`, `rstd` `[ROWS]`. Columns beyond WIDTH must be 0 in `dout`; of the
    result they are garbage.
    """
    dnormal = dout * weight[None, :]
    mean = tl.sum(dnormal, 1) * (1.0 / WIDTH)
    slope = tl.sum(dnormal * normal, 1) * (1.0 / WIDTH)
    rest = tl.fma(normal, tl.broadcast_to(slope[:, None], normal.shape), mean[:, None])
    return (dnormal - rest) * rstd[:, None]  # folding rstd into both saves an operation and costs 20 registers


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

    One Philox call draws for eight neighbouring columns, addressed by (row, column // 8, head, sequence) and never by
    the tile, so that any other tiling finds the same bits.

    Args:
        seed: int64 scalar, the key.
        rows: int32 `[ROWS]`.
        first_column: int32 scalar, a multiple of 8; the tile's columns are the BLOCK (also a multiple) from there.
        head, sequence: int32 scalars; 0 for a hidden state.
        drop_threshold: 16-bit draws below this are dropped.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK // 8)
    head = tl.cast(head, tl.int32)
    sequence = tl.cast(sequence, tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, rows[:, None], groups[None, :], head, sequence, n_rounds=7)
    # Joined as pairs of pairs, the last dimensions read word 0, 1, 2, 3; then each word's low half before its high.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [ROWS, BLOCK // 8, 2, 2]
    threshold = tl.cast(drop_threshold, tl.uint32)
    keep_low = (words & 0xFFFF) >= threshold
    keep_high = (words >> 16) >= threshold
    return tl.reshape(tl.join(keep_low, keep_high), [rows.shape[0], BLOCK])
