"""What a sentence-transformers folder says beside its transformer: pooling, layers behind it, lengths and prompts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoints import files
from fastbert.checkpoints.fields import Fields
from fastbert.errors import CheckpointError, shown
from fastbert.model.sentence import ACTIVATIONS, SIMILARITIES, Dense, Embedder, LayerNorm, Mode

MODULES = "modules.json"
# The transformer's settings; the first of these that is there, whatever the transformer.
SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
PROMPTS = "config_sentence_transformers.json"

# Names of fields before version 5, in the order in which what they ask for is put side by side.
_MODES: Mapping[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Classes of the first module, of the second, and of those after it.
_KNOWN = ("Transformer", "BERT"), ("Pooling",), ("Dense", "LayerNorm", "Normalize", "Dropout")
_IN_FOLDER = re.compile(r"\w[\w.-]*")
_SENTENCE = "sentence_embedding"  # what a module reads and writes, where its config names it
_INPUTS = ("module_input_name", "module_output_name")
# What the transformer's settings may say beside the two that are read: what they say by default.
_USUAL: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


@dataclass(frozen=True, eq=False)
class Recipe:
    """How texts become embeddings, as a folder has it.

    Attributes:
        embedder: what makes embeddings of hidden states; None where the folder has no modules to say it.
        max_length: most tokens of a text, special ones included; None where the folder sets no limit here.
        lower_case: texts are lowercased before the tokenizer gets them.
        prompts: what may be put before texts, by name.
        prompt_name: of the prompt that is put there by default; None for none.
        truncate_dim: how many columns of an embedding are kept; None for all.
        similarity: how alike embeddings are, a key of `SIMILARITIES`.
    """

    embedder: Embedder | None = None
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt_name: str | None = None
    truncate_dim: int | None = None
    similarity: str = "cosine"


def read_recipe(folder: Path, device: torch.device | str) -> tuple[Path, Recipe]:
    """The folder of the model and its tokenizer, and how texts become embeddings; the layers' weights are on `device`.

    Raises:
        CheckpointError: a file is missing or damaged, or asks for what fastbert does not do.
    """
    if not files.has(folder / MODULES):
        return folder, Recipe()
    names, places = _modules(folder)
    transformer = places[0]
    settings = _settings(transformer)
    defaults = _defaults(folder / PROMPTS)
    prompts, prompt_name = _prompts(defaults)
    return transformer, Recipe(
        _embedder(names[1:], places[1:], device),
        settings.whole("max_seq_length", 0, least=1) or None,
        settings.flag("do_lower_case", False),
        prompts,
        prompt_name,
        defaults.whole("truncate_dim", 0, least=1) or None,
        defaults.text("similarity_fn_name", "cosine", SIMILARITIES),
    )


def read_sentence_files(folder: Path) -> dict[str, bytes]:
    """The files that make a folder sentence-transformers', by their names in it; none where it is not.

    Raises:
        CheckpointError: one of them is unreadable or no regular file.
    """
    if not files.has(folder / MODULES):
        return {}
    modules = files.read_any_json(folder / MODULES)
    modules = modules if isinstance(modules, list) else []
    places = [module["path"] for module in modules if isinstance(module, dict) and isinstance(module.get("path"), str)]
    names = [MODULES, PROMPTS, *SETTINGS]
    for place in places:
        if _IN_FOLDER.fullmatch(place) and (folder / place).is_dir():
            names += [f"{place}/{path.name}" for path in sorted((folder / place).iterdir()) if path.is_file()]
    return {name: files.read_bytes(folder / name) for name in names if files.has(folder / name)}


def read_score_activation(folder: Path) -> str:
    """What a cross-encoder's folder applies to its one output, a key of `ACTIVATIONS`: by default Sigmoid.

    Raises:
        CheckpointError: a file is damaged, or asks for what fastbert does not do.
    """
    config = Fields(str(folder / files.CONFIG), files.read_config(folder))
    settings = Fields(str(folder / PROMPTS), files.read_json(folder / PROMPTS) if files.has(folder / PROMPTS) else {})
    if settings.text("model_type", "CrossEncoder") != "CrossEncoder":
        raise settings.error("model_type", "'CrossEncoder': one number for each text or pair")
    if settings.given("default_prompt_name"):
        raise settings.error("default_prompt_name", "null: prompts of cross-encoders are not served")
    default = "torch.nn.Identity" if config.values.get("problem_type") == "regression" else "torch.nn.Sigmoid"
    places = (  # of versions 5, 4 and before
        (settings, "activation_fn"),
        (Fields(f"{config.source}: sentence_transformers", config.mapping("sentence_transformers")), "activation_fn"),
        (config, "sbert_ce_default_activation_function"),
    )
    fields, name = next(((fields, name) for fields, name in places if fields.given(name)), (config, "activation_fn"))
    return _activation(fields, name, default)


def _modules(folder: Path) -> tuple[list[str], list[Path]]:
    """The classes of the modules, without their packages, and their folders."""
    path = folder / MODULES
    modules = files.read_any_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(str(path), shown(modules), "a list of modules")
    names, places = [], []
    for i, module in enumerate(modules):
        fields = Fields(f"{path}: [{i}]", module)
        kind, place = fields.text("type", ""), PurePosixPath(fields.text("path", ""))
        if place.is_absolute() or ".." in place.parts or "\\" in str(place):
            raise fields.error("path", "a folder in this one")
        name = kind.rpartition(".")[2]
        known = _KNOWN[min(i, 2)]
        if not kind.startswith("sentence_transformers.") or name not in known:
            mend = "fastbert serves a Transformer, a Pooling, and then Dense, LayerNorm and Normalize."
            if name in ("Router", "Asym"):
                mend = (
                    "It has an encoder for each kind of text: save the modules of one route as a folder of their own."
                )
            raise CheckpointError(f"{path}: module {i}", kind or "no type", " or ".join(known), mend)
        names.append(name)
        places.append(folder / place)
    if len(names) < 2:
        raise CheckpointError(str(path), f"{len(names)} modules", "a Transformer and a Pooling")
    return names, places


def _embedder(names: list[str], places: list[Path], device: torch.device | str) -> Embedder:
    read: Mapping[str, Callable[[Path, torch.device | str], Callable[[Tensor], Tensor]]] = {
        "Dense": _dense,
        "LayerNorm": _layer_norm,
        "Normalize": _normalise,
    }
    layers = [
        read[name](place, device)
        for name, place in zip(names[1:], places[1:], strict=True)
        if name != "Dropout"  # which does nothing but in training
    ]
    return Embedder(_pooling(places[0]), tuple(layers))


def _pooling(folder: Path) -> tuple[Mode, ...]:
    sizes = ("embedding_dimension", "word_embedding_dimension")  # told by the model itself
    fields = _module(folder, ("pooling_mode", "include_prompt", *_MODES, *sizes))
    if not fields.flag("include_prompt", True):
        raise fields.error("include_prompt", "true: a prompt is pooled like the rest of a text")
    given = fields.values.get("pooling_mode")
    if given is None:
        return tuple(mode for name, mode in _MODES.items() if fields.flag(name, False)) or ("mean",)
    modes = [given] if isinstance(given, str) else given
    if not isinstance(modes, list) or not modes or not all(mode in get_args(Mode) for mode in modes):
        raise fields.error("pooling_mode", f"one or several of {', '.join(get_args(Mode))}")
    return tuple(modes)


def _dense(folder: Path, device: torch.device | str) -> Dense:
    sizes = ("in_features", "out_features")
    fields = _module(folder, (*sizes, "bias", "activation_function", "use_residual", *_INPUTS))
    _check_input(fields)
    if fields.flag("use_residual", False):
        raise fields.error("use_residual", "false: a residual is not served")
    activation = _activation(fields, "activation_function", "torch.nn.Tanh")
    biased = fields.flag("bias", True)
    shape = (fields.whole("out_features", 0, least=1), fields.whole("in_features", 0, least=1))
    expected = {"linear.weight": shape} | ({"linear.bias": shape[:1]} if biased else {})
    tensors = _tensors(folder, expected, device)
    return Dense(tensors["linear.weight"], tensors.get("linear.bias"), activation)


def _layer_norm(folder: Path, device: torch.device | str) -> LayerNorm:
    shape = (_module(folder, ("dimension",)).whole("dimension", 0, least=1),)
    tensors = _tensors(folder, {"norm.weight": shape, "norm.bias": shape}, device)
    return LayerNorm(tensors["norm.weight"], tensors["norm.bias"])


def _tensors(folder: Path, expected: Mapping[str, tuple[int, ...]], device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a module, float32 on `device`; CheckpointError where they have other names or shapes."""
    tensors = files.read_tensors(folder)
    got = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if got != expected or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise CheckpointError(str(folder), f"tensors {shown(got)}", f"floating {expected}, as {files.CONFIG} says")
    return {key: tensor.to(device, torch.float32, copy=True) for key, tensor in tensors.items()}


def _module(folder: Path, known: Collection[str]) -> Fields:
    """The settings of a module, with a warning about those that are not `known`."""
    fields = Fields(str(folder / files.CONFIG), files.read_config(folder))
    _warn_of_unread(fields, known)
    return fields


def _warn_of_unread(fields: Fields, known: Collection[str]) -> None:
    for name, value in fields.values.items():
        if name not in known and value not in (None, {}, []):
            warnings.warn(f"{fields.source}: {name} is not read by fastbert: {shown(value)}", stacklevel=2)


def _activation(fields: Fields, name: str, default: str) -> str:
    path = fields.text(name, default)
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise fields.error(name, f"one of torch's {', '.join(ACTIVATIONS)}")
    return activation


def _normalise(folder: Path, _: torch.device | str) -> Callable[[Tensor], Tensor]:
    if files.has(folder / files.CONFIG):  # versions before 5.2 write none, and no folder
        _check_input(_module(folder, _INPUTS))
    return F.normalize


def _check_input(fields: Fields) -> None:
    for name in _INPUTS:
        if fields.text(name, _SENTENCE) != _SENTENCE:
            raise fields.error(name, repr(_SENTENCE))


def _settings(folder: Path) -> Fields:
    path = next((folder / name for name in SETTINGS if files.has(folder / name)), None)
    fields = Fields(str(path), {} if path is None else files.read_json(path))
    for name, value in fields.values.items():
        if name in _USUAL and value not in (None, _USUAL[name]):
            raise fields.error(name, shown(_USUAL[name]))
    _warn_of_unread(fields, ("max_seq_length", "do_lower_case", "unpad_inputs", *_USUAL))
    return fields


def _defaults(path: Path) -> Fields:
    fields = Fields(str(path), files.read_json(path) if files.has(path) else {})
    if fields.text("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise fields.error("model_type", "'SentenceTransformer': one embedding for each text")
    read = ("prompts", "default_prompt_name", "truncate_dim", "similarity_fn_name")
    _warn_of_unread(fields, ("__version__", "model_type", *read))
    return fields


def _prompts(fields: Fields) -> tuple[dict[str, str], str | None]:
    prompts = {name: "" if prompt is None else prompt for name, prompt in fields.mapping("prompts").items()}
    if not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise fields.error("prompts", "strings by their names")
    name = fields.text("default_prompt_name", "") or None
    if name is not None and name not in prompts:
        raise fields.error("default_prompt_name", f"one of the prompts {', '.join(prompts) or '(there are none)'}")
    return prompts, name
