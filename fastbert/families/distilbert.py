"""DistilBERT: a BERT of half the layers, without token types, and without a dropout after attention."""

from __future__ import annotations

from typing import Any

from fastbert.config import EncoderConfig
from fastbert.families.names import Family, Names


def hf(encoder: Any) -> Any:
    """The config, which only its layers hold."""
    return encoder.layer[0].attention.config


def config(hf: Any) -> EncoderConfig:
    """Of a transformers `DistilBertConfig`, which has names of its own."""
    given = hf.to_dict()
    named = {
        "hidden_size": given["dim"],
        "num_hidden_layers": given["n_layers"],
        "num_attention_heads": given["n_heads"],
        "intermediate_size": given["hidden_dim"],
        "hidden_act": given["activation"],
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": given["dropout"],
        "attention_probs_dropout_prob": given["attention_dropout"],
    }
    same = ("vocab_size", "max_position_embeddings", "pad_token_id", "initializer_range")
    return EncoderConfig.from_hf({**named, **{name: given[name] for name in same if name in given}})


DISTILBERT = Family(
    encoders=("distilbert.modeling_distilbert.Transformer",),
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
    hf=hf,
    config=config,
)
