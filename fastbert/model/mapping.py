"""Names of parameters: ours on one side, Hugging Face's on the other, and an exact way across in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.errors import CheckpointError

KEYS_SHOWN = 10


@dataclass(frozen=True)
class Rule:
    """One parameter of ours and the parameters of theirs that it is made of, concatenated on dimension 0."""

    ours: str
    theirs: tuple[str, ...]


_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)

# The names that fastbert 0.1.0 gave a layer's modules, and what they are now.
_LAYER_OF_0_1 = {
    "qkv": _LAYER[:3],
    "attention_output": _LAYER[3:4],
    "attention_norm": _LAYER[4:5],
    "intermediate": _LAYER[5:6],
    "output": _LAYER[6:7],
    "output_norm": _LAYER[7:8],
}


def from_names_of_0_1(state: dict[str, Tensor], prefix: str) -> None:
    """Rename, in place, the keys `PREFIXlayers.N...` of an `Encoder` of fastbert 0.1.0."""
    for key in [key for key in state if key.startswith(f"{prefix}layers.")]:
        number, *name = key.removeprefix(f"{prefix}layers.").split(".")
        if len(name) == 2 and name[0] in _LAYER_OF_0_1:
            names = _LAYER_OF_0_1[name[0]]
            rule = Rule(key, tuple(f"{prefix}layer.{number}.{one}.{name[1]}" for one in names))
            state.update(zip(rule.theirs, _split(rule, state.pop(key)), strict=True))


def encoder_rules(num_layers: int) -> list[Rule]:
    """Rules between an `Encoder` and a transformers `BertEncoder`: they have the same names."""
    names = [f"layer.{i}.{name}.{part}" for i in range(num_layers) for name in _LAYER for part in ("weight", "bias")]
    return [Rule(name, (name,)) for name in names]


def bert_rules(num_layers: int, *, pooler: bool) -> list[Rule]:
    """Rules between our `BertModel` and transformers' `BertModel`."""
    embeddings = [
        Rule("embeddings.word.weight", ("embeddings.word_embeddings.weight",)),
        Rule("embeddings.position.weight", ("embeddings.position_embeddings.weight",)),
        Rule("embeddings.token_type.weight", ("embeddings.token_type_embeddings.weight",)),
        Rule("embeddings.norm.weight", ("embeddings.LayerNorm.weight",)),
        Rule("embeddings.norm.bias", ("embeddings.LayerNorm.bias",)),
    ]
    encoder = [Rule(f"encoder.{rule.ours}", (f"encoder.{rule.ours}",)) for rule in encoder_rules(num_layers)]
    poolers = [Rule(f"pooler.{part}", (f"pooler.dense.{part}",)) for part in ("weight", "bias")]
    return embeddings + encoder + (poolers if pooler else [])


# The parts of heads, modules and single parameters: ours, and theirs.
_HEADS = {
    "predictions": {
        "dense.weight": "cls.predictions.transform.dense.weight",
        "dense.bias": "cls.predictions.transform.dense.bias",
        "norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "norm.bias": "cls.predictions.transform.LayerNorm.bias",
        "bias": "cls.predictions.bias",
    },
    "next_sentence": {"weight": "cls.seq_relationship.weight", "bias": "cls.seq_relationship.bias"},
    "classifier": {"weight": "classifier.weight", "bias": "classifier.bias"},
    "qa_outputs": {"weight": "qa_outputs.weight", "bias": "qa_outputs.bias"},
}


def head_rules(parts: Iterable[str]) -> list[Rule]:
    """Rules between these parts of our models with heads and those of transformers."""
    return [Rule(f"{part}.{ours}", (theirs,)) for part in parts for ours, theirs in _HEADS[part].items()]


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their state dict under our names; the exact inverse of `to_theirs`.

    Raises:
        CheckpointError: a key is missing or unexpected, or the parts of one parameter differ in shape or dtype.
    """
    _account_for(state, [name for rule in rules for name in rule.theirs])
    return {rule.ours: _join(rule, [state[name] for name in rule.theirs]) for rule in rules}


def to_theirs(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our state dict under their names; the exact inverse of `to_ours`. The tensors may be views of ours.

    Raises:
        CheckpointError: a key is missing or unexpected, or a parameter does not split into equal parts.
    """
    _account_for(state, [rule.ours for rule in rules])
    return {
        name: part for rule in rules for name, part in zip(rule.theirs, _split(rule, state[rule.ours]), strict=True)
    }


def _account_for(state: Iterable[str], expected: list[str]) -> None:
    given, wanted = set(state), set(expected)
    for what, keys in (("missing", wanted - given), ("unexpected", given - wanted)):
        if keys:
            shown = ", ".join(sorted(keys)[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "")
            raise CheckpointError(
                "state dict", f"{len(keys)} {what} keys: {shown}", f"the {len(wanted)} keys of the model"
            )


def _join(rule: Rule, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    kinds = {(tuple(part.shape), part.dtype) for part in parts}
    if len(kinds) > 1 or parts[0].dim() == 0:
        got = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        raise CheckpointError(", ".join(rule.theirs), got, "one shape and one dtype")
    return torch.cat(parts)


def _split(rule: Rule, whole: Tensor) -> Sequence[Tensor]:
    parts = len(rule.theirs)
    if parts == 1:
        return [whole]
    if whole.dim() == 0 or whole.shape[0] % parts:
        raise CheckpointError(rule.ours, f"shape {tuple(whole.shape)}", f"a first dimension that {parts} divides")
    return whole.chunk(parts)
