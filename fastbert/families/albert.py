"""ALBERT: layers that share their weights, and embeddings narrower than the hidden states."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert.families.names import Family, Names


def layers(encoder: Any) -> list[nn.Module]:
    """A group's layers come as often as the config says."""
    given = encoder.config
    found: list[nn.Module] = []
    for i in range(given.num_hidden_layers):
        group = encoder.albert_layer_groups[int(i / (given.num_hidden_layers / given.num_hidden_groups))]
        found += group.albert_layers
    return found


ALBERT = Family(
    encoders=("albert.modeling_albert.AlbertTransformer",),
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
    layers=layers,
    entry="embedding_hidden_mapping_in",
)
