"""What happens in Triton's interpreter, recorded: each launch, and the bytes that its active lanes load and store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from fastbert.errors import BackendError
from fastbert.kernels.target import interpreted


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        tensors: those it was given.
        loads, stores: of each access, the addresses of the active lanes and the bytes that each of them moves.
    """

    kernel: str
    tensors: list[Tensor]
    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches in the yielded list.

    Raises:
        BackendError: without TRITON_INTERPRET, where kernels are compiled.
    """
    if not interpreted():
        raise BackendError("TRITON_INTERPRET", None, "1", "Set it before Python starts.")
    launches: list[Launch] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **options: Any) -> None:
        tensors = [arg for arg in (*args, *options.values()) if isinstance(arg, Tensor)]
        launches.append(Launch(self.fn.__name__, tensors))
        with _disable_current_modes():  # the interpreter's own calls of torch are nobody's
            run(self, *args, **options)

    def masked_load(self: InterpreterBuilder, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        launches[-1].loads.append(_active(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def masked_store(
        self: InterpreterBuilder, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
    ) -> None:
        launches[-1].stores.append(_active(ptrs, mask))
        store(self, ptrs, value, mask, *rest)

    with (
        patch.object(GridExecutor, "__call__", launch),
        patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        patch.object(InterpreterBuilder, "create_masked_store", masked_store),
    ):
        yield launches


def _active(ptrs: TensorHandle, mask: TensorHandle) -> tuple[np.ndarray, int]:
    addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
    return addresses.astype(np.int64), ptrs.get_element_ty().primitive_bitwidth // 8
