"""Files that are kept from one run to the next, in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from fastbert.errors import ArgumentError
from fastbert.writing import replacing


def folder() -> Path:
    """`$FASTBERT_CACHE`, or `~/.cache/fastbert`; it need not be there yet.

    Raises:
        ArgumentError: neither is known, as to a user without a name in a container.
    """
    named = os.environ.get("FASTBERT_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "fastbert"
    except RuntimeError as error:
        expected = "a folder, for files that are kept between runs"
        raise ArgumentError("FASTBERT_CACHE", "nothing, from a user without a home", expected, "Set it.") from error


def write(path: Path, text: str) -> None:
    """Write a small file, and its folder where there is none.

    Raises:
        OSError, ArgumentError: it can't be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
