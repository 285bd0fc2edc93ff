"""What a family's file says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastbert.config import EncoderConfig


@dataclass(frozen=True)
class Names:
    """Where a layer that normalises after each sum has its modules: dotted names below the layer.

    Attributes:
        activation: of the feed-forward.
        dropout_of_weights: of attention's, which are dropped where the module above it is in training mode.
        dropout_of_context, dropout_of_output: of attention's output and of the feed-forward's; None where the family
            has no such dropout.
    """

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str
    activation: str
    dropout_of_weights: str
    dropout_of_context: str | None
    dropout_of_output: str | None


def own_hf(encoder: Any) -> Any:
    """An encoder's `config`."""
    return encoder.config


def layers_config(hf: Any) -> EncoderConfig:
    """The layers of a model of this config; how wide the embeddings are is nothing to them."""
    return EncoderConfig.from_hf({**hf.to_dict(), "embedding_size": None})


def own_layers(encoder: Any) -> Sequence[nn.Module]:
    """An encoder's `layer`, one after the other."""
    return list(encoder.layer)


@dataclass(frozen=True)
class Family:
    """How the encoders of some classes of transformers are computed.

    Attributes:
        encoders: names of the classes, `MODULE.CLASS` below `transformers.models.`.
        names: of the modules of a layer.
        hf: transformers' config of an encoder.
        config: of its layers, by that.
        layers: of an encoder, in the order in which they run; a layer may come several times.
        entry: dotted name of a module that the hidden states go through before the first layer; None where there is
            none.
        output: the class of what an encoder returns, in `transformers.modeling_outputs`.
    """

    encoders: tuple[str, ...]
    names: Names
    hf: Callable[[nn.Module], Any] = own_hf
    config: Callable[[Any], EncoderConfig] = layers_config
    layers: Callable[[nn.Module], Sequence[nn.Module]] = own_layers
    entry: str | None = None
    output: str = "BaseModelOutput"
