"""How a probability of dropout is rounded, which kernels and `fastbert.reference` have in common."""

from __future__ import annotations

import functools


@functools.cache
def drop_threshold(dropout: float) -> int:
    """Draws of 0..65535 below this are dropped: `dropout` rounded to a multiple of 2^-16 below 1."""
    return min(round(dropout * 65536), 65535)


@functools.cache
def drop_scale(dropout: float) -> float:
    """What the kept elements are multiplied by, so that the expectation is unchanged."""
    return 65536 / (65536 - drop_threshold(dropout))
