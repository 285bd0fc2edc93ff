"""What a checkpoint is, told from its config.json and from its keys."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.checkpoints.fields import Fields
from fastbert.checkpoints.files import CONFIG
from fastbert.config import EncoderConfig
from fastbert.errors import CheckpointError, shown
from fastbert.model.mapping import KEYS_SHOWN, Rule, bert_rules, head_rules


@dataclass(frozen=True)
class Family:
    """One kind of model: how its checkpoints are written.

    Attributes:
        config: reads the dict of its config.json.
        rules: `(num_layers, pooler=...)` -> the rules between our model and theirs, without a prefix.
        prefix: what a model with a head puts before the keys of its body.
        anchor: a key that every body has.
        signature: keys without a prefix that together tell a body from those of other families.
        pooler: how the keys of a body's pooler begin.
        body: how the keys of a body begin, all of them, relative to its prefix.
        carried: beginnings of keys that a model need not compute with, but saves as they came; those of the body are
            relative to its prefix.
        tied: keys of a head that a file may hold although they are the same tensor as another, and its key.
    """

    config: Callable[[Any], EncoderConfig]
    rules: Callable[..., list[Rule]]
    prefix: str
    anchor: str
    signature: tuple[str, ...]
    pooler: str
    body: tuple[str, ...]
    carried: tuple[str, ...]
    tied: Mapping[str, str]


FAMILIES = {
    "bert": Family(
        config=EncoderConfig.from_hf,
        rules=bert_rules,
        prefix="bert.",
        anchor="embeddings.word_embeddings.weight",
        signature=(
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "encoder.layer.0.attention.self.query.weight",
        ),
        pooler="pooler.",
        body=("embeddings.", "encoder.", "pooler."),
        carried=(
            "cls.predictions.",
            "cls.seq_relationship.",
            "classifier.",
            "qa_outputs.",
            "pooler.",
            "embeddings.position_ids",
            "embeddings.token_type_ids",
        ),
        tied={
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
}


@dataclass(frozen=True)
class Dialect:
    """How one checkpoint spells the keys of its body.

    Attributes:
        family: a key of `FAMILIES`.
        prefix: before each key of the body; "" or the family's.
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

    def rules(self, num_layers: int, parts: Iterable[str] | None = None) -> list[Rule]:
        """The rules between this checkpoint and our BertModel; or, given `parts`, a model with these parts of heads."""
        body = "" if parts is None else "bert."
        return [
            Rule(body + rule.ours, tuple(self.spell(name) for name in rule.theirs))
            for rule in FAMILIES[self.family].rules(num_layers, pooler=self.pooler)
        ] + [
            Rule(rule.ours, tuple(_old(name) if self.old_head_norms else name for name in rule.theirs))
            for rule in head_rules(parts or ())
        ]

    def tied(self) -> dict[str, str]:
        """The family's `tied`, both keys as this dialect writes them."""
        family = FAMILIES[self.family]
        return {key: self.spell(to) if to == family.anchor else to for key, to in family.tied.items()}


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
    for prefix in ("", family.prefix):
        if prefix + family.anchor in keys:
            old_norms = any(key.startswith(prefix) and key.endswith("LayerNorm.gamma") for key in keys)
            old_head_norms = any(key.startswith(family.carried) and key.endswith("LayerNorm.gamma") for key in keys)
            pooler = any(key.startswith(prefix + family.pooler) for key in keys)
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
    body = dialect.prefix or family.body
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


def _family_name(config: Mapping[str, Any], keys: set[str]) -> str:
    model_type = config.get("model_type")
    if model_type is None:
        classes = architectures(config)
        for name, family in FAMILIES.items():
            if any(one.lower().startswith(name) for one in classes[:1]) or family.prefix + family.anchor in keys:
                return name
            if not classes and set(family.signature) <= keys:
                warnings.warn(f"{CONFIG} names no model_type; by its keys it is read as {name}", stacklevel=2)
                return name
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            "config.model_type", shown(model_type), f"one of {', '.join(FAMILIES)}", "Other families are not read yet."
        )
    return model_type
