"""What an executor made of weights, kept as long as they are what they were."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

from torch import nn

from fastbert.forks import lock
from fastbert.ops.watch import Watch

T = TypeVar("T")


class Kept:
    """What was made of modules' weights, for each purpose; made anew once they change, see `ops.watch`.

    Threads share it. To another process, or to a copy of the module, goes nothing.
    """

    def __init__(self) -> None:
        self._lock = lock()
        self._watch: Watch | None = None
        self._made: dict[Hashable, object] = {}

    def get(self, modules: Sequence[nn.Module], purpose: Hashable, make: Callable[[], T]) -> T:
        """What `make()` makes of `modules`, which are always the same ones, with or without dropout."""
        with self._lock:
            if self._watch is None:
                self._watch = Watch(nn.ModuleList(modules))
            if self._watch.changed():
                self._made = {}
            key = purpose, self._watch.drops()
            if key not in self._made:
                self._made[key] = make()
            return cast("T", self._made[key])

    def drop(self) -> None:
        """Keep nothing: give its memory back."""
        with self._lock:
            self._watch, self._made = None, {}

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
