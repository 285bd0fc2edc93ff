"""`fastbert.load` and `fastbert.save`: a Hugging Face checkpoint folder to a BertModel and back, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoints import files
from fastbert.checkpoints.architectures import FAMILIES, Dialect, recognise, split_carried
from fastbert.checkpoints.mapping import to_ours, to_theirs
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.models import BertModel


@dataclass(frozen=True, eq=False)
class Origin:
    """What `load` learned about a checkpoint besides the model, so that `save` can give the same one back.

    Attributes:
        dialect: how it spells its keys.
        config: the dict of its config.json.
        carried: tensors that fastbert does not compute with, by their own keys.
        tied: keys of tensors equal to one of our parameters, and that parameter's name.
        others: contents of its tokenizer files, by name.
    """

    dialect: Dialect
    config: Mapping[str, Any]
    carried: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    tied: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def load(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> BertModel:
    """The BERT model in a Hugging Face checkpoint folder, in eval mode.

    Args:
        folder: holds config.json and model.safetensors (whole or in shards) or pytorch_model.bin. Code in a pickle is
            refused, never run.
        dtype: floating dtype of the parameters; what the checkpoint has by default.
        device: where the parameters live; the CPU by default.

    Tensors of heads (masked tokens, classification, ...) are kept on `model.origin` and written back by `save`.

    Raises:
        CheckpointError: a file is missing or damaged, the family is not supported, or keys or shapes do not fit.
        ArgumentError: `dtype` is not floating, or the config asks for what BertModel does not do.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError("dtype", dtype, "a floating dtype, or None for the checkpoint's own")
    folder = Path(folder)
    raw_config = files.read_config(folder)
    state = files.read_tensors(folder)
    dialect = recognise(raw_config, state)
    family = FAMILIES[dialect.family]
    try:
        config = family.config(raw_config)
    except TypeError as error:
        raise CheckpointError(str(folder / files.CONFIG), str(error), "numbers where BertConfig has numbers") from error
    body, carried = split_carried(state, dialect)
    ours = to_ours(body, dialect.rules(config.num_layers))

    with torch.device("meta"):
        model = BertModel(config, pooler=dialect.pooler)
    _check_shapes(ours, model)
    # Copies, because tensors that were read may map the file or share memory.
    ours = {name: tensor.to(device, dtype or tensor.dtype, copy=True) for name, tensor in ours.items()}
    model.load_state_dict(ours, assign=True)

    tied = {
        key: name
        for key, name in family.tied.items()
        if key in carried and torch.equal(carried[key], body[dialect.spell(family.anchor)])
    }
    model.origin = Origin(
        dialect,
        raw_config,
        {key: tensor.clone() for key, tensor in carried.items() if key not in tied},
        tied,
        files.read_tokenizer_files(folder),
    )
    return model.eval()


def save(model: BertModel, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face checkpoint folder: config.json, model.safetensors, and the tokenizer's files if known.

    A model that was loaded gives back the keys, dtypes and config it came with, tensors of heads included; untouched
    parameters are bit-equal. A new model is written as transformers' BertModel would be. Each file is replaced
    atomically.

    Raises:
        ArgumentError: a file that would be written is something other than a file.
        CheckpointError: the parameters are not those of a BertModel.
    """
    state = model.state_dict()
    origin: Origin = model.origin or _standard_origin(model, state)
    theirs = to_theirs(state, origin.dialect.rules(model.config.num_layers))
    copies = {key: state[name].clone() for key, name in origin.tied.items()}
    files.write(Path(folder), origin.config, {**theirs, **origin.carried, **copies}, origin.others)


def _standard_origin(model: BertModel, state: Mapping[str, Tensor]) -> Origin:
    dtype = str(state["embeddings.word.weight"].dtype).removeprefix("torch.")
    config = {"architectures": ["BertModel"], "dtype": dtype, **model.config.to_hf()}
    return Origin(Dialect("bert", prefix="", old_norms=False, pooler=model.pooler is not None), config)


def _check_shapes(ours: Mapping[str, Tensor], model: BertModel) -> None:
    for name, parameter in model.state_dict().items():
        if ours[name].shape != parameter.shape:
            raise CheckpointError(
                f"parameter {name}",
                f"shape {tuple(ours[name].shape)}",
                f"{tuple(parameter.shape)}, as {files.CONFIG} says",
                "The weights and the config are of different models.",
            )
        if not ours[name].is_floating_point():
            raise CheckpointError(f"parameter {name}", f"{ours[name].dtype}", "a floating dtype")
