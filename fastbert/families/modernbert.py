"""ModernBERT: a LayerNorm before each half of a layer, rotary positions, gates, windows, and hardly a bias."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fastbert.config import HF_ACTIVATIONS, Activation, EncoderConfig, HeadShape
from fastbert.errors import ArgumentError
from fastbert.families.names import (
    Family,
    Names,
    check_head_dim,
    model_layers,
    other_turns,
    read_fields,
    read_object,
    rope_base,
)

WORD = "embeddings.tok_embeddings.weight"

_FIELDS = {
    "vocab_size": ("vocab_size", 50368),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 22),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 1152),
    "max_positions": ("max_position_embeddings", 8192),
    "eps": ("norm_eps", 1e-5),
    "attention_dropout": ("attention_dropout", 0.0),
    "pad_token_id": ("pad_token_id", 50283),
    "initializer_range": ("initializer_range", 0.02),
    "norm_bias": ("norm_bias", False),
}
# Dropouts that the published models don't have, nor we.
_DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout")


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `ModernBertConfig`, or its form before version 5."""
    fields = read_fields(given, _FIELDS)
    layers = fields["num_layers"]
    every = given.get("global_attn_every_n_layers", 3)
    types = given.get("layer_types") or [("sliding" if i % every else "full") + "_attention" for i in range(layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
        raise ArgumentError("config.layer_types", repr(types), f"{' or '.join(known)}, for each of {layers} layers")
    name = "local_attention" if given.get("sliding_window") is None else "sliding_window"  # which is half the other
    window = given.get(name, 128)
    if not isinstance(window, int) or window < 2:
        raise ArgumentError(f"config.{name}", repr(window), "a whole number, 2 or more")
    window = window // 2 if name == "local_attention" else window
    dropped = [name for name in _DROPOUTS if given.get(name)]
    if dropped:
        warnings.warn(f"config.json: {', '.join(dropped)}: fastbert drops attention's weights only", stacklevel=2)
    without = {"attention_bias": ("qkv", "attention_output"), "mlp_bias": ("intermediate", "output")}
    if given.get("sparse_prediction") and given.get("sparse_pred_ignore_index", -100) != -100:
        index = given["sparse_pred_ignore_index"]
        warnings.warn(f"config.json: sparse_pred_ignore_index {index}: labels of -100 do not count here", stacklevel=2)
    pooling = given.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ArgumentError("config.classifier_pooling", repr(pooling), "cls or mean")
    activation = _activation(given, "classifier_activation")
    read = EncoderConfig(
        **fields,
        activation=_activation(given, "hidden_activation"),
        type_vocab_size=0,
        hidden_dropout=0.0,
        dropped=("attention_output", "intermediate"),
        positions="none",
        norm_first=True,
        gated=True,
        no_bias=tuple(part for name, parts in without.items() if not given.get(name, False) for part in parts),
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        rotary=_base(given, "full_attention", "global_rope_theta", 160_000.0),
        rotary_in_windows=_base(given, "sliding_attention", "local_rope_theta", 10_000.0),
        heads=HeadShape(
            transformed=("text", "choice", "token", "answer"),
            activation=activation,
            bias=bool(given.get("classifier_bias", False)),
            norm=True,
            pooling=pooling,
            predict=activation,
            decoder_bias=bool(given.get("decoder_bias", True)),
        ),
    )
    check_head_dim(given, read)
    return read


def _activation(given: Mapping[str, Any], name: str) -> Activation:
    activation = given.get(name, "gelu")
    if activation not in HF_ACTIVATIONS:
        raise ArgumentError(f"config.{name}", repr(activation), f"one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[activation]


def _base(given: Mapping[str, Any], kind: str, old: str, usual: float) -> float:
    of_kind = read_object(read_object(given, "rope_parameters"), kind) | read_object(given, "rope_scaling")
    turned = given.get("partial_rotary_factor")
    return rope_base({"rope_parameters": of_kind, "rope_theta": given.get(old), "partial_rotary_factor": turned}, usual)


def own(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """With the kinds of layers that there are, whatever was removed, moved or added."""
    kinds = [layer.attention_type for layer in model.layers]
    return {**given, "num_hidden_layers": len(kinds), "layer_types": kinds}


def unlike(model: Any, read: EncoderConfig) -> str | None:
    """What of its rotary positions is not as the config says."""
    bases = {"full_attention": read.rotary, "sliding_attention": read.rotary_in_windows}
    kinds = {layer.attention_type for layer in model.layers}
    found = (other_turns(model.rotary_emb, f"{kind}_", base) for kind, base in bases.items() if kind in kinds and base)
    return next(filter(None, found), None)


_HEAD = {"transform.dense": "head.dense", "transform.norm": "head.norm"}
_CLASSIFIER = {**_HEAD, "classifier": "classifier"}

MODERNBERT = Family(
    model_types={"modernbert": "ModernBert"},
    config=config,
    names=Names(
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        attention_norm="mlp_norm",
        intermediate="mlp.Wi",
        output="mlp.Wo",
        output_norm="attn_norm",
        activation="mlp.act",
        dropout_of_weights="attn.attention_dropout",
        dropout_of_context="attn.out_drop",
        dropout_of_output=None,
        dropout_of_activation="mlp.drop",
    ),
    body={"embeddings.word": "embeddings.tok_embeddings", "embeddings.norm": "embeddings.norm"},
    layer="layers.{}",
    last_norm="final_norm",
    prefix="model.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "head.dense",
            "predictions.norm": "head.norm",
            "predictions.bias": "decoder.bias",
        },
        "ForSequenceClassification": _CLASSIFIER,
        "ForMultipleChoice": _CLASSIFIER,
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": {**_HEAD, "qa_outputs": "classifier"},
    },
    carried=("head.", "decoder.", "classifier."),
    tied={"decoder.weight": WORD},
    encoders=(),
    models={"modernbert.modeling_modernbert.ModernBertModel": "BaseModelOutput"},
    dropouts=dict.fromkeys(("text", "choice", "token", "answer"), ("classifier_dropout", 0.0)),
    within="",
    layers=model_layers,
    own=own,
    unlike=unlike,
    watched=("attention_type", "full_attention_attention_scaling", "sliding_attention_attention_scaling"),
)
