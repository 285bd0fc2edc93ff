"""Files that are kept from one run to the next, in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from fastbert.writing import replacing


def folder() -> Path:
    """`$FASTBERT_CACHE`, or `~/.cache/fastbert`; it need not be there yet."""
    named = os.environ.get("FASTBERT_CACHE")
    return Path(named) if named else Path("~/.cache/fastbert").expanduser()


def write(path: Path, text: str) -> None:
    """Write a small file, and its folder where there is none.

    Raises:
        OSError, ArgumentError: it can't be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
