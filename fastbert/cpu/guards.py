"""What `FASTBERT_CHECK=1` turns on, before fastbert is imported: our memory is watched, at several times the cost.

Each piece that `memory.room` makes lies between two guards, which are looked at after each run of a `Program`; and it
is full of NaN, or of bytes 0xFF, until something is written there. The guards are NaN as well: what is read past an end
shows in the result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastbert import forks
from fastbert.errors import BackendError

ON = os.environ.get("FASTBERT_CHECK", "0") not in ("", "0")

# Bytes on either side: more than a tile of rows that are 4096 wide.
GUARD = 2**17

# Of each guarded storage that is alive, by its address: how many bytes lie between the guards.
_sizes: dict[int, tuple[StorageWeakRef, int]] = {}
_lock = forks.lock()


def guarded(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `memory.room`, between guards."""
    size = math.prod(shape) * dtype.itemsize
    whole = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cpu")
    storage = whole.untyped_storage()
    with _lock:
        for address in [address for address, (one, _) in _sizes.items() if one.expired()]:
            del _sizes[address]
        _sizes[storage.data_ptr()] = StorageWeakRef(storage), size
    return whole[GUARD : GUARD + size].view(dtype).view(shape)


def verify(what: str, x: Tensor) -> None:
    """Raise BackendError if something was written outside of `x`, where that is guarded."""
    storage = x.untyped_storage()
    found = _sizes.get(storage.data_ptr())
    if found is None or found[0].expired():
        return
    whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    for side, guard in (("before", whole[:GUARD]), ("past", whole[GUARD + found[1] :])):
        changed = (guard != 0xFF).nonzero().flatten()
        if len(changed):
            raise BackendError(
                what,
                f"{len(changed)} bytes written {side} its memory",
                "none",
                "This is a fault of fastbert: report it.",
            )
