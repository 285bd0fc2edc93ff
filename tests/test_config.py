"""EncoderConfig: from and to Hugging Face, and what it refuses."""

from typing import Any

import pytest

from fastbert.config import HF_ACTIVATIONS, EncoderConfig
from fastbert.errors import ArgumentError

transformers = pytest.importorskip("transformers", reason="compares with transformers' BertConfig")


def test_round_trip_with_transformers():
    ours = EncoderConfig(
        vocab_size=100, hidden_size=48, num_layers=3, num_heads=2, intermediate_size=96, max_positions=40,
        type_vocab_size=1, activation="gelu_tanh", eps=1e-5, hidden_dropout=0.2, attention_dropout=0.0, pad_token_id=3,
        initializer_range=0.5,
    )  # fmt: skip
    assert EncoderConfig.from_hf(transformers.BertConfig(**ours.to_hf())) == ours
    assert EncoderConfig.from_hf(ours.to_hf()) == ours
    assert EncoderConfig.from_hf(transformers.BertConfig()) == EncoderConfig()


@pytest.mark.parametrize("name", HF_ACTIVATIONS)
def test_case_07_activations_keep_their_flavour(name):
    import torch
    from transformers.activations import ACT2FN

    ours = {
        "gelu": lambda x: torch.nn.functional.gelu(x),
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
    }[HF_ACTIVATIONS[name]]
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert (ACT2FN[name](x) - ours(x)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"position_embedding_type": "relative_key"},
        {"embedding_size": 12},
        {"hidden_act": "mish"},
        {"hidden_size": 50},
        {"num_attention_heads": 7},
        {"vocab_size": 0},
        {"hidden_dropout_prob": 1.0},
        {"num_hidden_layers": -1},
    ],
    ids=str,
)
def test_what_it_refuses(changes):
    with pytest.raises(ArgumentError):
        EncoderConfig.from_hf(EncoderConfig().to_hf() | changes)


@pytest.mark.parametrize("scale", [0.0, -1, float("inf"), float("nan"), None, True])
def test_a_scale_of_rotary_positions_is_above_0(scale: Any) -> None:
    with pytest.raises(ArgumentError, match="rotary_scale: got"):
        EncoderConfig(rotary=10_000.0, rotary_scale=scale)
