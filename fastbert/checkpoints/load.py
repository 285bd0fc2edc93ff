"""`fastbert.load` and `fastbert.save`: a Hugging Face checkpoint folder to a model and back, bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor

from fastbert.backend import usable_device
from fastbert.checkpoints import files
from fastbert.checkpoints.architectures import FAMILIES, Dialect, architectures, recognise, split
from fastbert.checkpoints.sentence import read_sentence_files
from fastbert.config import HF_NAMES, EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError, CheckpointError, UntrainedWarning, shown
from fastbert.model.bert import BertModel
from fastbert.model.encoder import initialise
from fastbert.model.heads import HeadModel, body_of
from fastbert.model.mapping import KEYS_SHOWN, head_rules, to_ours, to_theirs

WithHead = TypeVar("WithHead", bound=HeadModel)
Kind = TypeVar("Kind", bound=BertModel | HeadModel)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Of the classes whose head is called "classifier", what their names end with.
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")


@dataclass(frozen=True, eq=False)
class Origin:
    """What `load` learned about a checkpoint besides the model, so that `save` can give the same one back.

    Attributes:
        dialect: how it spells its keys.
        config: the dict of its config.json.
        carried: tensors that fastbert does not compute with, by their own keys.
        tied: keys of tensors equal to another of the checkpoint, and its key.
        others: contents of its tokenizer's files, and of a body's sentence-transformers files, by name.
    """

    dialect: Dialect
    config: Mapping[str, Any]
    carried: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    tied: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@overload
def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    frozen: bool = False,
) -> BertModel: ...


@overload
def load(
    folder: str | os.PathLike[str],
    kind: type[WithHead],
    *,
    head: HeadConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    frozen: bool = False,
) -> WithHead: ...


def load(
    folder: str | os.PathLike[str],
    kind: type[BertModel] | type[HeadModel] = BertModel,
    *,
    head: HeadConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    frozen: bool = False,
) -> BertModel | HeadModel:
    """The model in a Hugging Face checkpoint folder, in eval mode.

    Args:
        folder: holds config.json and the weights: model.safetensors or pytorch_model.bin, whole or in shards. Code in a
            pickle is refused, never run.
        kind: BertModel, or a class of `fastbert.model.heads`.
        head: labels and the like, for a model with a head; what config.json says by default.
        dtype: floating dtype of the parameters; what the checkpoint has by default. Where it has several, that is the
            one config.json names, else the widest, and a warning says so.
        device: where the parameters live; the CPU by default.
        frozen: it will never train. No parameter requires a gradient, and where kernels of this CPU compute the encoder
            its weights lie only as these read them, so that they take their memory once; `Encoder.freeze` says more.

    A BertModel keeps the tensors of heads on `model.origin`, and `save` writes them back. A model with a head takes
    its head from the checkpoint. Parts that are not there begin untrained, and a warning names them; so does a
    classifier of another task or of other labels. Tensors that are of no BERT are kept like those of heads, and a
    warning names them.

    Raises:
        CheckpointError: a file is missing or damaged, the family is not supported, config.json asks for what the model
            does not do, keys or shapes do not fit, a weight is NaN or infinite, or a masked-token decoder is not tied
            to the word embeddings.
        ArgumentError: `dtype` is not floating, `kind` no such class, torch can't use `device` here, or `head` is given
            without a head.
    """
    if not isinstance(frozen, bool):
        raise ArgumentError("frozen", repr(frozen), "True or False")
    model, untrained = read_model(folder, kind, head=head, dtype=dtype, device=device)
    if untrained:
        message = f"{folder} has no trained {', '.join(untrained)} for {kind.__name__}: train the model before use"
        warnings.warn(message, UntrainedWarning, stacklevel=2)
    if frozen:
        model.requires_grad_(False)
        body_of(model).encoder.freeze()
    return model


def read_model(
    folder: str | os.PathLike[str],
    kind: type[Kind],
    *,
    head: HeadConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Kind, list[str]]:
    """As `load`, and instead of a warning the names of the parts that begin untrained."""
    if dtype not in (None, *DTYPES):
        expected = "a floating torch.dtype of 16, 32 or 64 bits, or None for the checkpoint's own"
        raise ArgumentError("dtype", repr(dtype), expected, "Write torch.float32, say.")
    if not (isinstance(kind, type) and issubclass(kind, (BertModel, HeadModel))):
        raise ArgumentError("kind", shown(kind), "BertModel or one of fastbert.BertFor...: the class, not its name")
    if device is not None:
        device = usable_device(device)
    if head is not None and not issubclass(kind, HeadModel):
        raise ArgumentError("head", head, "None for a BertModel", "Name one of fastbert.BertFor... as kind.")
    folder = files.checkpoint_folder(folder)
    raw_config = files.read_config(folder)
    state = files.read_tensors(folder)
    dialect = recognise(raw_config, state)
    known_head: HeadConfig | None = None
    try:
        config = FAMILIES[dialect.family].config(raw_config)
        if issubclass(kind, HeadModel):
            known_head = HeadConfig.from_hf(raw_config)
    except ArgumentError as error:
        name = error.argument.removeprefix("config.")
        raise CheckpointError(f"{folder / files.CONFIG}: {name}", error.got, error.expected, error.mend) from error
    _check_sizes(config, state, folder / files.CONFIG)

    taken: list[str] | None = None
    fresh: list[str] = []
    with torch.device("meta"):
        if issubclass(kind, HeadModel):
            assert known_head is not None
            model: BertModel | HeadModel = kind(config, head or known_head)
            taken = _trained_parts(
                kind, raw_config, state, same_labels=head is None or head.labels == known_head.labels
            )
            fresh = [part for part in kind.parts if part not in taken]
            if kind.pooler and not dialect.pooler:
                fresh.append("bert.pooler")
            body = replace(dialect, pooler=kind.pooler and dialect.pooler)
        else:
            model = BertModel(config, pooler=dialect.pooler)
            body = dialect
    rules = body.rules(config.num_layers, taken)
    parts = split(state, dialect, {name for rule in rules for name in rule.theirs})
    if parts.strangers:
        names = ", ".join(parts.strangers[:KEYS_SHOWN]) + (", ..." if len(parts.strangers) > KEYS_SHOWN else "")
        warnings.warn(f"{folder} has tensors that no {kind.__name__} computes with: {names}", stacklevel=3)
    _check_finite(parts.known, folder)
    dtypes = {tensor.dtype for tensor in parts.known.values()}
    if dtype is None and len(dtypes) > 1 and dtypes <= set(DTYPES):
        dtype = _one_dtype(raw_config, dtypes)
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        warnings.warn(f"{folder} has tensors of {names}; the model is {dtype_name(dtype)}", stacklevel=3)
    if dtype is not None:  # transformers loads in what the config names; its versions before 5 say torch_dtype
        raw_config |= {key: dtype_name(dtype) for key in ("dtype", "torch_dtype") if key in raw_config}
        if len(dtypes) > 1:  # q, k and v are joined
            parts.known.update({key: tensor.to(dtype) for key, tensor in parts.known.items() if tensor.dtype in DTYPES})
    ours = to_ours(parts.known, rules)
    _check_shapes(ours, model)
    # Copies, because tensors that were read may map the file or share memory.
    ours = {name: tensor.to(device, dtype or tensor.dtype, copy=True) for name, tensor in ours.items()}
    model.load_state_dict(ours, assign=True, strict=not fresh)
    body_of(model).encoder.join()
    for part in fresh:
        module = model.get_submodule(part).to_empty(device="cpu")
        initialise(module, config.initializer_range)
        module.to(device, next(iter(ours.values())).dtype)

    carried = parts.carried
    tied = {
        key: to
        for key, to in dialect.tied().items()
        if key in carried and to in state and torch.equal(carried[key], state[to])
    }
    if isinstance(model, HeadModel) and "predictions" in model.parts:
        _check_tied(raw_config, dialect, carried, tied)
    others = files.read_tokenizer_files(folder)
    if isinstance(model, BertModel):  # what makes embeddings of it; a head makes something else
        others |= read_sentence_files(folder)
    same = not fresh and head in (None, known_head) and kind.__name__ in architectures(raw_config)
    if same or isinstance(model, BertModel):
        carried = {key: tensor.clone() for key, tensor in carried.items() if key not in tied}
        model.origin = Origin(body, raw_config, carried, tied, others)
    else:
        standard = _standard_origin(model)
        model.origin = replace(standard, config={**raw_config, **standard.config}, others=others)
    return cast(Kind, model.eval()), [part.removeprefix("bert.") for part in fresh]


def trained_head(folder: str | os.PathLike[str], kind: type[HeadModel]) -> HeadConfig | None:
    """Labels and the like of the head of this kind that the folder has; None where `load` would begin one untrained.

    Raises:
        CheckpointError: a file is missing or damaged.
        ArgumentError: config.json does not say which labels there are.
    """
    folder = files.checkpoint_folder(folder)
    config = files.read_config(folder)
    taken = _trained_parts(kind, config, files.read_tensors(folder), same_labels=True)
    return HeadConfig.from_hf(config) if set(kind.parts) <= set(taken) else None


def save(model: BertModel | HeadModel, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face checkpoint folder: config.json, model.safetensors, and the tokenizer's files if known.

    A model that was loaded gives back the keys, dtypes and config it came with, tensors of other heads included;
    untouched parameters are bit-equal. A new model, and one whose head began untrained, is written as transformers'
    class of the same name would be. Each file is replaced atomically.

    Raises:
        ArgumentError: `model` is no model of fastbert, `folder` no path, or a file that would be written is something
            other than a file.
        CheckpointError: the parameters are not those of the model's class.
    """
    if not isinstance(model, BertModel | HeadModel):
        mend = "A model of transformers has save_pretrained, and a TextEncoder has its model as `model`."
        raise ArgumentError("model", f"a {type(model).__name__}", "a BertModel of fastbert, or one with a head", mend)
    path = files.path_of(folder)
    origin: Origin = model.origin or _standard_origin(model)
    parts = model.parts if isinstance(model, HeadModel) else None
    layers = len(body_of(model).encoder.layer)
    tensors = to_theirs(model.state_dict(), origin.dialect.rules(layers, parts))
    tensors |= origin.carried
    copies = {key: tensors[to].clone() for key, to in origin.tied.items()}
    files.write(path, {**origin.config, "num_hidden_layers": layers}, tensors | copies, origin.others)


def _trained_parts(
    kind: type[HeadModel], config: Mapping[str, Any], state: Mapping[str, Tensor], *, same_labels: bool
) -> list[str]:
    """The parts of `kind` that the checkpoint has.

    All classifiers have one name, so one is not taken where config.json names the class of another task. It may name a
    class of which nothing is known, or one without a classifier: people copy config.json from other checkpoints.
    """
    others = tuple(task for task in CLASSIFIERS if not kind.__name__.endswith(task))
    named = architectures(config)
    same_task = kind.__name__ in named or not any(name.endswith(others) for name in named)
    return [
        part
        for part in kind.parts
        if any(rule.theirs[0] in state for rule in head_rules([part]))
        and (part != "classifier" or (same_labels and same_task))
    ]


def _one_dtype(config: Mapping[str, Any], dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Of tensors of several dtypes: what config.json names, else the widest."""
    by_name = {dtype_name(dtype): dtype for dtype in DTYPES}
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        if isinstance(named, str) and named.removeprefix("torch.") in by_name:
            return by_name[named.removeprefix("torch.")]
    return reduce(torch.promote_types, dtypes)


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it: "float32"."""
    return str(dtype).removeprefix("torch.")


def _check_sizes(config: EncoderConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for sizes that the tensors can't have: a model of them might never be built."""
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    bounds = {
        "num_layers": (len(state), f"fewer layers than the {len(state)} tensors of the weights"),
        **dict.fromkeys(
            ("vocab_size", "hidden_size", "intermediate_size", "max_positions", "type_vocab_size"),
            (largest, f"at most {largest}, the largest size of a tensor of the weights"),
        ),
    }
    for name, (most, expected) in bounds.items():
        if getattr(config, name) > most:
            raise CheckpointError(f"{path}: {HF_NAMES[name]}", getattr(config, name), expected)


def _check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError for a NaN or an infinity: every result would be one."""
    for key, tensor in tensors.items():
        # The sum is the fastest pass; it may overflow by itself. Dtypes that no weight has are refused later, by name.
        if tensor.dtype not in DTYPES or tensor.sum().isfinite():
            continue
        if broken := int((~tensor.isfinite()).sum()):
            got = f"{broken} of {tensor.numel()} numbers that are NaN or infinite"
            mend = "Take weights from before training diverged, or download anew."
            raise CheckpointError(f"{folder}: {key}", got, "finite numbers", mend)


def _check_tied(
    config: Mapping[str, Any], dialect: Dialect, carried: Mapping[str, Tensor], tied: Mapping[str, str]
) -> None:
    """Raise CheckpointError where the decoder of masked-token prediction is a tensor of its own."""
    for key, to in dialect.tied().items():
        if (key in carried and key not in tied) or config.get("tie_word_embeddings") is False:
            raise CheckpointError(
                key, f"a tensor other than {to}", f"one tied to {to}", "Only tied decoders are served."
            )


def _standard_origin(model: BertModel | HeadModel) -> Origin:
    """Of a model that was not loaded: as transformers writes it."""
    body, prefix, fields = (
        (model.bert, "bert.", model.head_config.to_hf()) if isinstance(model, HeadModel) else (model, "", {})
    )
    dtype = dtype_name(body.embeddings.word.weight.dtype)
    config = {"architectures": [type(model).__name__], "dtype": dtype, **model.config.to_hf(), **fields}
    return Origin(Dialect("bert", prefix, old_norms=False, pooler=body.pooler is not None), config)


def _check_shapes(ours: Mapping[str, Tensor], model: BertModel | HeadModel) -> None:
    parameters = model.state_dict()
    for name in ours:
        parameter = parameters[name]
        if ours[name].shape != parameter.shape:
            raise CheckpointError(
                f"parameter {name}",
                f"shape {tuple(ours[name].shape)}",
                f"{tuple(parameter.shape)}, as {files.CONFIG} says",
                "The weights and the config are of different models.",
            )
        if ours[name].dtype not in DTYPES:
            raise CheckpointError(f"parameter {name}", f"{ours[name].dtype}", "a floating dtype of 16, 32 or 64 bits")
