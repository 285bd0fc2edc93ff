"""A lock on a folder: one run at a time writes there, whatever else was started."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbert.errors import ArgumentError


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the folder of `path`, the lock's file, until the block ends, or the process does, however that is.

    A file system without locks is a warning.

    Args:
        path: the same for all that keep each other out.
        doing: what is done in the folder meanwhile, for those who are kept out: "training".

    Raises:
        ArgumentError: another process holds it, or the lock is no file: through a link we would empty another file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ArgumentError(str(path), "a link, folder or device", "a file of our own, or nothing", "Remove it.")
    file = path.open("a+")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            with file:
                owner = file.read().strip() or "another process"
            mend = "Wait until it has ended, or choose another."
            got = f"a folder that {owner} is {doing} in"
            raise ArgumentError(str(path.parent), got, "a folder for each run", mend) from error
        except OSError as error:
            warnings.warn(
                f"{path.parent} can't be locked ({error.strerror}): see that nothing else is {doing} there",
                stacklevel=3,
            )
            break
        if _is_file(path, file.fileno()):
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}")
            file.flush()
            break
        file.close()  # of one that had ended, and took its file away, between our opening and our locking
        file = path.open("a+")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _is_file(path: Path, opened: int) -> bool:
    """Whether what is opened is still what has this name."""
    try:
        return os.path.samestat(os.fstat(opened), path.stat())
    except FileNotFoundError:
        return False
