"""MPNet: RoBERTa's positions and heads, no token types, and a bias of the scores by distance that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastbert.config import EncoderConfig
from fastbert.families import roberta
from fastbert.families.bert import BODY
from fastbert.families.names import OURS, Family

PAD = 1  # of the tables, whatever pad_token_id says: MPNetEmbeddings in transformers


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `MPNetConfig`."""
    read = EncoderConfig.from_hf({"vocab_size": 30527, **given, "pad_token_id": PAD})
    return replace(
        read,
        type_vocab_size=0,
        positions="tokens",
        first_position=PAD + 1,
        relative_buckets=given.get("relative_attention_num_buckets", 32),
        heads=roberta.HEADS,
    )


MPNET = Family(
    model_types={"mpnet": "MPNet"},
    config=config,
    names=replace(
        OURS,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        attention_norm="attention.LayerNorm",
        dropout_of_weights="attention.attn.dropout",
        dropout_of_context="attention.dropout",
    ),
    body={
        **{ours: theirs for ours, theirs in BODY.items() if ours != "embeddings.token_type"},
        "encoder.relative": "encoder.relative_attention_bias",
    },
    layer="encoder.layer.{}",
    prefix="mpnet.",
    heads=roberta.HEAD_NAMES,
    carried=roberta.CARRIED,
    tied=roberta.TIED,
    encoders=("mpnet.modeling_mpnet.MPNetEncoder",),
    models={"mpnet.modeling_mpnet.MPNetModel": "BaseModelOutputWithPooling"},
    relative="relative_attention_bias",
    dropouts={},
)
