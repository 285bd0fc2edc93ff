"""A GPU that torch seems to see, on a machine without one: what it is, not what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastbert import backend
from fastbert.kernels import target


@contextmanager
def fake_gpu(arch: str, shared_memory: int = 99 * 1024) -> Iterator[torch.device]:
    """`cuda:0` of this arch, "sm_90" or "gfx942" say, as torch describes it."""
    amd = arch.startswith("gfx")
    capability = 0 if amd else int(arch.removeprefix("sm_"))
    properties = SimpleNamespace(
        major=capability // 10, minor=capability % 10, shared_memory_per_block_optin=shared_memory,
        gcnArchName=f"{arch}:sramecc+:xnack-", warp_size=64 if arch.startswith("gfx9") else 32,
        multi_processor_count=100,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.version, "hip", "7.0" if amd else None)
        try:
            forget()
            yield torch.device("cuda", 0)
        finally:
            forget()


def forget() -> None:
    """What is remembered of devices."""
    target._of_gpu.cache_clear()
    backend._decide.cache_clear()
