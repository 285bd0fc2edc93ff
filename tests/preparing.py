"""Layers that are prepared once: for which calls they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import backend
from fastbert.layer import EncoderLayer
from fastbert.ops import repeats
from fastbert.packing import Packing
from fastbert.quantization import Fp8Layer


@contextmanager
def preparations(kind: type[EncoderLayer] | type[Fp8Layer]) -> Iterator[list[int]]:
    """Rows of each call that a layer was prepared for, on the Triton path and with nothing kept from before."""
    rows: list[int] = []
    prepare: Any = kind._prepare

    def noted(layer: Any, x: Tensor, packing: Packing) -> Any:
        rows.append(len(x))
        return prepare(layer, x, packing)

    with pytest.MonkeyPatch.context() as patch, backend.use_backend("triton"), torch.no_grad():
        patch.setattr(kind, "_prepare", noted)
        patch.setattr(repeats, "_kept", {})
        yield rows
