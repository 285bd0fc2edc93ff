"""What the rivals of several ops share: whether they are installed and can run here."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from contest import Case, UnservedError
from torch import Tensor
from workloads import VOCABULARY, Workload

from fastbert.packing import Packing

F = TypeVar("F", bound=Callable[..., Any])


def installed(module: str) -> ModuleType:
    """Import it.

    Raises:
        UnservedError: it is not installed, or not beside the versions of what it needs that are here.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UnservedError(f"{module.partition('.')[0]} is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnservedError(f"{module} can't be imported: {error}") from error


def on_gpu(case: Case) -> None:
    """Raise UnservedError unless the case runs on a GPU."""
    if case.device.type != "cuda":
        raise UnservedError("it needs a GPU")


def compiled(function: F, *, dynamic: bool = False) -> F:
    """`torch.compile(function)` for one set of shapes, or for any of them.

    Raises:
        UnservedError: there is no C++ compiler, which its CPU code needs.
    """
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise UnservedError("torch.compile needs a C++ compiler, and there is none on PATH")
    torch.compiler.reset()  # what it compiled for other cases counts against its limit of recompilations
    return torch.compile(function, dynamic=dynamic)


def fresh(packing: Packing) -> Packing:
    """The layout as a user's next batch brings it: without the table of tiles and all else that a call leaves in it."""
    return Packing.made_right(packing.cu_seqlens, packing.max_seqlen, packing.indices, packing.padded_shape)


def random_ids(workload: Workload, device: torch.device) -> Tensor:
    """Words of a batch, int64 `[tokens]`, a few of them far more often than others, as in text."""
    drawn = torch.rand(workload.tokens, device=device)
    return 1000 + (drawn**4 * (VOCABULARY - 1000)).long()
