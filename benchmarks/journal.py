"""What a long run has done so far, as JSON lines, so that an interruption loses at most the step under way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastbert.errors import ArgumentError


class Journal:
    """An append-only file of JSON objects; its first line says what machine and code the others are about.

    Args:
        path: the file; it and its folder are made when the first entry is written.
        about: what the entries depend on. A file about something else begins anew with the next entry.

    Attributes:
        entries: those of earlier runs and of this one, in order.
        begun_anew: whether there was a file, about something else.

    Raises:
        ArgumentError: a line is no JSON object. A last line without its end, which an interruption left, is cut off.
    """

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path = path
        self._about = about
        lines = _whole_lines(path) if path.exists() else []
        self.begun_anew = bool(lines) and lines[0] != about
        self.entries: list[dict[str, Any]] = [] if self.begun_anew else lines[1:]
        self._has_header = bool(lines) and not self.begun_anew

    def write(self, **entry: Any) -> None:
        """Append one entry; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if self._has_header else "w", encoding="utf-8") as file:
            for line in (entry,) if self._has_header else (self._about, entry):
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._has_header = True
        self.entries.append(entry)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    lines = []
    for number, line in enumerate(text[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ArgumentError(
                f"{path}, line {number}",
                line[:80].decode(errors="replace"),
                "a JSON object",
                "Delete that line, or the file to begin anew.",
            )
        lines.append(entry)
    return lines
