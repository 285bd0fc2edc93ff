"""Loading a model for a task: what it computes in, and on which device; an untrained head is refused."""

from __future__ import annotations

import os
import warnings
from typing import Literal, TypeVar

import torch
from torch import nn

from fastbert.backend import bfloat16_unserved, first_device, float16_unserved, int8_unserved, usable_device
from fastbert.checkpoints import files
from fastbert.checkpoints.int8 import in_int8
from fastbert.checkpoints.load import WithHead, dtype_name, read_model
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.families.quantization import quantize
from fastbert.model.encoder import Encoder

Model = TypeVar("Model", bound=nn.Module)

DTypeName = Literal["fp32", "bf16", "fp16", "int8"]

# Of the parameters; "int8" is made of float32.
DTYPES: dict[DTypeName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}


def default_dtype(device: torch.device) -> DTypeName:
    """What a model computes in where nobody says: half precision on a GPU, whose matrix units are made for it."""
    return "fp16" if device.type == "cuda" else "fp32"


def unserved(device: torch.device) -> dict[DTypeName, str]:
    """Those of `DTYPES` that this device is no faster in than in float32, each with the reason."""
    int8 = "it is for CPUs" if device.type == "cuda" else int8_unserved(device)
    reasons: dict[DTypeName, str | None] = {
        "bf16": bfloat16_unserved(device),
        "fp16": float16_unserved(device),
        "int8": int8,
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def parameter_dtype(name: DTypeName | None, folder: str | os.PathLike[str], device: torch.device) -> torch.dtype:
    """Of the parameters of a checkpoint folder; float32, and said, where half precision would only be slower.

    Raises:
        ArgumentError: there is no dtype of this name, or another than int8 of a folder in int8.
        CheckpointError: there is no such folder, or its config.json is damaged.
    """
    if name is not None and name not in DTYPES:
        raise ArgumentError("dtype", repr(name), f"one of {', '.join(DTYPES)}")
    path = files.checkpoint_folder(folder)
    if in_int8(files.read_config(path), path / files.CONFIG):
        if name not in (None, "int8"):
            mend = "To have it in floats: fastbert convert --dtype fp32"
            raise ArgumentError("dtype", repr(name), "int8 or nothing, for a folder in int8", mend)
        return torch.float32
    name = default_dtype(device) if name is None else name
    if name != "int8" and (slow := unserved(device).get(name)) is not None:
        warnings.warn(f"computing in float32, not in {dtype_name(DTYPES[name])}: {slow}", stacklevel=3)
        return torch.float32
    return DTYPES[name]


def quantized(model: Model, name: DTypeName | None) -> Model:
    """The model in 8 bits, if this dtype is "int8" and it is not so already."""
    if name != "int8" or any(isinstance(part, Encoder) and part.in_eight_bits() for part in model.modules()):
        return model
    return quantize(model, dtype="int8")


def with_trained_head(
    kind: type[WithHead], folder: str | os.PathLike[str], dtype: DTypeName | None, device: torch.device | str | None
) -> WithHead:
    """As `load`, but a head that would begin untrained is an error: its answers would mean nothing.

    Raises:
        ArgumentError: `dtype` is none of `DTYPES`, or torch can't use `device` here.
        CheckpointError: the folder is not a checkpoint fastbert reads, or lacks a part of the head.
    """
    device = first_device() if device is None else usable_device(device)
    model, untrained = read_model(folder, kind, dtype=parameter_dtype(dtype, folder, device), device=device)
    if untrained:
        got = f"no trained {model.origin.dialect.class_name(kind)}: it lacks {', '.join(untrained)}"
        raise CheckpointError(str(folder), got, "a checkpoint with its head", "Train one: fastbert train --help")
    return quantized(model, dtype)
