"""What a checkpoint is, told from its config.json and from its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.checkpoints.mapping import KEYS_SHOWN, Rule, bert_rules
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
        pooler: a key that a body with a pooler has.
        carried: beginnings of keys that fastbert does not compute, with which saving gives back the same file; those
            of the body are relative to its prefix.
        tied: keys outside the body that may be the same tensor as one of our parameters, and its name.
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
        pooler="pooler.dense.weight",
        carried=("cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.", "embeddings.position_ids"),
        tied={"cls.predictions.decoder.weight": "embeddings.word.weight"},
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
    """

    family: str
    prefix: str
    old_norms: bool
    pooler: bool

    def spell(self, key: str) -> str:
        """A standard key of the body as this dialect writes it."""
        if self.old_norms and ".LayerNorm." in key:
            key = key.replace(".LayerNorm.weight", ".LayerNorm.gamma").replace(".LayerNorm.bias", ".LayerNorm.beta")
        return self.prefix + key

    def rules(self, num_layers: int) -> list[Rule]:
        """The rules between our model and this checkpoint."""
        return [
            Rule(rule.ours, tuple(self.spell(name) for name in rule.theirs))
            for rule in FAMILIES[self.family].rules(num_layers, pooler=self.pooler)
        ]


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
            return Dialect(name, prefix, old_norms, prefix + family.pooler in keys)
    shown = ", ".join(sorted(keys)[:KEYS_SHOWN]) or "no keys"
    raise CheckpointError("state dict", shown, f"{family.anchor}, with or without {family.prefix!r} before it")


def split_carried(state: Mapping[str, Tensor], dialect: Dialect) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(body, carried)`: the tensors fastbert computes with or has no name for, and those it only carries along."""
    beginnings = FAMILIES[dialect.family].carried
    body: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    for key, tensor in state.items():
        kept = key.removeprefix(dialect.prefix).startswith(beginnings)
        (carried if kept else body)[key] = tensor
    return body, carried


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
