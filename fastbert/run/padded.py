"""Attention on a padded grid in plain operations, which `torch.export` records for batches of any size.

All else of a layer looks at one row at a time, and is recorded as `run.eager` computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.relative import buckets_of
from fastbert.ops.rotary import angles_of_places
from fastbert.packing import Packing
from fastbert.run.steps import Attend, Convolve, Layers, Parts


def unserved(layers: Layers) -> str | None:
    """Which step of these layers can't be recorded; None: all can."""
    steps = [step for of_layer, _ in layers for step in of_layer.of]
    if any(isinstance(step, Convolve) for step in steps):
        return "a convolution"
    if any(isinstance(step, Attend) and step.disentangled is not None for step in steps):
        return "disentangled attention"
    return None


def whole_grid(batch: int, seqlen: int, device: torch.device) -> Packing:
    """The packing of all places of a grid, padding among them; the sizes may be symbols."""
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
    return Packing.made_right(ends, seqlen, torch.arange(batch * seqlen, device=device), (batch, seqlen))


@dataclass(frozen=True, eq=False)
class Grid:
    """What attention needs to know of a grid.

    Attributes:
        is_token: bool `[batch, seqlen]`.
        angles: cosines and sines float32 `[2, places, head_dim / 2]`, by base and scale; see `angles_of`.
    """

    is_token: Tensor
    angles: dict[tuple[float, float], Tensor]

    def attend(self, step: Attend, parts: Parts, qkv: Tensor, packing: Packing, *_: object) -> Tensor:
        """`[batch * seqlen, 3 * heads * head_dim]` -> `[batch * seqlen, heads * head_dim]`."""
        batch, seqlen = self.is_token.shape
        query, key, value = qkv.view(batch, seqlen, 3, step.heads, -1).permute(2, 0, 3, 1, 4)
        if step.rotary is not None:
            angles = self.angles[step.rotary, step.rotary_scale][:, :seqlen].to(qkv.dtype)
            query, key = _turned(query, angles), _turned(key, angles)
        column = torch.arange(seqlen, dtype=torch.int64, device=qkv.device)
        distance = column - column[:, None]
        seen = self.is_token[:, None, None, :]
        if step.window is not None:
            seen = seen & (distance.abs() <= step.window)
        bias = torch.where(seen, 0.0, torch.finfo(qkv.dtype).min).to(qkv.dtype)
        if (slopes := step.slopes(qkv.device)) is not None:
            bias = bias - (slopes[:, None, None] * distance.abs()).to(qkv.dtype)
        if step.relative is not None:
            weight = cast("Tensor", parts[step.relative]._parameters["weight"])
            bias = bias + F.embedding(buckets_of(distance, len(weight)), weight).permute(2, 0, 1).to(qkv.dtype)
        scale = step.scale(query.shape[-1])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return out.transpose(1, 2).reshape(batch * seqlen, -1)


def angles_of(layers: Layers, places: int, head_dim: int) -> dict[tuple[float, float], Tensor]:
    """Cosines and sines by base and scale of the rotary positions in these layers."""
    asked = {(step.rotary, step.rotary_scale) for step in _attends(layers) if step.rotary is not None}
    return {one: angles_of_places(places, head_dim, *one)[:places].transpose(0, 1).contiguous() for one in asked}


def _attends(layers: Layers) -> Iterable[Attend]:
    return (step for steps, _ in layers for step in steps.of if isinstance(step, Attend))


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    half, cos, sin = x.shape[-1] // 2, angles[0], angles[1]
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)
