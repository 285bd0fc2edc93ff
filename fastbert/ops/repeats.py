"""Calls of one kind, in inference through the kernels: checked, decided and prepared once.

What the host does for a layer takes longer than what a GPU does for one of a small batch, and nearly all of it depends
on widths and dtypes alone. Of the number of rows only its kind counts, so that batches of ever new sizes are of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.kernels import launch, target
from fastbert.native.memory import is_plain
from fastbert.ops.common import observed, wants_gradient
from fastbert.packing import Packing

Run = Callable[..., Any]

MOST = 4096  # kinds kept

_kept: dict[tuple[Hashable, ...], Run] = {}


def prepared(
    options: tuple[Hashable, ...],
    states: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    prepare: Callable[[], Run | None],
) -> Run | None:
    """What does the work for tensors of this kind, made by `prepare` for the first of them; None: go the long way.

    That is the way of autograd, autocast, what looks on, and tensors that a kernel would copy first. Ask only where
    `backend.decide` says Triton.

    Args:
        options: what is to be done, and all else that it depends on.
        states: tensors that it reads, of any number of rows; what depends on that number is in `options`.
        parameters: the other tensors that it reads. Of one kind are those of the same shapes, dtypes and devices.
        prepare: gives None, or raises, where the kernels can't serve the call.
    """
    tensors = *states, *parameters
    if wants_gradient(*tensors) or observed() or torch._C._is_any_autocast_enabled():
        return None
    kinds = [(x.dtype, x.device, _as_it_lies(x)) for x in tensors]
    shapes = [*(x.shape[1:] for x in states), *(x.shape for x in parameters)]
    asked = tensors[0].dtype == torch.float32 and target.float32_asked()  # which the kernels' code depends on
    key = options, target.of(tensors[0].device), asked, *kinds, *shapes
    run = _kept.get(key)
    if run is None and all(as_it_lies for _, _, as_it_lies in kinds) and (run := prepare()) is not None:
        if len(_kept) >= MOST:
            _kept.clear()
        _kept[key] = run
    return run


def batch_kind(x: Tensor, packing: Packing, config: EncoderConfig) -> tuple[Hashable, ...]:
    """What a prepared layer depends on of the sizes of a batch: `x` are its packed states, `[rows, hidden]`."""
    rows, widest = len(x), max(3 * config.hidden_size, config.intermediate_size)
    return (
        rows_kind(rows, widest * x.element_size()),
        launch.attention_regime(packing.max_seqlen, rows=rows, batch=packing.batch),
        rows < packing.tokens,  # which is an error, each time
    )


def rows_kind(rows: int, row_bytes: int) -> Hashable:
    """What prepared launches depend on of a number of rows, those of the widest tensor of so many bytes each.

    Beyond 2 GiB each number is a kind by itself: AMD's code knows whether a tensor's offsets fit 32 bits.
    """
    return launch.number_kind(rows) if rows * row_bytes < 1 << 31 else rows


def _as_it_lies(x: Tensor) -> bool:
    """Whether kernels take a tensor as it is: an ordinary one, contiguous, in 16-byte pieces."""
    return is_plain(x) and x.is_contiguous() and x.data_ptr() % 16 == 0
