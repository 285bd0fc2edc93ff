"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastbert.errors import ArgumentError

NAME_BYTES = 100  # of a file's name in that of its temporary file: a name has at most 255
_MADE_BY = re.compile(r"(\d{1,9})\.[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends well, else it is deleted.

    Raises:
        ArgumentError: see `check_replaceable`.
    """
    path = path.resolve()  # a link keeps being one; what it points to is replaced
    check_replaceable(path)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder, as far as it is ours to remove."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(PermissionError):
            path.unlink(missing_ok=True)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """As `replacing`, of a folder that is not there yet."""
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        remove(temporary)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no one else has: of host, process and chance. Those of dead processes are removed."""
    name = os.fsdecode(os.fsencode(path.name)[:NAME_BYTES])
    ours = f".{name}.{socket.gethostname()}."
    for other in path.parent.iterdir():
        made = _MADE_BY.fullmatch(other.name[len(ours) :]) if other.name.startswith(ours) else None
        if made is not None and not _is_running(int(made[1])):
            remove(other)
    return path.with_name(f"{ours}{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def check_replaceable(path: Path) -> None:
    """Raise ArgumentError if `replacing(path)` could not work: to be called before long work.

    Raises:
        ArgumentError: `path` is something other than a file, or its folder is missing or closed to us.
    """
    if not path.parent.is_dir():
        raise ArgumentError(str(path), f"no folder {path.parent}", "a file in a folder", "Make the folder first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArgumentError(str(path), f"no permission to write in {path.parent}", "a folder that is yours to write in")
    if path.exists() and not path.is_file():
        raise ArgumentError(str(path), "a folder or device of that name", "a file, or nothing there yet")
