"""What an output folder holds and of which run, so that the run goes on where it stopped, and no other one does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.errors import ArgumentError, shown
from fastbert.ray.inputs import Shard
from fastbert.writing import replacing

MANIFEST = "_manifest.jsonl"  # those who read folders pass over such names
FIELDS = {"shard": str, "input": str, "size": int, "changed": int, "bytes": int, "rows": int}  # that a record must have
OF_MODELS = (".bin", ".json", ".model", ".safetensors", ".txt")


class Manifest:
    """A file of JSON lines: the first is the run, each other a shard that is done.

    Attributes:
        done: the records of these shards by their names.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], form: str, shards: Sequence[Shard]) -> None:
        """Go on with the manifest that is there, or begin one.

        A shard is done if its file is there, as large as noted, and its input is as it was then. The file of a shard
        whose input has changed is removed.

        Args:
            path: of the manifest, in the folder of the shards.
            run: what has to be the same; values are those of JSON.
            form: the ending of the shards' files.
            shards: all that there are to be.

        Raises:
            ArgumentError: the manifest is damaged, or that of another run; or an input is gone whose shards are there.
        """
        self._path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            began, *records = _read(path)
            _check_same(began, run)
            planned = {shard.output: shard for shard in shards}
            inputs = {shard.name for shard in shards}
            there = [record for record in records if _size(self._file(record, form)) == record["bytes"]]
            for record in there:
                if record["input"] not in inputs:
                    got = f"no {record['input']}, of which shards are in {path.parent}"
                    raise ArgumentError("dataset", got, "all files that it had", "Bring it back, or remove its shards.")
            for record in there:
                shard = planned.get(record["shard"])
                if shard is not None and (shard.size, shard.changed) == (record["size"], record["changed"]):
                    self.done[shard.output] = record
                else:
                    self._file(record, form).unlink()
        with replacing(path) as temporary, temporary.open("w") as new:
            for value in (run, *self.done.values()):
                new.write(json.dumps(value) + "\n")

    def _file(self, record: dict[str, Any], form: str) -> Path:
        return self._path.parent / f"{record['shard']}.{form}"

    def add(self, record: dict[str, Any]) -> None:
        """Note that a shard is done."""
        self.done[record["shard"]] = record
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _read(path: Path) -> list[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")  # what is behind the last end of a line was being written
    found = []
    for number, line in enumerate(lines, start=1):
        mend = "Remove this line, and its shard is written again; without its first line the run is lost."
        where, got = f"{path}, line {number}", shown(line.decode(errors="replace"))
        try:
            found.append(dict(json.loads(line)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(where, got, "a JSON object", mend) from error
        if number > 1 and not _is_record(found[-1]):
            raise ArgumentError(where, got, "the record of a shard", mend)
    if not found:
        raise ArgumentError(str(path), "a file without a line", "the manifest of a run", "Choose another folder.")
    return found


def _is_record(record: dict[str, Any]) -> bool:
    """Whether it has all fields, and names a shard of its input: other files are not ours to remove."""
    if not all(type(record.get(name)) is kind for name, kind in FIELDS.items()):
        return False
    return re.fullmatch(rf"{re.escape(record['input'])}-[0-9]+", record["shard"]) is not None


def _check_same(began: dict[str, Any], run: Mapping[str, Any]) -> None:
    changed = [name for name in run if run[name] != began.get(name)]
    if not changed:
        return
    got = ", ".join(shown(run[name]) for name in changed)
    was = ", ".join(shown(began.get(name)) for name in changed)
    mend = "Go on with the same model and settings; others are another run, into another folder."
    raise ArgumentError(", ".join(changed), f"{got} where the run began with {was}", "what it was", mend)


def checksum_of_files(folder: str) -> str:
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
