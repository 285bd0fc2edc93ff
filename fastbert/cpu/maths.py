"""Functions of vectors of float32 that no instruction computes, as a CPU kernel is written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastbert.config import Activation
from fastbert.cpu.code import Code
from fastbert.cpu.values import Value, fma, maximum, minimum, select
from fastbert.reference import Approximate

# float32 coefficients of 2^f, |f| <= 1/2, highest power first; see `exp2`.
EXP2 = (
    1.5353362e-4, 1.3398875e-3, 9.6184369e-3, 5.5503324e-2, 2.4022648e-1, 6.9314718e-1, 1.0,
)  # fmt: skip
COARSE_EXP2 = (9.5828136e-3, 5.5906340e-2, 2.4024099e-1, 6.9312420e-1, 1.0)
# What `gelu` takes as the error function: the last x, and coefficients of P and Q, highest power first.
ERF = (
    5.6568542,
    (4.3637447e-8, 1.2729737e-5, 3.5387947e-4, 9.4518285e-3, 6.9384917e-2, 7.9788444e-1),
    (1.1712682e-6, 7.6022981e-5, 1.9305641e-3, 2.9119228e-2, 2.5362668e-1, 1.0),
)
COARSE_ERF = (
    4.7376154,
    (6.4981757e-5, 7.6002233e-3, 5.5092874e-2, 7.9787514e-1),
    (1.1476721e-3, 2.3803378e-2, 2.3569676e-1, 1.0),
)


def activated(code: Code, x: Value, activation: Activation, coarse: bool = False) -> Value:
    """The activation of a vector; `coarse` as in `gelu`."""
    match activation:
        case "gelu":
            return gelu(code, x, coarse)
        case "gelu_tanh":
            inner = x * fma(x * x, 0.7978845608028654 * 0.044715, 0.7978845608028654)
            return x * sigmoid(code, inner * 2.0)
        case "relu":
            return select(x < 0.0, 0.0, x)  # NaN stays
        case "silu":
            return x * sigmoid(code, x)


def gelu(code: Code, x: Value, coarse: bool = False) -> Value:
    """x/2 (1 + erf(x / sqrt 2)), the error function to 3e-8 before rounding; if `coarse` to 3e-6, for bfloat16.

    erf(x / sqrt 2) is x P(x^2) / Q(x^2), fitted as `exp2` is, to a |x| past which it is 1 within that.
    """
    last, above, below = COARSE_ERF if coarse else ERF
    near = maximum(minimum(x, last), -last)
    square, half = near * near, x * 0.5
    product = half * near * polynomial(square, above)
    return fma(product, code.machine.vectors.reciprocal(polynomial(square, below)), half)


def gelu_slope(code: Code, x: Value, approximate: Approximate) -> Value:
    """The derivative of GELU: with erf Phi(x) + x phi(x), else that of the form with tanh."""
    if approximate == "tanh":
        doubled, cubed = 2.0 * 0.7978845608028654, 2.0 * 0.7978845608028654 * 0.044715
        within = maximum(minimum(x, 20.0), -20.0)  # past which it is 0 or 1
        square = within * within
        # 1 - gate would lose all its digits where the gate is almost 1: it is power * gate
        power = exp2(code, minimum(within * fma(square, cubed, doubled) * -1.4426950408889634, 126.0))
        gate = code.machine.vectors.reciprocal(power + 1.0)
        made = fma(within * gate * (power * gate), fma(square, 3.0 * cubed, doubled), gate)
        return fma(x, 0.0, made)  # NaN, which minimum and maximum pass over, stays
    last, above, below = ERF
    near = maximum(minimum(x, last), -last)
    square = near * near
    erf = near * polynomial(square, above) * code.machine.vectors.reciprocal(polynomial(square, below))
    within = maximum(minimum(x, 13.0), -13.0)  # past which phi is below what 2^x gives
    density = exp2(code, within * within * -0.7213475204444817) * 0.3989422804014327
    return fma(x, 0.0, fma(within, density, fma(erf, 0.5, 0.5)))  # as above


def sigmoid(code: Code, x: Value) -> Value:
    """1 / (1 + e^-x)."""
    power = exp2(code, minimum(x * -1.4426950408889634, 126.0))
    return code.machine.vectors.reciprocal(power + 1.0)


def exp2(code: Code, x: Value, coarse: bool = False) -> Value:
    """2^x to about an ulp, if `coarse` to 3e-6, for bfloat16; at most 2^-126 for anything lower, and NaN stays.

    x is at most 127. The polynomial, of degree 6 or 4, was fitted to 2^f, |f| <= 1/2, by least squares whose weights
    even out the relative error: it is 2e-9 or 3e-6 before rounding, and 0 where f is.
    """
    return code.machine.vectors.exp2(x, partial(polynomial, coefficients=COARSE_EXP2 if coarse else EXP2))


def polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """Coefficients from that of the highest power on."""
    total = x.like(coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma(total, x, coefficient)
    return total
