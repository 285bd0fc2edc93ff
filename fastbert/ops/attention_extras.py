"""What attention may be asked for besides: a bias, one of distances, ALiBi's slopes, a window, dropout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.errors import ArgumentError
from fastbert.ops.common import check_dropout
from fastbert.packing import Packing, check_dense


class Extras(NamedTuple):
    """Each as `attention` takes it; by default none of them."""

    bias: Tensor | None = None
    relative: Tensor | None = None
    alibi_slopes: Tensor | None = None
    window: int | None = None
    dropout: float = 0.0
    seed: Tensor | None = None

    def wanted(self) -> bool:
        """Whether there is any."""
        *values, dropout, _ = self
        return dropout > 0.0 or any(value is not None for value in values)

    def check(self, qkv: Tensor, packing: Packing) -> None:
        """Raise ArgumentError unless they fit `[rows, 3, heads, head_dim]` of this packing."""
        if self.bias is not None:
            _check_bias(self.bias, qkv, packing)
        if self.relative is not None:
            _check_relative(self.relative, qkv, packing)
        if self.alibi_slopes is not None:
            _check_slopes(self.alibi_slopes, qkv)
        if self.window is not None and self.window < 0:
            raise ArgumentError("window", self.window, "zero or more places to each side")
        check_dropout(self.dropout, self.seed, qkv)


def _check_bias(bias: Tensor, qkv: Tensor, packing: Packing) -> None:
    check_dense("bias", bias)
    full = (packing.batch, qkv.shape[2], packing.max_seqlen, packing.max_seqlen)
    fits = bias.dim() == 4 and all(b in (1, n) for b, n in zip(bias.shape, full, strict=True))
    if not fits or not bias.is_floating_point():
        raise ArgumentError(
            "bias", f"{bias.dtype} of shape {tuple(bias.shape)}", f"a floating tensor broadcastable to {full}"
        )
    if bias.device != qkv.device:
        raise ArgumentError("bias", f"on {bias.device}", f"on {qkv.device}, the device of qkv")


def _check_relative(relative: Tensor, qkv: Tensor, packing: Packing) -> None:
    check_dense("relative", relative)
    heads, longest = qkv.shape[2], packing.max_seqlen
    fits = relative.dim() == 2 and relative.shape[0] == heads and relative.shape[1] % 2 == 1
    if not fits or relative.shape[1] < 2 * longest - 1 or not relative.is_floating_point():
        got = f"{relative.dtype} of shape {tuple(relative.shape)}"
        wanted = f"a floating ({heads}, 2 * places - 1) tensor, places >= {longest}, the longest sequence"
        raise ArgumentError("relative", got, wanted)
    if relative.device != qkv.device:
        raise ArgumentError("relative", f"on {relative.device}", f"on {qkv.device}, the device of qkv")


def _check_slopes(alibi_slopes: Tensor, qkv: Tensor) -> None:
    if alibi_slopes.dtype != torch.float32 or alibi_slopes.shape != qkv.shape[2:3]:
        got = f"{alibi_slopes.dtype} of shape {tuple(alibi_slopes.shape)}"
        raise ArgumentError("alibi_slopes", got, f"float32 of shape ({qkv.shape[2]},), one of each head")
    if alibi_slopes.device != qkv.device:
        raise ArgumentError("alibi_slopes", f"on {alibi_slopes.device}", f"on {qkv.device}, the device of qkv")
    if alibi_slopes.requires_grad:
        raise ArgumentError("alibi_slopes", "a tensor that requires a gradient", "one without: pass it detached")
