"""DistilBERT: a BERT of half the layers, without token types, and without a dropout after attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastbert.config import EncoderConfig, HeadShape
from fastbert.families.bert import ANSWERS, CLASSIFIER, NUMBERS, WORD
from fastbert.families.names import Family, Names, first_layer


def hf(encoder: Any) -> Any:
    """The config, which only its layers hold."""
    return first_layer(encoder).attention.config


# Its names of BERT's fields, and their values by default.
_FIELDS = {
    "dim": ("hidden_size", 768),
    "n_layers": ("num_hidden_layers", 6),
    "n_heads": ("num_attention_heads", 12),
    "hidden_dim": ("intermediate_size", 3072),
    "activation": ("hidden_act", "gelu"),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
}
# What transformers reads under BERT's names too, which then come first.
_BERTS = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `DistilBertConfig`."""
    named = {theirs: given.get(name, usual) for name, (theirs, usual) in _FIELDS.items()}
    named |= {name: given[name] for name in _BERTS if name in given}
    same = ("vocab_size", "max_position_embeddings", "pad_token_id", "initializer_range")
    read = EncoderConfig.from_hf({**named, **{name: given[name] for name in same if name in given}})
    heads = HeadShape(transformed=("text", "choice"), activation="relu")
    return replace(read, type_vocab_size=0, dropped=("output",), heads=heads)


_TRANSFORMED = {"transform.dense": "pre_classifier", "classifier": "classifier"}

DISTILBERT = Family(
    model_types={"distilbert": "DistilBert"},
    config=config,
    names=Names(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        intermediate="ffn.lin1",
        output="ffn.lin2",
        output_norm="output_layer_norm",
        activation="ffn.activation",
        dropout_of_weights="attention.dropout",
        dropout_of_context=None,
        dropout_of_output="ffn.dropout",
    ),
    body={
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
    },
    layer="transformer.layer.{}",
    prefix="distilbert.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "vocab_transform",
            "predictions.norm": "vocab_layer_norm",
            "predictions": "vocab_projector",
        },
        "ForSequenceClassification": _TRANSFORMED,
        "ForMultipleChoice": _TRANSFORMED,
        "ForTokenClassification": CLASSIFIER,
        "ForQuestionAnswering": ANSWERS,
    },
    carried=("vocab_", "pre_classifier.", "classifier.", "qa_outputs.", *NUMBERS),
    tied={"vocab_projector.weight": WORD},
    num_layers="n_layers",
    dropouts={
        **dict.fromkeys(("text", "choice"), ("seq_classif_dropout", 0.2)),
        "answer": ("qa_dropout", 0.1),
    },
    encoders=("distilbert.modeling_distilbert.Transformer",),
    models={"distilbert.modeling_distilbert.DistilBertModel": "BaseModelOutput"},
    within="transformer",
    hf=hf,
)
