"""Whether a model's parameters are still what they were, asked before each piece of work, in microseconds.

Seen are other modules, hooks, other parameters, other memory, and what torch counts as a write. `.data` and some
optimizers write without a trace, so numbers are compared too: biases and norms whole, of a matrix 16 lines on its
diagonal, as spread over rows and columns. A write that no number of these feels is not seen: `weights_changed` says it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

# Lines of a matrix that are compared, and numbers of each. So spread they meet every head of 12 or more, in the rows of
# queries, keys and values as in the columns of the product after them, and cost a cache line each.
LINES, WIDTH = 16, 16

# Numbers of a vector that are compared whole; a longer one is cut into lines.
LONGEST = 2**16

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_said = 0


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """What is called beside the forward pass of a module or its gradient."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def weights_changed() -> None:
    """Say that weights of some model were written in a way that nobody can see: a few numbers of a matrix by `.data`.

    What was laid out of weights is then made anew. Any other change is seen without it.
    """
    global _said
    _said += 1


class Members:
    """What the tables of modules, those that are not empty, held when it was made."""

    def __init__(self, tables: Iterable[dict[str, Any]]) -> None:
        self._tables = list(filter(None, tables))
        self._members = [member for table in self._tables for member in table.values()]

    def same(self) -> bool:
        """Whether they hold the same objects."""
        members = chain.from_iterable(map(dict.values, self._tables))
        return sum(map(len, self._tables)) == len(self._members) and all(map(is_, members, self._members))


class Watch:
    """The state of a model's parameters on the CPU when `changed` was asked last."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tree: Members | None = None  # of each module, its parameters, buffers and modules
        self._empty: list[dict[Any, Any]] = []  # tables and hooks of modules that have none
        self._counted_dicts: list[dict[Any, Any]] = []  # attributes of each module, and the hooks that there are
        self._parameters: list[Tensor] = []
        self._counted: list[Tensor] = []  # those whose writes torch counts
        self._norms: list[nn.LayerNorm] = []  # whose eps is no parameter
        self._dropouts: list[nn.Dropout] = []
        self._whole: list[memoryview] = []  # the parameters' memory that is compared, where it lies together
        self._samples: list[list[npt.NDArray[Any]]] = []  # and where it does not; of one width each
        self._marks: list[Any] = []
        self._bytes = b""
        self._numbers: list[npt.NDArray[Any]] = []

    def changed(self) -> bool:
        """Whether anything has changed since the last time; True the first time."""
        same = self._tree is not None and self._tree.same() and not any(self._empty)
        if not same:
            self._read_tree()
        marks = self._current_marks()
        if not same or marks != self._marks:
            self._look_at_memory()
            same = False
        whole, numbers = b"".join(self._whole), [np.concatenate(samples) for samples in self._samples]
        if same:
            same = whole == self._bytes and all(map(np.array_equal, numbers, self._numbers))
        self._marks, self._bytes, self._numbers = marks, whole, numbers
        return not same

    def drops(self) -> bool:
        """Whether an nn.Dropout is on among the modules that there were when `changed` was asked last."""
        return any(dropout.training and dropout.p > 0.0 for dropout in self._dropouts)

    def _read_tree(self) -> None:
        modules = list(self._model.modules())
        tables = [table for module in modules for table in (module._parameters, module._buffers, module._modules)]
        hooks = [table for module in modules for table in hooks_of(module)]
        self._tree = Members(tables)
        self._empty = [table for table in tables + hooks if not table]
        self._counted_dicts = [*(module.__dict__ for module in modules), *filter(None, hooks)]
        self._norms = [module for module in modules if isinstance(module, nn.LayerNorm)]
        self._dropouts = [module for module in modules if type(module) is nn.Dropout]
        found = {id(x): x for x in chain(self._model.parameters(), self._model.buffers())}
        self._parameters = [x for x in found.values() if type(x) in (nn.Parameter, Tensor) and x.device.type == "cpu"]
        self._counted = [p for p in self._parameters if not p.is_inference()]

    def _current_marks(self) -> list[Any]:
        """Where each parameter lies and how often it was written, as torch counts; hooks; and what the user said."""
        places, writes = map(Tensor.data_ptr, self._parameters), map(attrgetter("_version"), self._counted)
        eps = [norm.eps for norm in self._norms]
        return [_said, *map(len, self._counted_dicts), *places, *writes, *eps]

    def _look_at_memory(self) -> None:
        self._whole = []
        samples: dict[Any, list[npt.NDArray[Any]]] = defaultdict(list)
        for parameter in self._parameters:
            if parameter.device.type == "cpu" and parameter.layout == torch.strided and parameter.numel():
                sample = _sample(parameter.detach())
                if sample.is_contiguous():
                    self._whole.append(sample.numpy().data)
                else:
                    samples[sample.dtype, sample.shape[1:]].append(sample.numpy())
        self._samples = list(samples.values())


def _sample(x: Tensor) -> Tensor:
    """A vector whole, of a matrix numbers on its diagonal; as integers, because NaN is not equal to itself."""
    x = x.view(_INTEGERS[x.itemsize]) if x.dtype.is_floating_point else x
    if x.dim() < 2 and x.numel() <= LONGEST:
        return x.reshape(-1)
    if x.dim() < 2:
        x = x[: len(x) // LINES * LINES].view(LINES, -1)
    down, across = x.stride()[:2]
    lines, width = min(LINES, x.shape[0]), min(WIDTH, x.shape[1])
    step = x.shape[0] // lines * down + (x.shape[1] - width) // max(lines - 1, 1) * across
    return x.as_strided((lines, width), (step, across))
