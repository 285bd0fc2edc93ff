"""relative: a bias of attention's scores for each distance of two tokens, in buckets (Raffel et al. 2020, "T5")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbert.errors import ArgumentError
from fastbert.packing import Packing, check_dense

FARTHEST = 128  # the distance from which on all share a bucket, in T5 and MPNet


def relative_table(weight: Tensor, packing: Packing) -> Tensor:
    """What attention adds to its scores for each distance, as its argument `relative`.

    Half of the buckets are for tokens that come before, half for those after. Of each half the first half is for one
    distance each, the rest for distances that grow by a factor, up to `FARTHEST`.

    Args:
        weight: floating `[buckets, heads]`, an even number of buckets.
        packing: whose `max_seqlen` is the number of places.

    Returns:
        `[heads, 2 * max_seqlen - 1]` in the dtype of `weight`, of one token where there are none; entry
        `max_seqlen - 1 + column - row`.

    Raises:
        ArgumentError: a shape or dtype is wrong.
    """
    check_dense("weight", weight)
    if weight.dim() != 2 or len(weight) % 4 or not len(weight) or not weight.is_floating_point():
        got = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ArgumentError("weight", got, "a floating [buckets, heads] tensor, of a multiple of 4 buckets")
    places, rows = max(packing.max_seqlen, 1), len(weight)
    numbers = packing.kept(("relative", rows), lambda: bucket_numbers(places, rows, weight.device))
    return weight.index_select(0, numbers).t().contiguous()


def bucket_numbers(places: int, buckets: int, device: torch.device) -> Tensor:
    """int64 `[2 * places - 1]`: the bucket of each distance from `1 - places` to `places - 1`."""
    return buckets_of(torch.arange(1 - places, places, dtype=torch.int64, device=device), buckets)


def buckets_of(distance: Tensor, buckets: int) -> Tensor:
    """int64, as `distance`: the bucket of each, of so many."""
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    grown = torch.log(far.clamp(min=1).float() / exact) / math.log(FARTHEST / exact) * (half - exact)
    rest = (exact + grown.long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(far < exact, far, rest)
