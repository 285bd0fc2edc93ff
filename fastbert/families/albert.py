"""ALBERT: layers that share their weights, and embeddings narrower than the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.families.bert import ANSWERS, BODY, CLASSIFIER, NUMBERS, WORD
from fastbert.families.names import Family, Names

_USUAL = {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_hidden_layers": 12,
    "num_hidden_groups": 1,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "inner_group_num": 1,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `AlbertConfig`."""
    given = {**_USUAL, **given}
    read = EncoderConfig.from_hf({**given, "embedding_size": None})
    groups, inner = given["num_hidden_groups"], given["inner_group_num"]
    if not isinstance(groups, int) or not 0 < groups <= max(read.num_layers, 1):
        raise ArgumentError("config.num_hidden_groups", repr(groups), f"from 1 to {read.num_layers}, the layers")
    if inner != 1:
        raise ArgumentError("config.inner_group_num", repr(inner), "1, as in the published ones")
    order = tuple(int(i / (read.num_layers / groups)) for i in range(read.num_layers))
    return replace(read, embedding_size=given["embedding_size"], layer_order=order, dropped=("attention_output",))


def layers(encoder: Any) -> list[nn.Module]:
    """A group's layers come as often as the config says."""
    given, groups = encoder.config, encoder.albert_layer_groups
    found: list[nn.Module] = []
    for i in range(given.num_hidden_layers):
        group = int(i / (given.num_hidden_layers / given.num_hidden_groups))
        if group >= len(groups):
            got = repr(given.num_hidden_groups)
            raise ArgumentError("config.num_hidden_groups", got, f"{len(groups)}, the groups that there are")
        found += groups[group].albert_layers
    return found


_PREDICTIONS = {
    "predictions.dense": "predictions.dense",
    "predictions.norm": "predictions.LayerNorm",
    "predictions": "predictions",
}

ALBERT = Family(
    model_types={"albert": "Albert"},
    config=config,
    names=Names(
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        attention_norm="attention.LayerNorm",
        intermediate="ffn",
        output="ffn_output",
        output_norm="full_layer_layer_norm",
        activation="activation",
        dropout_of_weights="attention.attention_dropout",
        dropout_of_context="attention.output_dropout",
        dropout_of_output=None,
    ),
    body={**BODY, "embeddings.project": "encoder.embedding_hidden_mapping_in", "pooler": "pooler"},
    layer="encoder.albert_layer_groups.{}.albert_layers.0",
    prefix="albert.",
    heads={
        "ForMaskedLM": _PREDICTIONS,
        "ForPreTraining": {**_PREDICTIONS, "next_sentence": "sop_classifier.classifier"},
        "ForSequenceClassification": CLASSIFIER,
        "ForMultipleChoice": CLASSIFIER,
        "ForTokenClassification": CLASSIFIER,
        "ForQuestionAnswering": ANSWERS,
    },
    carried=("predictions.", "sop_classifier.", "classifier.", "qa_outputs.", "pooler.", *NUMBERS),
    tied={"predictions.decoder.weight": WORD, "predictions.decoder.bias": "predictions.bias"},
    encoders=("albert.modeling_albert.AlbertTransformer",),
    models={"albert.modeling_albert.AlbertModel": "BaseModelOutputWithPooling"},
    dropouts=dict.fromkeys(("text", "choice", "pair", "token"), ("classifier_dropout_prob", 0.1)),
    layers=layers,
    entry="embedding_hidden_mapping_in",
)
