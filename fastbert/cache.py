"""Files that are kept from one run to the next, in the user's cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """`$FASTBERT_CACHE`, or `~/.cache/fastbert`; it need not be there yet."""
    named = os.environ.get("FASTBERT_CACHE")
    return Path(named) if named else Path("~/.cache/fastbert").expanduser()


def write(path: Path, text: str) -> None:
    """Write a small file whole or not at all, and its folder where there is none.

    Raises:
        OSError: it can't be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
