"""`fastbert.convert`: a checkpoint folder to another, in another dtype, in shards, in int8, or as ONNX."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fastbert.checkpoints import files, int8
from fastbert.checkpoints.architectures import recognise
from fastbert.checkpoints.load import Origin, dtype_name, load
from fastbert.checkpoints.sentence import read_recipe, read_sentence_files
from fastbert.errors import ArgumentError
from fastbert.families.quantization import quantize
from fastbert.model.layer import Layer
from fastbert.writing import making

DType = Literal["fp32", "bf16", "fp16", "int8"]
Format = Literal["safetensors", "onnx"]

_FLOATS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Files that hold weights, of any library, and what says where in them.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|onnx[._]data|gguf|index\.json)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: DType | None = None,
    shard_size: int | str | None = None,
    to: Format = "safetensors",
) -> None:
    """Write a checkpoint folder anew, under another name: its weights as they are asked for, all else as it is.

    Of a sentence-transformers folder the weights of the transformer are converted; those of its Dense and LayerNorm
    stay as they are. Files that hold weights for other libraries are left out.

    Args:
        folder: a checkpoint folder that fastbert reads.
        out: the folder to write, new or empty; it appears when it is whole.
        dtype: of the weights; by default what they have. "int8" is `fastbert.quantize`: the matrices of the layers in
            int8, the rest in float32. `fastbert.load` reads such a folder, other libraries refuse it.
        shard_size: most bytes of a file of weights, as a number, "500MB" or "2GiB"; by default all are in one.
        to: "safetensors"; or "onnx": model.onnx, which computes what the class named in config.json does, in float32,
            on a padded batch of any size. It is compared with the model before it is written; see
            `checkpoints.onnx.export`.

    Raises:
        ArgumentError: an argument is not as described, a number does not fit the dtype, or the model has no ONNX.
        BackendError: onnxruntime computes something else than the model.
        CheckpointError: the folder is not a checkpoint fastbert reads.
        MissingError: ONNX is asked for, and what makes or runs it is not installed.
    """
    source = files.checkpoint_folder(folder)
    target = Path(os.path.realpath(files.path_of(out)))  # a link keeps being one; what it points to is made
    for name, value, known in (("dtype", dtype, (None, *get_args(DType))), ("to", to, get_args(Format))):
        if value not in known:
            raise ArgumentError(name, repr(value), f"one of {', '.join(filter(None, known))}")
    shard_bytes = None if shard_size is None else _bytes(shard_size)
    if to == "onnx" and (dtype not in (None, "fp32") or shard_bytes is not None):
        got, name = (dtype, "dtype") if shard_bytes is None else (shard_size, "shard_size")
        raise ArgumentError(name, repr(got), "none for ONNX, which is one model in float32")
    _check_new(target)
    transformer, _ = read_recipe(source, "cpu")
    with making(target) as made:
        inside = made / transformer.relative_to(source)
        inside.mkdir(exist_ok=True)
        if to == "onnx":
            from fastbert.checkpoints.onnx import export

            export(transformer, inside / "model.onnx")
            config = files.read_config(transformer)
        else:
            config, tensors = _converted(transformer, dtype)
            files.write_tensors(inside, tensors, shard_bytes)
        files.write_bytes(inside, {files.CONFIG: files.json_bytes(config)})
        for name in _others(source, transformer):
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, made / name)


def _converted(folder: Path, dtype: DType | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The dict of config.json, and the tensors by their keys, no two of which share memory."""
    config, state = files.read_config(folder), files.read_tensors(folder)
    kept = int8.in_int8(config, folder / files.CONFIG)
    if dtype is None or (kept and dtype == "int8"):
        recognise(config, state)
        return config, dict(_apart(state))
    if kept:
        state, _ = int8.from_int8(state, folder)
        config.pop(int8.FIELD)
    recognise(config, state)
    if dtype == "int8":
        state = int8.to_int8(state, _matrices(folder))
        config |= {int8.FIELD: int8.MARK}
    else:
        state = {key: _cast(key, tensor, _FLOATS[dtype]) for key, tensor in state.items()}
    name = dtype_name(_FLOATS.get(dtype, torch.float32))
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    return config, dict(_apart(state))


def _matrices(folder: Path) -> list[str]:
    """The keys of the weights that the layers multiply by."""
    model = load(folder, dtype=torch.float32)
    quantize(model, dtype="int8")  # which says where it can't
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = cast("Iterable[Layer]", model.encoder.layer)
    mine = {names[id(linear.weight)] for layer in layers for linear in layer.multiplied()}
    origin: Origin = model.origin
    return [key for rule in origin.dialect.rules(model) if mine >= set(rule.ours) for key in rule.theirs]


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if lost := int((tensor.isfinite() & ~cast.isfinite()).sum()):
        largest = f"up to {torch.finfo(dtype).max:.5g}"
        raise ArgumentError("dtype", f"{lost} numbers of {key} that are larger", f"one that holds them: {largest} here")
    return cast


def _apart(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that lie as a file has them, none in the memory of another."""
    seen = set[int]()
    for key, tensor in state.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        alone = whole and tensor.data_ptr() not in seen
        seen.add(tensor.data_ptr())
        yield key, tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _others(source: Path, transformer: Path) -> list[str]:
    """The files of the folder, by their names in it, that hold no weights of the transformer."""
    names = {path.name for path in source.iterdir() if path.is_file()} | read_sentence_files(source).keys()
    own = transformer.relative_to(source)
    return sorted(
        name
        for name in names
        if Path(name).parent != own or not (Path(name).name == files.CONFIG or _WEIGHTS.fullmatch(Path(name).name))
    )


def _check_new(target: Path) -> None:
    if not target.parent.is_dir():
        raise ArgumentError("out", f"no folder {target.parent}", "a folder in one that is there")
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ArgumentError("out", f"{target}, which is there", "a new folder, or an empty one")
    if target.exists() and (target.samefile(".") or target.is_mount()):
        got = f"{target}, the working folder or a mount, whose place no other folder can take"
        raise ArgumentError("out", got, "a new folder", "Name one in it.")


def _bytes(size: int | str) -> int:
    expected = 'a positive number of bytes, or a string such as "500MB" or "2GB"'
    number: float = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if isinstance(size, str) and (found := _SIZE.fullmatch(size.strip())) is not None:
        power = " KMGT".index(found[2].upper() or " ")
        number = float(found[1]) * (1024 if found[3] else 1000) ** power
    if number < 1:
        raise ArgumentError("shard_size", repr(size), expected)
    return int(number)
