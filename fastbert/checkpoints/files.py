"""Files of a checkpoint folder: read with suspicion, written whole."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastbert.checkpoints.fields import Fields
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.writing import replacing

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
WORDS = "fastbert_words.json"  # our own: how texts are cut into words; see `words.WordRule`
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    WORDS,
)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# What torch.load was seen to raise for files damaged at random, besides OSError.
TORCH_LOAD_ERRORS = (
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


def path_of(folder: str | os.PathLike[str]) -> Path:
    """`folder` as a path, or ArgumentError if it is none."""
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise ArgumentError("folder", f"a {type(folder).__name__}", "a path: a str or a Path")
    if not os.fspath(folder):  # which a Path would take for the working directory
        raise ArgumentError("folder", repr(folder), "a path")
    return Path(folder)


def checkpoint_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint folder that is there.

    Raises:
        ArgumentError: `folder` is no path.
        CheckpointError: there is no such folder, or it is closed to us.
    """
    path = path_of(folder)
    expected = f"a folder with {CONFIG} and {WEIGHTS}"
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        got = "no folder there" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", str(error))
        mend = ""
        if str(folder).startswith("~"):
            mend = "A shell reads ~ as your home; in Python write os.path.expanduser(...)."
        elif _HUB_NAME.fullmatch(str(folder)):
            mend = (
                "If this is a name on the Hugging Face hub: fastbert reads folders; get it by "
                f"`hf download {folder} --local-dir FOLDER`."
            )
        raise CheckpointError(repr(str(folder))[1:-1] or "folder", got or "an empty name", expected, mend) from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(str(path), "no folder", expected)
    if not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(str(path), "a folder closed to us", expected, "Change its permissions.")
    return path


def has(path: Path) -> bool:
    """Whether a folder has an entry of this name, be it a broken link: what is broken is not passed over."""
    return os.path.lexists(path)


def check_readable(path: Path) -> None:
    """What is to be called before a library opens a file of a checkpoint: to open a pipe waits for its writer.

    Raises:
        CheckpointError: there is no file, it is not a regular one, or it is closed to us.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: no name at all, with a NUL or half a character
        raise CheckpointError(repr(str(path))[1:-1], getattr(error, "strerror", str(error)), "a file") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(str(path), kind, "a file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(str(path), "a file closed to us", "one that may be read", "Change its permissions.")


def read_bytes(path: Path) -> bytes:
    """The contents of a file.

    Raises:
        CheckpointError: it is missing, unreadable or no regular file.
    """
    check_readable(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), error.strerror, "a file") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"a JSON {type(value).__name__}", "a JSON object")
    return value


def read_any_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable or not JSON.
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"{error}", "a JSON file", "Download or save the file again.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The dict in the folder's config.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return read_json(folder / CONFIG)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the first that the folder has: model.safetensors or its shards, pytorch_model.bin or its shards.

    They are on the CPU.
    Tensors may map the file they come from, or share memory with each other: copy them to keep them.

    Raises:
        CheckpointError: there are no weights, or a file is missing, damaged or holds more than tensors.
    """
    for name, read in _READERS.items():
        if has(folder / name):
            return read(folder / name)
    raise CheckpointError(str(folder), "no weights", f"one of {', '.join(_READERS)} in it")


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The contents of the tokenizer's files that the folder has, by name.

    Raises:
        CheckpointError: one of them is unreadable or no regular file.
    """
    return {name: read_bytes(folder / name) for name in TOKENIZER_FILES if has(folder / name)}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], others: Mapping[str, bytes]) -> None:
    """Write config.json, model.safetensors and `others` (by name) into `folder`, which is made if missing.

    Each file appears whole or not at all. Tensors must not share memory with each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors)
    write_bytes(folder, {CONFIG: json_bytes(config), **others})


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int | None = None) -> None:
    """Write model.safetensors; or shards of at most so many bytes of tensors, a longer tensor by itself, and an index.

    Each file appears whole or not at all. Tensors must not share memory with each other.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shard_bytes is not None and size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_safetensors(folder / WEIGHTS, shards[0])
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    write_bytes(folder, {INDEX: json_bytes({"metadata": {"total_size": total}, "weight_map": places})})


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(dict(tensors), temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # the library has its own word for what the system refuses
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error


def json_bytes(value: object) -> bytes:
    """The value as a JSON file has it, in UTF-8; a lone surrogate, which has no UTF-8, as the escape that JSON has."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_bytes(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by name into `folder`, each whole or not at all; names may be of folders in it."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_readable(path)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), str(error), "a safetensors file", "Download or save it again.") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    ending = ".bin" if index.name == PICKLED_INDEX else ".safetensors"
    read = _read_pickled if index.name == PICKLED_INDEX else _read_safetensors
    weight_map = Fields(str(index), read_json(index)).mapping("weight_map")
    if not weight_map:
        raise CheckpointError(str(index), "no weight_map", "weight_map: an object from tensor names to file names")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(ending) or any(mark in name for mark in "/\\:"):
            raise CheckpointError(f"{index}: {key}", repr(name), f"the name of a {ending} file in the same folder")
    shards = {name: read(index.parent / name) for name in sorted(set(weight_map.values()))}
    held: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard:
            held[key] = f"{held[key]} and {name}" if key in held else name
    for key in sorted(weight_map.keys() | held.keys()):
        if held.get(key) != weight_map.get(key):
            got = f"tensor {key} in {held.get(key, 'no shard')}"
            expected = f"it in {weight_map.get(key, 'no shard')}"
            raise CheckpointError(str(index), got, expected, "Download the shards again.")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _read_pickled(path: Path) -> dict[str, Tensor]:
    check_readable(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            str(path),
            "pickled objects other than tensors, or damage",
            "a state dict of tensors",
            "fastbert never runs code from a checkpoint: convert the file to safetensors where you trust it.",
        ) from error
    except (*TORCH_LOAD_ERRORS, OSError) as error:
        raise CheckpointError(
            str(path), f"{type(error).__name__} {error}".split("\n")[0], "a whole file", "Download or save it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(str(path), f"a {type(state).__name__} of more than tensors", "a state dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or value.layout is not torch.strided or value.is_quantized or value.is_meta:
            got = f"a sparse, quantized or empty tensor, or a name that is no string: {key!r}"
            raise CheckpointError(str(path), got, "a state dict of plain tensors")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():  # a copy of it might fill the memory
            got = f"{key}: shape {tuple(value.shape)} in {value.untyped_storage().nbytes()} bytes, expanded"
            raise CheckpointError(str(path), got, "tensors that hold all of their numbers", "Save them contiguous.")
    return dict(state)


# In this order: what is safe to read comes first.
_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    WEIGHTS: _read_safetensors,
    INDEX: _read_shards,
    PICKLED: _read_pickled,
    PICKLED_INDEX: _read_shards,
}
