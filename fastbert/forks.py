"""Locks that a forked process finds open.

A thread that holds a lock is not there in the child, and never opens it.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

_locks: WeakSet[threading.Lock] = WeakSet()
_forking = threading.Lock()  # one fork at a time, so that two do not each wait for a lock of the other
_taken: list[threading.Lock] = []


def lock() -> threading.Lock:
    """A lock. `os.fork` waits until whoever holds it is done, and what it guards is whole in the child."""
    made = threading.Lock()
    _locks.add(made)
    return made


def _take() -> None:
    _forking.acquire()
    for one in list(_locks):
        one.acquire()
        _taken.append(one)


def _open() -> None:
    while _taken:
        _taken.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take, after_in_parent=_open, after_in_child=_open)
