"""Files of a checkpoint folder: read with suspicion, written so that nobody sees half of one."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastbert.errors import ArgumentError, CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

# What torch.load was seen to raise for files damaged at random, besides OSError.
_TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(str(path), error.strerror, "a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"{error}", "a JSON file", "Download or save the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"a JSON {type(value).__name__}", "a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The dict in the folder's config.json.

    Raises:
        CheckpointError: there is no such folder, or its config.json is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no folder there", f"a folder with {CONFIG} and {WEIGHTS}")
    return read_json(folder / CONFIG)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's model.safetensors, else of its shards, else of its pytorch_model.bin; on the CPU.

    Tensors may map the file they come from, or share memory with each other: copy them to keep them.

    Raises:
        CheckpointError: there are no weights, or a file is missing, damaged or holds more than tensors.
    """
    if (folder / WEIGHTS).exists():
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return _read_shards(folder / INDEX)
    if (folder / PICKLED).exists():
        return _read_pickled(folder / PICKLED)
    raise CheckpointError(str(folder), "no weights", f"one of {WEIGHTS}, {INDEX}, {PICKLED} in it")


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The contents of the tokenizer's files that the folder has, by name."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], others: Mapping[str, bytes]) -> None:
    """Write config.json, model.safetensors and `others` (by name) into `folder`, which is made if missing.

    Each file appears whole or not at all. Tensors must not share memory with each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        safetensors.torch.save_file(dict(tensors), temporary, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_bytes(folder, others)


def write_bytes(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by name into `folder`, each whole or not at all."""
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends well, else it is deleted.

    Raises:
        ArgumentError: see `check_replaceable`.
    """
    path = path.resolve()  # a link keeps being one; what it points to is replaced
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), str(error), "a safetensors file", "Download or save it again.") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), f"weight_map {weight_map!r:.80}", "an object from tensor names to file names")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(mark in name for mark in "/\\:"):
            raise CheckpointError(f"{index}: {key}", repr(name), "the name of a .safetensors file in the same folder")
    shards = {name: _read_safetensors(index.parent / name) for name in sorted(set(weight_map.values()))}
    held = {key: name for name, shard in shards.items() for key in shard}
    for key in sorted(weight_map.keys() | held.keys()):
        if held.get(key) != weight_map.get(key):
            got = f"tensor {key} in {held.get(key, 'no shard')}"
            expected = f"it in {weight_map.get(key, 'no shard')}"
            raise CheckpointError(str(index), got, expected, "Download the shards again.")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            str(path),
            "pickled objects other than tensors, or damage",
            "a state dict of tensors",
            "fastbert never runs code from a checkpoint: convert the file to safetensors where you trust it.",
        ) from error
    except (*_TORCH_LOAD_ERRORS, OSError) as error:
        raise CheckpointError(
            str(path), f"{type(error).__name__} {error}".split("\n")[0], "a whole file", "Download or save it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(str(path), f"a {type(state).__name__} of more than tensors", "a state dict of tensors")
    return dict(state)
