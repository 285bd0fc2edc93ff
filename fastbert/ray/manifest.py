"""What an output folder holds and of which run, so that the run goes on where it stopped, and no other one does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.errors import ArgumentError, shown
from fastbert.writing import replacing

MANIFEST = "_manifest.jsonl"  # those who read folders pass over such names
OF_MODELS = (".bin", ".json", ".model", ".safetensors", ".txt")


class Manifest:
    """A file of JSON lines: the first is the run, each other a shard that is done.

    Attributes:
        done: the records of these shards by their names.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], form: str) -> None:
        """Go on with the manifest that is there, or begin one.

        A shard whose file is gone, or of another size, is not done.

        Args:
            path: of the manifest, in the folder of the shards.
            run: what has to be the same; values are those of JSON. Under "inputs" the files by their names.
            form: the ending of the shards' files.

        Raises:
            ArgumentError: it is damaged, or that of another run.
        """
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            began, *records = _read(path)
            _check_same(began, run)
            for record in records:
                file = path.parent / f"{record['shard']}.{form}"
                if file.is_file() and file.stat().st_size == record["bytes"]:
                    self.done[record["shard"]] = record
        with replacing(path) as temporary, temporary.open("w") as new:
            for value in (run, *self.done.values()):
                new.write(json.dumps(value) + "\n")

    def add(self, record: dict[str, Any]) -> None:
        """Note that a shard is done."""
        self.done[record["shard"]] = record
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    *lines, _ = path.read_text().split("\n")  # what is behind the last end of a line was being written
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            mend = "Remove this line, and its shard is written again; without its first line the run is lost."
            raise ArgumentError(f"{path}, line {number}", shown(line), "a JSON object", mend) from error
    if not found:
        raise ArgumentError(str(path), "a file without a line", "the manifest of a run", "Choose another folder.")
    return found


def _check_same(began: dict[str, Any], run: Mapping[str, Any]) -> None:
    changed = [name for name in run if run[name] != began.get(name)]
    if not changed:
        return
    name = changed[0]
    got, was = run[name], began.get(name)
    if name == "inputs" and isinstance(was, dict):
        file = next(file for file in (*got, *was) if got.get(file) != was.get(file))
        name, got, was = f"dataset: {file}", got.get(file, "no such file"), was.get(file, "no such file")
    mend = "Go on with the same model, files and settings; others are another run, into another folder."
    raise ArgumentError(name, f"{shown(got)} where the run began with {shown(was)}", "what it was", mend)


def fingerprint(folder: str) -> str:
    """Of the files of a checkpoint folder that a model is read of."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in OF_MODELS and path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()
