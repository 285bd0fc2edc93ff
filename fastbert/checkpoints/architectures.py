"""What a checkpoint is, told from its config.json and from its keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.checkpoints.mapping import KEYS_SHOWN, Rule, bert_rules, head_rules
from fastbert.config import EncoderConfig
from fastbert.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """One kind of model: how its checkpoints are written.

    Attributes:
        config: reads the dict of its config.json.
        rules: `(num_layers, pooler=...)` -> the rules between our model and theirs, without a prefix.
        prefix: what a model with a head puts before the keys of its body.
        anchor: a key that every body has.
        pooler: how the keys of a body's pooler begin.
        carried: beginnings of keys that a model need not compute with, but saves as they came; those of the body are
            relative to its prefix.
        tied: keys of a head that a file may hold although they are the same tensor as another, and its key.
    """

    config: Callable[[Any], EncoderConfig]
    rules: Callable[..., list[Rule]]
    prefix: str
    anchor: str
    pooler: str
    carried: tuple[str, ...]
    tied: Mapping[str, str]


FAMILIES = {
    "bert": Family(
        config=EncoderConfig.from_hf,
        rules=bert_rules,
        prefix="bert.",
        anchor="embeddings.word_embeddings.weight",
        pooler="pooler.",
        carried=(
            "cls.predictions.",
            "cls.seq_relationship.",
            "classifier.",
            "qa_outputs.",
            "pooler.",
            "embeddings.position_ids",
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
        config: the dict of config.json; `model_type` decides, or `architectures` or a prefix where it is missing.
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
    shown = ", ".join(sorted(keys)[:KEYS_SHOWN]) or "no keys"
    raise CheckpointError("state dict", shown, f"{family.anchor}, with or without {family.prefix!r} before it")


def split_carried(
    state: Mapping[str, Tensor], dialect: Dialect, used: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(known, carried)`: the tensors with a key in `used` or one nobody knows, and those only carried along."""
    beginnings = FAMILIES[dialect.family].carried
    known: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    for key, tensor in state.items():
        kept = key not in used and key.removeprefix(dialect.prefix).startswith(beginnings)
        (carried if kept else known)[key] = tensor
    return known, carried


def _family_name(config: Mapping[str, Any], keys: set[str]) -> str:
    model_type = config.get("model_type")
    if model_type is None:
        architectures = config.get("architectures") or [""]
        for name, family in FAMILIES.items():
            if architectures[0].lower().startswith(name) or family.prefix + family.anchor in keys:
                return name
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            "config.model_type", repr(model_type), f"one of {', '.join(FAMILIES)}", "Other families are not read yet."
        )
    return model_type
