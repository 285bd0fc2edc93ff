"""GTE-new: BERT's order of LayerNorms, rotary positions that may be scaled, gates, and no bias before a gate.

Alibaba-NLP/new-impl is remote code (model_type "new"), described by text-embeddings-inference,
`backends/candle/src/models/gte.rs`; transformers has it as "gte", and so have Snowflake's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastbert.config import EncoderConfig, HeadShape
from fastbert.errors import ArgumentError
from fastbert.families.bert import ANSWERS, CLASSIFIER, WORD
from fastbert.families.names import Family, Names, check_head_dim, scaled_rope
from fastbert.families.nomic import MODULES, has_names_of_classes, layers, unlike

# Of new-impl's `NewConfig`.
_USUAL = {
    "vocab_size": 30528,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 2048,
    "type_vocab_size": 1,
    "pad_token_id": None,
}
# What it can do otherwise. That inputs are packed, and by what attention is computed, is for it to say alone.
_SERVED = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "logn_attention_scale": False,
}


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a `NewConfig`."""
    return _read({**_USUAL, **given}, 10_000.0)


def gte_config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `GteConfig`, as `config`."""
    usual = {**_USUAL, "vocab_size": 250048, "max_position_embeddings": 8192, "pad_token_id": 1}
    return replace(_read({**usual, **given}, 160_000.0), heads=HeadShape(predict="gelu"))


def _read(given: Mapping[str, Any], base: float) -> EncoderConfig:
    for name, served in _SERVED.items():
        if given.get(name, served) != served:
            raise ArgumentError(f"config.{name}", repr(given[name]), repr(served))
    types = given["type_vocab_size"]
    read = EncoderConfig.from_hf({**given, "position_embedding_type": "absolute", "type_vocab_size": types or 1})
    check_head_dim(given, read)
    rotary, scale = scaled_rope(given, base, read.head_dim)
    return replace(
        read,
        type_vocab_size=types,
        positions="none",
        gated=True,
        no_bias=("intermediate",),
        dropped=("attention_output", "intermediate", "output"),
        rotary=rotary,
        rotary_scale=scale,
    )


NEW = Family(
    model_types={"new": "New"},
    config=config,
    names=Names(
        query="attention.qkv_proj",
        key="attention.qkv_proj",
        value="attention.qkv_proj",
        attention_output="attention.o_proj",
        attention_norm="attn_ln",
        intermediate="mlp.up_gate_proj",
        output="mlp.down_proj",
        output_norm="mlp_ln",
        activation="mlp.act_fn",
        dropout_of_weights="attention.dropout",
        dropout_of_context="hidden_dropout",
        dropout_of_output="hidden_dropout",
        dropout_of_activation="mlp.hidden_dropout",
        gate_last=True,
    ),
    body={
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "pooler": "pooler.dense",
    },
    layer="encoder.layer.{}",
    prefix="new.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "lm_head.dense",
            "predictions.norm": "lm_head.norm",
            "predictions.bias": "lm_head.decoder.bias",
        },
        "ForSequenceClassification": CLASSIFIER,
        "ForMultipleChoice": CLASSIFIER,
        "ForTokenClassification": CLASSIFIER,
        "ForQuestionAnswering": ANSWERS,
    },
    carried=("lm_head.", "classifier.", "qa_outputs.", "pooler."),
    tied={"lm_head.decoder.weight": WORD},
    encoders=(),
)

_MODULES = replace(MODULES, dropout_of_activation="mlp.dropout")

GTE = replace(
    NEW,
    model_types={"gte": "Gte"},
    config=gte_config,
    prefix="gte.",
    other_prefixes=("new.",),  # of files that were written for new-impl; transformers reads it too
    modules=_MODULES,
    models={"gte.modeling_gte.GteModel": "BaseModelOutputWithPooling"},
    within="",
    layers=layers,
    unlike=unlike,
    watched=("attention_scaling",),
    heads={name: NEW.heads[name] for name in ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")},
)

# Its names in transformers' class, which a state dict has.
GTE_CLASS = replace(
    GTE,
    model_types={"gte, by its class": "Gte"},
    form_of="gte",
    told_by=has_names_of_classes,
    models={},
    names=_MODULES,
    layer="layers.{}",
    heads={
        **GTE.heads,
        "ForMaskedLM": {**GTE.heads["ForMaskedLM"], "predictions.norm": "lm_head.layer_norm"},
    },
)
