"""Layers that are prepared once: for which calls they were, and the way that prepares none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastbert import backend
from fastbert.run import prepared


@contextmanager
def preparations() -> Iterator[list[int]]:
    """Rows of each call that a layer was prepared for, on the Triton path and with nothing kept from before."""
    rows: list[int] = []
    prepare: Any = prepared._prepare

    def noted(steps: Any, parts: Any, registers: Any, packing: Any) -> Any:
        rows.append(len(registers.floats["x"]))
        return prepare(steps, parts, registers, packing)

    with pytest.MonkeyPatch.context() as patch, backend.use_backend("triton"), torch.no_grad():
        patch.setattr(prepared, "_prepare", noted)
        patch.setattr(prepared, "_kept", {})
        yield rows


@contextmanager
def unprepared() -> Iterator[None]:
    """Inside, layers go the long way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "run", lambda *_: False)
        yield
