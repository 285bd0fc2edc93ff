"""Rivals' Triton kernels through the same tool as ours, for the same shapes, with their own launch settings.

Theirs are compiled from their packages, where these are installed:

    pip install --no-deps liger-kernel flash-linear-attention fla-core einops
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import cases
import main_loop
import torch
from offline import Launch, offline

from fastbert.kernels.target import KNOWN, Target

HIDDEN, HEAD_DIM = 768, 64
DTYPE = torch.float16
PACKAGES = ("liger-kernel", "flash-linear-attention")

# (whose, what, the call, units of work of a launch in a trip of its main loop)
Contender = tuple[str, str, Callable[[], object], Callable[[Launch], int]]


def ours(target: Target, unit_of: Callable[[Launch], int]) -> Iterator[Contender]:
    """Our kernels for the rivals' calls."""
    compared = [
        cases.layer_norm(HIDDEN, DTYPE, store_stats=True),
        cases.layer_norm_gradient(HIDDEN, DTYPE),
        *cases.attention(HEAD_DIM, DTYPE, target, "ragged", store_lse=True),
        *cases.attention_gradient(HEAD_DIM, DTYPE, target, "ragged"),
    ]
    for case in compared:
        yield "fastbert", case.name, case.run, unit_of


def liger() -> Iterator[Contender]:
    """Liger's LayerNorm: no residual, no bias before it."""
    from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

    # Its backward gives each program rows / multiprocessors rows, and sees one multiprocessor on a CPU tensor: these 8
    # rows are what a program gets of 1001 on an H100.
    x, parameter, statistic = torch.empty(8, HIDDEN, dtype=DTYPE), torch.empty(HIDDEN, dtype=DTYPE), torch.empty(8)
    backward = partial(layer_norm_backward, x, x, parameter, parameter, statistic, statistic)
    yield "liger-kernel", "layer_norm", partial(layer_norm_forward, x, parameter, parameter, 1e-12), lambda _: HIDDEN
    yield "liger-kernel", "layer_norm backward", backward, lambda _: HIDDEN


def flash_linear_attention(target: Target) -> Iterator[Contender]:
    """Its softmax attention of packed sequences, which is causal: the main loop is that below the diagonal."""
    from fla.ops.attn import parallel
    from fla.utils.hardware import Backend

    rows, _ = cases.LENGTHS["ragged"]
    state, lse = torch.empty(1, rows, cases.HEADS, HEAD_DIM, dtype=DTYPE), torch.empty(1, rows, cases.HEADS)
    batch = {
        "cu_seqlens": torch.empty(cases.BATCH + 1, dtype=torch.int64),
        "chunk_indices": torch.empty(8, 2, dtype=torch.int64),
    }

    def on_target(call: Callable[..., object]) -> object:
        """It chooses tiles by the shared memory of the device at hand."""

        def has_shared_memory(arch: str, *_: Any) -> bool:
            return target.shared_memory >= Backend.get_shared_memory(arch)

        with patch.object(parallel, "check_shared_mem", has_shared_memory):
            return call(scale=HEAD_DIM**-0.5, **batch)

    forward = partial(parallel.parallel_attn_fwd, state, state, state, None, None)
    backward = partial(parallel.parallel_attn_bwd, state, state, state, state, None, lse, state)
    for name, call in (("attention", forward), ("attention backward", backward)):
        yield "flash-linear-attention", name, partial(on_target, call), _scores


def _scores(launch: Launch) -> int:
    constexprs = launch.constexprs
    return constexprs["BT"] * constexprs["BS"] if "BS" in constexprs else constexprs["V"]  # else a row of delta


def compare(arch: str, unit_of: Callable[[Launch], int]) -> dict[str, Any]:
    """Figures of our kernels and of each installed rival's, by "whose: what: kernel"."""
    target = KNOWN[arch]
    contenders = list(ours(target, unit_of))
    if "liger-kernel" in versions():
        contenders += liger()
    if "flash-linear-attention" in versions():
        contenders += flash_linear_attention(target)
    found: dict[str, Any] = {}
    with offline(target) as launches:
        for whose, what, run, unit in contenders:
            run()
            for launch in launches:
                found[f"{whose}: {what}: {launch.kernel}"] = main_loop.of_launch(launch, target, unit(launch))
            launches.clear()
    return found


def installed() -> bool:
    """Whether all of them are."""
    return versions().keys() == set(PACKAGES)


def versions() -> dict[str, str]:
    """Versions of the rivals that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
