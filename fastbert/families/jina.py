"""Jina v2: BERT with ALiBi in the place of a position table, and gates. Its config.json says "bert".

jinaai/jina-bert-implementation is remote code, described by text-embeddings-inference,
`backends/candle/src/models/jina.rs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fastbert.config import Activation, EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.families.bert import BERT, BODY
from fastbert.families.names import OURS

# Its feed-forwards, which take no notice of `hidden_act`.
_ACTIVATIONS: dict[str, Activation] = {"geglu": "gelu", "reglu": "relu"}


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a `JinaBertConfig`.

    Raises:
        ArgumentError: it is of another implementation, or has BERT's feed-forward.
    """
    code = str(given.get("auto_map"))
    if "qk-post-norm" in code:
        expected = "that of jinaai/jina-bert-implementation, which normalises no queries and keys"
        raise ArgumentError("config.auto_map", "jinaai/jina-bert-v2-qk-post-norm", expected)
    kind = given.get("feed_forward_type", "original")
    if kind not in _ACTIVATIONS:
        raise ArgumentError("config.feed_forward_type", repr(kind), f"one of {', '.join(_ACTIVATIONS)}")
    read = EncoderConfig.from_hf({**given, "position_embedding_type": "absolute"})
    return replace(
        read,
        activation=_ACTIVATIONS[kind],
        positions="none",
        gated=True,
        no_bias=("intermediate",),
        dropped=("attention_output", "intermediate"),
        alibi=True,
    )


def is_jina(given: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether a BERT is Jina's."""
    return given.get("position_embedding_type") == "alibi"


JINA = replace(
    BERT,
    model_types={"bert, Jina's": "JinaBert"},
    form_of="bert",
    told_by=is_jina,
    config=config,
    names=replace(
        OURS,
        intermediate="mlp.gated_layers",
        output="mlp.wo",
        output_norm="mlp.layernorm",
        activation="mlp.act",
        dropout_of_output=None,
        dropout_of_activation="mlp.dropout",
    ),
    body={ours: theirs for ours, theirs in BODY.items() if ours != "embeddings.position"},
    encoders=(),
    models={},
)
