"""What a checkpoint is, told from its config.json and from its keys."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastbert.checkpoints.fields import Fields
from fastbert.checkpoints.files import CONFIG
from fastbert.errors import CheckpointError, shown
from fastbert.families import FAMILIES
from fastbert.families.bert import BERT
from fastbert.families.keys import key_rules
from fastbert.families.names import Family
from fastbert.model.body import EncoderModel
from fastbert.model.heads import HeadModel
from fastbert.model.mapping import KEYS_SHOWN, Rule


@dataclass(frozen=True)
class Dialect:
    """How one checkpoint spells the keys of its body.

    Attributes:
        family: a key of `FAMILIES`: the model_type, or the name of a form of that family.
        prefix: before each key of the body; "" or one of the family's.
        old_norms: LayerNorm's weight and bias are called gamma and beta.
        pooler: there is a pooler.
        old_head_norms: as `old_norms`, in the head.
    """

    family: str
    prefix: str
    old_norms: bool
    pooler: bool
    old_head_norms: bool = False

    def spell(self, key: str) -> str:
        """A standard key of the body as this dialect writes it."""
        return self.prefix + (_old(key) if self.old_norms else key)

    def rules(self, model: EncoderModel | HeadModel) -> list[Rule]:
        """The rules between this checkpoint and our model of it."""
        return key_rules(FAMILIES[self.family], model, self.spell, _old if self.old_head_norms else str)

    def tied(self) -> dict[str, str]:
        """The family's `tied`, both keys as this dialect writes them."""
        family = FAMILIES[self.family]
        return {key: self.spell(to) if to == family.anchor else to for key, to in family.tied.items()}

    def class_name(self, kind: type[nn.Module]) -> str:
        """What transformers calls our class in this family."""
        family, ending = FAMILIES[self.family], kind.__name__.removeprefix("Encoder")
        return family.class_names.get(ending, family.model_types[self.family] + ending)


def _old(key: str) -> str:
    return key.replace(".LayerNorm.weight", ".LayerNorm.gamma").replace(".LayerNorm.bias", ".LayerNorm.beta")


def recognise(config: Mapping[str, Any], keys: Iterable[str]) -> Dialect:
    """The dialect of a checkpoint.

    Args:
        config: the dict of config.json; `model_type` decides, or `architectures` or the keys where it is missing.
        keys: the names of its tensors.

    Raises:
        CheckpointError: the family is not one of `FAMILIES`, or the keys have no word embeddings.
    """
    keys = set(keys)
    name = _family_name(config, keys)
    family = FAMILIES[name]
    for prefix in ("", family.prefix, *family.other_prefixes):
        if prefix + family.anchor in keys:
            old_norms = any(key.startswith(prefix) and key.endswith("LayerNorm.gamma") for key in keys)
            old_head_norms = any(key.startswith(family.carried) and key.endswith("LayerNorm.gamma") for key in keys)
            pooler = any(key.startswith(f"{prefix}{family.body.get('pooler')}.") for key in keys)
            return Dialect(name, prefix, old_norms, pooler, old_head_norms)
    some = ", ".join(sorted(keys)[:KEYS_SHOWN]) or "no keys"
    wrappers = {key[: -len(family.anchor)].removesuffix(family.prefix) for key in keys if key.endswith(family.anchor)}
    raise CheckpointError(
        "state dict",
        some,
        f"{family.anchor}, with or without {family.prefix!r} before it",
        f"Save the model that is inside, without the {wrappers.pop()!r} before its keys." if wrappers else "",
    )


@dataclass(frozen=True)
class Parts:
    """The tensors of a checkpoint, by their own keys.

    Attributes:
        known: those that a model computes with, and those of its body that nobody knows.
        carried: those that are only carried along.
        strangers: keys of `carried` that are no part of a BERT.
    """

    known: dict[str, Tensor]
    carried: dict[str, Tensor]
    strangers: list[str]


def split(state: Mapping[str, Tensor], dialect: Dialect, used: Collection[str]) -> Parts:
    """The tensors of a checkpoint, told apart; `used` are the keys that a model computes with."""
    family = FAMILIES[dialect.family]
    body = dialect.prefix or tuple(f"{name}." for name in _beginnings(family))
    parts = Parts({}, {}, [])
    for key, tensor in state.items():
        if key in used:
            parts.known[key] = tensor
        elif key.removeprefix(dialect.prefix).startswith(family.carried):
            parts.carried[key] = tensor
        elif key.startswith(body):
            parts.known[key] = tensor
        else:
            parts.carried[key] = tensor
            parts.strangers.append(key)
    return parts


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes that config.json names.

    Raises:
        CheckpointError: they are no list of strings.
    """
    return Fields(CONFIG, config).texts("architectures")


def _beginnings(family: Family) -> set[str]:
    """How the keys of a body begin, relative to its prefix."""
    spelled = [one for names in family.body.values() for one in ((names,) if isinstance(names, str) else names)]
    return {name.partition(".")[0] for name in (*spelled, family.layer, *filter(None, [family.last_norm]))}


def _signature(family: Family) -> set[str]:
    """Keys without a prefix that together tell a body from others."""
    tables = [family.body[f"embeddings.{name}"] for name in ("word", "position", "token_type")]
    return {f"{name}.weight" for name in (*tables, f"{family.layer.format(0)}.{family.names.query}")}


def _family_name(config: Mapping[str, Any], keys: set[str]) -> str:
    model_type = config.get("model_type")
    if model_type is None:
        classes = architectures(config)
        for name, family in FAMILIES.items():
            begins = family.model_types[name]
            if any(one.startswith(begins) for one in classes[:1]) or family.prefix + family.anchor in keys:
                model_type = family.form_of or name
                break
        if model_type is None and not classes and _signature(BERT) <= keys:
            warnings.warn(f"{CONFIG} names no model_type; by its keys it is read as bert", stacklevel=2)
            return "bert"
    known = [name for name, family in FAMILIES.items() if family.form_of is None]
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            "config.model_type", shown(model_type), f"one of {', '.join(known)}", "Other families are not read yet."
        )
    forms = {name: family for name, family in FAMILIES.items() if family.form_of == model_type}
    told = (name for name, family in forms.items() if family.told_by is not None and family.told_by(config, keys))
    return next(told, model_type)
