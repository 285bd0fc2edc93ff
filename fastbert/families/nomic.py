"""NomicBERT: BERT's order of LayerNorms, rotary positions, gates, and no biases in products.

transformers' class writes the keys of nomic-ai's remote code, and other fields into config.json. The remote code is
described by text-embeddings-inference, `backends/candle/src/models/nomic.rs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastbert.config import HF_ACTIVATIONS, EncoderConfig, HeadShape
from fastbert.errors import ArgumentError
from fastbert.families.bert import CLASSIFIER, WORD
from fastbert.families.names import (
    Family,
    Names,
    check_head_dim,
    model_layers,
    other_turns,
    read_fields,
    scaled_rope,
)

PRODUCTS = ("qkv", "attention_output", "intermediate", "output")


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `NomicBertConfig`."""
    usual = {
        "vocab_size": 30528,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 2048,
    }
    read = EncoderConfig.from_hf({**usual, **given})
    check_head_dim(given, read)
    base, scale = scaled_rope(given, 1000.0, read.head_dim)
    return replace(read, positions="none", gated=True, no_bias=PRODUCTS, rotary=base, rotary_scale=scale)


# The remote code's names, and its values by default.
_FIELDS = {
    "vocab_size": ("vocab_size", 50257),
    "hidden_size": ("n_embd", 768),
    "num_layers": ("n_layer", 12),
    "num_heads": ("n_head", 12),
    "intermediate_size": ("n_inner", None),
    "max_positions": ("n_positions", 1024),
    "type_vocab_size": ("type_vocab_size", 2),
    "eps": ("layer_norm_epsilon", 1e-5),
    "hidden_dropout": ("resid_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "pad_token_id": ("pad_token_id", None),
    "initializer_range": ("initializer_range", 0.02),
}
# What the remote code can do otherwise, and does by default; and what is served.
_SERVED = {
    "prenorm": (False, False),
    "parallel_block": (False, False),
    "causal": (False, False),
    "use_rms_norm": (False, False),
    "norm_mlp": (False, False),
    "moe_every_n_layers": (0, 0),
    "rotary_emb_fraction": (0.0, 1.0),
    "rotary_emb_interleaved": (False, False),
    "rotary_emb_scale_base": (None, None),
}
_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}
_ROUNDED = 256  # the columns of the feed-forward are a multiple of it, whatever n_inner is


def original_config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of the config.json of nomic-ai's remote code.

    With `rotary_scaling_factor` the base of rotary positions depends on the longest sequence of a batch beyond
    `max_trained_positions`, so that is the longest then.
    """
    for name, (usual, served) in _SERVED.items():
        value = usual if given.get(name) is None else given[name]
        if value != served:
            raise ArgumentError(f"config.{name}", repr(value), repr(served))
    fields = read_fields(given, _FIELDS)
    activation = _ACTIVATIONS.get(given.get("activation_function", "gelu_new"))
    if activation is None:
        raise ArgumentError("config.activation_function", repr(given.get("activation_function")), "swiglu or geglu")
    if not isinstance(fields["intermediate_size"], int):
        raise ArgumentError("config.n_inner", repr(fields["intermediate_size"]), "a positive int")
    fields["intermediate_size"] = _multiple(fields["intermediate_size"], _ROUNDED)
    fields["vocab_size"] = _multiple(fields["vocab_size"], given.get("pad_vocab_size_multiple", 1))
    if given.get("rotary_scaling_factor", 1.0):
        fields["max_positions"] = min(fields["max_positions"], given.get("max_trained_positions", 2048))
    biases = {
        "qkv_proj_bias": ("qkv", "attention_output"),
        "mlp_fc1_bias": ("intermediate",),
        "mlp_fc2_bias": ("output",),
    }
    biased = bool(given.get("mlp_fc1_bias", True))
    return EncoderConfig(
        **fields,
        activation=HF_ACTIVATIONS[activation],
        positions="none",
        gated=True,
        no_bias=tuple(part for name, parts in biases.items() if not given.get(name, True) for part in parts),
        rotary=float(given.get("rotary_emb_base", 1000.0)),
        heads=HeadShape(bias=biased, decoder_bias=biased),
    )


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def is_original(given: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether a checkpoint is one for the remote code; transformers keeps its fields, and has another prefix."""
    own = has_names_of_classes(given, keys) or any(key.startswith(NOMIC.prefix) for key in keys)
    return "n_embd" in given and not own


def has_names_of_classes(given: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether the keys are those of a state dict of transformers' class, which `save_pretrained` writes otherwise."""
    return any(key.endswith(f"layers.0.{MODULES.query}.weight") for key in keys)


def layers(model: Any) -> Sequence[nn.Module]:
    """Of the `layers` those that the config counts, as transformers' forward does."""
    return model_layers(model)[: model.config.num_hidden_layers]


def unlike(model: Any, read: EncoderConfig) -> str | None:
    """What of its rotary positions is not as the config says."""
    assert read.rotary is not None
    return other_turns(model.rotary_emb, "", read.rotary, read.rotary_scale)


# In transformers' classes, of which those of GTE are like them.
MODULES = Names(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    intermediate=("mlp.gate_proj", "mlp.up_proj"),
    output="mlp.down_proj",
    output_norm="post_mlp_layernorm",
    activation="mlp.act_fn",
    dropout_of_weights="self_attn.attention_dropout",
    dropout_of_context="post_attention_dropout",
    dropout_of_output="post_mlp_dropout",
)

NOMIC = Family(
    model_types={"nomic_bert": "NomicBert"},
    config=config,
    names=Names(
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.out_proj",
        attention_norm="norm1",
        intermediate=("mlp.fc12", "mlp.fc11"),
        output="mlp.fc2",
        output_norm="norm2",
        activation="mlp.act_fn",
        dropout_of_weights="attn.drop",
        dropout_of_context="dropout1",
        dropout_of_output="dropout2",
    ),
    body={
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "emb_ln",
        "pooler": "pooler.dense",
    },
    layer="encoder.layers.{}",
    prefix="nomic_bert.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "cls.predictions.transform.dense",
            "predictions.norm": "cls.predictions.transform.layer_norm",
            "predictions": "cls.predictions",
        },
        "ForSequenceClassification": CLASSIFIER,
        "ForTokenClassification": CLASSIFIER,
    },
    carried=("cls.predictions.", "classifier.", "pooler."),
    tied={"cls.predictions.decoder.weight": WORD, "cls.predictions.decoder.bias": "cls.predictions.bias"},
    encoders=(),
    modules=MODULES,
    models={"nomic_bert.modeling_nomic_bert.NomicBertModel": "BaseModelOutputWithPooling"},
    within="",
    layers=layers,
    unlike=unlike,
    watched=("attention_scaling",),
)

NOMIC_ORIGINAL = replace(
    NOMIC,
    model_types={"nomic_bert, original": "NomicBert"},
    form_of="nomic_bert",
    told_by=is_original,
    models={},
    config=original_config,
    prefix="bert.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "cls.predictions.transform.dense",
            "predictions.norm": "cls.predictions.transform.layer_norm",
            "predictions.bias": "cls.predictions.decoder.bias",
        },
        "ForSequenceClassification": CLASSIFIER,
    },
    tied={"cls.predictions.decoder.weight": WORD},
    class_names={"ForMaskedLM": "NomicBertForPreTraining"},
    dropouts={"text": ("classifier_dropout", "embd_pdrop")},
    num_layers="n_layer",
)

# Its names in transformers' class, which a state dict has.
NOMIC_CLASS = replace(
    NOMIC,
    model_types={"nomic_bert, by its class": "NomicBert"},
    form_of="nomic_bert",
    told_by=has_names_of_classes,
    models={},
    names=MODULES,
    body={**NOMIC.body, "embeddings.norm": "embeddings.LayerNorm"},
    layer="layers.{}",
)
