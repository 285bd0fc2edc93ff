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
from torch import Tensor, nn

from fastbert.backend import usable_device
from fastbert.checkpoints import files, int8
from fastbert.checkpoints.architectures import Dialect, architectures, recognise, split
from fastbert.checkpoints.sentence import read_sentence_files
from fastbert.config import HF_NAMES, EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError, CheckpointError, UntrainedWarning, shown
from fastbert.families import FAMILIES
from fastbert.families.keys import head_names, names_once
from fastbert.families.quantization import refuse_to_save, with_scales
from fastbert.model.body import EncoderModel
from fastbert.model.encoder import initialise
from fastbert.model.heads import HeadModel, body_of
from fastbert.model.mapping import KEYS_SHOWN, to_ours, to_theirs

WithHead = TypeVar("WithHead", bound=HeadModel)
Kind = TypeVar("Kind", bound=EncoderModel | HeadModel)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Of the classes whose head is called "classifier", what their names end with.
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")

# What transformers' models give by default as config.json says, and what they give where it says nothing.
RESULTS = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


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
) -> EncoderModel: ...


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
    kind: type[EncoderModel] | type[HeadModel] = EncoderModel,
    *,
    head: HeadConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    frozen: bool = False,
) -> EncoderModel | HeadModel:
    """The model in a Hugging Face checkpoint folder, in eval mode.

    Args:
        folder: holds config.json and the weights: model.safetensors or pytorch_model.bin, whole or in shards. Code in a
            pickle is refused, never run.
        kind: EncoderModel, or a class of `fastbert.model.heads`.
        head: labels and the like, for a model with a head; what config.json says by default. Its dropout is that of
            config.json too where it is None.
        dtype: floating dtype of the parameters; what the checkpoint has by default. Where it has several, that is the
            one config.json names, else the widest, and a warning says so. A folder that `fastbert.convert` put in int8
            stays so, for a CPU, and its other parameters are float32.
        device: where the parameters live; the CPU by default.
        frozen: it will never train. No parameter requires a gradient, and where kernels of this CPU compute the encoder
            its weights lie only as these read them, so that they take their memory once; `Encoder.freeze` says more.

    An EncoderModel keeps the tensors of heads on `model.origin`, and `save` writes them back. A model with a head takes
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
        name = model.origin.dialect.class_name(kind)
        message = f"{folder} has no trained {', '.join(untrained)} for {name}: train the model before use"
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
    if not (isinstance(kind, type) and issubclass(kind, (EncoderModel, HeadModel))):
        raise ArgumentError(
            "kind", shown(kind), "EncoderModel or one of fastbert.EncoderFor...: the class, not its name"
        )
    if device is not None:
        device = usable_device(device)
    if head is not None and not issubclass(kind, HeadModel):
        raise ArgumentError("head", head, "None for an EncoderModel", "Name one of fastbert.EncoderFor... as kind.")
    folder = files.checkpoint_folder(folder)
    raw_config = files.read_config(folder)
    state, scales = files.read_tensors(folder), dict[str, Tensor]()
    kept_in_int8 = int8.in_int8(raw_config, folder / files.CONFIG)
    if kept_in_int8:
        if dtype not in (None, torch.float32):
            mend = "To have it in floats: fastbert convert --dtype fp32"
            raise ArgumentError("dtype", dtype, "None or torch.float32, for a folder in int8", mend)
        state, scales = int8.from_int8(state, folder)
        raw_config = {name: value for name, value in raw_config.items() if name != int8.FIELD}
    dialect = recognise(raw_config, state)
    known_head: HeadConfig | None = None
    family = FAMILIES[dialect.family]
    try:
        config = family.read_config(raw_config, kind.reads if issubclass(kind, HeadModel) else None)
        if issubclass(kind, HeadModel):
            known_head = family.read_head(raw_config, kind.reads)
            if head is not None and head.classifier_dropout is None:
                head = replace(head, classifier_dropout=known_head.classifier_dropout)
    except ArgumentError as error:
        name = error.argument.removeprefix("config.")
        raise CheckpointError(f"{folder / files.CONFIG}: {name}", error.got, error.expected, error.mend) from error
    _check_sizes(config, state, folder / files.CONFIG)
    if asked := [name for name, usual in RESULTS.items() if raw_config.get(name, usual) not in (usual, None)]:
        message = f"{folder / files.CONFIG}: {', '.join(asked)}: a model of fastbert gives what a call asks it for"
        warnings.warn(message, stacklevel=3)

    fresh: list[str] = []
    with torch.device("meta"):
        if issubclass(kind, HeadModel):
            assert known_head is not None
            with_head = kind(config, head or known_head)
            model: EncoderModel | HeadModel = with_head
            same_labels = head is None or head.labels == known_head.labels
            taken = _trained_parts(dialect, kind, raw_config, state, same_labels=same_labels)
            fresh = [part for part in with_head.own_parts() if part not in taken]
            if with_head.bert.pooler is not None and not dialect.pooler:
                fresh.append("bert.pooler")
        else:
            model = EncoderModel(config, pooler=dialect.pooler)
    rules = [rule for rule in dialect.rules(model) if not any(_is_in(rule.ours[0], part) for part in fresh)]
    parts = split(state, dialect, {name for rule in rules for name in rule.theirs})
    if parts.strangers:
        names = ", ".join(parts.strangers[:KEYS_SHOWN]) + (", ..." if len(parts.strangers) > KEYS_SHOWN else "")
        warnings.warn(f"{folder} has tensors that no {dialect.class_name(kind)} computes with: {names}", stacklevel=3)
    _check_finite(parts.known, folder)
    dtypes = {tensor.dtype for tensor in parts.known.values()}
    if dtype is None and len(dtypes) > 1 and dtypes <= set(DTYPES):
        dtype = _one_dtype(raw_config, dtypes)
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        warnings.warn(f"{folder} has tensors of {names}; the model is {dtype_name(dtype)}", stacklevel=3)
    if dtype is not None:  # transformers loads in what the config names; its versions before 5 say torch_dtype
        raw_config |= {key: dtype_name(dtype) for key in ("dtype", "torch_dtype") if key in raw_config}
        if len(dtypes) > 1:  # several are joined
            parts.known.update({key: tensor.to(dtype) for key, tensor in parts.known.items() if tensor.dtype in DTYPES})
    ours = to_ours(parts.known, rules)
    _check_shapes(ours, model)
    # Copies, because tensors that were read may map the file or share memory.
    ours = {name: tensor.to(device, dtype or tensor.dtype, copy=True) for name, tensor in ours.items()}
    model.load_state_dict(_for_each_name(model, ours), assign=True, strict=not fresh)
    body_of(model).encoder.join()
    for part in fresh:
        module = model.get_submodule(part).to_empty(device="cpu")
        initialise(module, config.initializer_range)
        module.to(device, next(iter(ours.values())).dtype)
    model.eval()
    if kept_in_int8:
        try:
            model = with_scales(model, to_ours(scales, [rule for rule in rules if set(rule.theirs) <= scales.keys()]))
        except ArgumentError as error:
            raise CheckpointError(f"{folder}: {error.argument}", error.got, error.expected) from error

    carried = parts.carried
    tied = {
        key: to
        for key, to in dialect.tied().items()
        if key in carried and to in state and torch.equal(carried[key], state[to])
    }
    if isinstance(model, HeadModel) and "predictions" in model.parts:
        _check_tied(raw_config, dialect, carried, tied)
    others = files.read_tokenizer_files(folder)
    if isinstance(model, EncoderModel):  # what makes embeddings of it; a head makes something else
        others |= read_sentence_files(folder)
    same = not fresh and head in (None, known_head) and dialect.class_name(kind) in architectures(raw_config)
    if same or isinstance(model, EncoderModel):
        carried = {key: tensor.clone() for key, tensor in carried.items() if key not in tied}
        model.origin = Origin(dialect, raw_config, carried, tied, others)
    else:
        standard = _standard_origin(model, dialect.family)
        model.origin = replace(standard, config={**raw_config, **standard.config}, others=others)
    return cast("Kind", model), [part.removeprefix("bert.") for part in fresh]


def trained_head(folder: str | os.PathLike[str], kind: type[HeadModel]) -> HeadConfig | None:
    """Labels and the like of the head of this kind that the folder has; None where `load` would begin one untrained.

    Raises:
        CheckpointError: a file is missing or damaged.
        ArgumentError: config.json does not say which labels there are.
    """
    folder = files.checkpoint_folder(folder)
    config, state = files.read_config(folder), files.read_tensors(folder)
    dialect = recognise(config, state)
    if (names := FAMILIES[dialect.family].heads.get(kind.__name__.removeprefix("Encoder"))) is None:
        return None
    wanted = {part for part in kind.parts if any(_is_in(ours, part) for ours in names)}
    taken = _trained_parts(dialect, kind, config, state, same_labels=True)
    return FAMILIES[dialect.family].read_head(config, kind.reads) if wanted <= set(taken) else None


def save(model: EncoderModel | HeadModel, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face checkpoint folder: config.json, model.safetensors, and the tokenizer's files if known.

    A model that was loaded gives back the keys, dtypes and config it came with, tensors of other heads included;
    untouched parameters are bit-equal. A new model, and one whose head began untrained, is written as transformers'
    class of the same name would be. Each file is replaced atomically.

    Raises:
        ArgumentError: `model` is no model of fastbert, `folder` no path, or a file that would be written is something
            other than a file.
        CheckpointError: the parameters are not those of the model's class, or it is quantized.
    """
    if not isinstance(model, EncoderModel | HeadModel):
        mend = "A model of transformers has save_pretrained, and a TextEncoder has its model as `model`."
        raise ArgumentError(
            "model", f"a {type(model).__name__}", "an EncoderModel of fastbert, or one with a head", mend
        )
    if body_of(model).encoder.in_eight_bits() is not None:
        refuse_to_save()
    path = files.path_of(folder)
    origin: Origin = model.origin or _standard_origin(model, _family_of(model))
    state = model.state_dict()
    tensors = to_theirs({name: state[name] for name in names_once(model)}, origin.dialect.rules(model))
    tensors |= origin.carried
    copies = {key: tensors[to].clone() for key, to in origin.tied.items()}
    layers = {FAMILIES[origin.dialect.family].num_layers: len(body_of(model).encoder.layer)}
    files.write(path, {**origin.config, **layers}, tensors | copies, origin.others)


def _for_each_name(model: nn.Module, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`ours` under all names: of parameters that several layers share each layer has one."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    names = ((name, first[id(parameter)]) for name, parameter in model.named_parameters(remove_duplicate=False))
    return {name: ours[given] for name, given in names if given in ours}


def _is_in(name: str, part: str) -> bool:
    """Whether a parameter or module is in a module."""
    return f"{name}.".startswith(f"{part}.")


def _family_of(model: EncoderModel | HeadModel) -> str:
    """Of a model that was not loaded."""
    config = model.config
    if not config.type_vocab_size or config != EncoderConfig.from_hf(config.to_hf()):
        mend = "Load a checkpoint of its family, and change that."
        raise ArgumentError("model", "a new model of another shape than BERT's", "one that BERT's config can say", mend)
    return "bert"


def _trained_parts(
    dialect: Dialect,
    kind: type[HeadModel],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    same_labels: bool,
) -> list[str]:
    """The parts of `kind` that the checkpoint has.

    All classifiers have one name, so one is not taken where config.json names the class of another task. It may name a
    class of which nothing is known, or one without a classifier: people copy config.json from other checkpoints.
    """
    others = tuple(task for task in CLASSIFIERS if not kind.__name__.endswith(task))
    named = architectures(config)
    same_task = dialect.class_name(kind) in named or not any(name.endswith(others) for name in named)
    names = head_names(FAMILIES[dialect.family], kind)
    held = {
        part for part in kind.parts for ours, theirs in names.items() if _is_in(ours, part) and _holds(state, theirs)
    }
    return [part for part in kind.parts if part in held and (part != "classifier" or (same_labels and same_task))]


def _holds(state: Mapping[str, Tensor], module: str) -> bool:
    """Whether a checkpoint has the parameter or the module of this name."""
    return any(key in state for key in (module, f"{module}.weight", f"{module}.gamma", f"{module}.bias"))


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
    positions = () if config.positions == "none" else ("max_positions",)
    bounds = {
        "num_layers": (len(state), f"fewer layers than the {len(state)} tensors of the weights"),
        **dict.fromkeys(
            ("vocab_size", "hidden_size", "intermediate_size", "type_vocab_size", *positions),
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


def _standard_origin(model: EncoderModel | HeadModel, family: str) -> Origin:
    """Of a model that was not loaded, or with another head than its checkpoint: as transformers writes it."""
    body, has_head = body_of(model), isinstance(model, HeadModel)
    prefix = FAMILIES[family].prefix if has_head else ""
    dialect = Dialect(family, prefix, old_norms=False, pooler=body.pooler is not None)
    dtype = dtype_name(body.embeddings.word.weight.dtype)
    config: dict[str, Any] = {"architectures": [dialect.class_name(type(model))], "dtype": dtype}
    if family == "bert":
        config |= model.config.to_hf()
    if isinstance(model, HeadModel):
        config |= FAMILIES[family].write_head(model.head_config, model.reads)
    return Origin(dialect, config)


def _check_shapes(ours: Mapping[str, Tensor], model: EncoderModel | HeadModel) -> None:
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
