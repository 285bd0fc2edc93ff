"""What a forward pass returns: read by name, like Hugging Face's outputs, or by position."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from fastbert.errors import ArgumentError


class _Output:
    """What all outputs share: fields that are read by name, like Hugging Face's outputs, or by position."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        """The names of the fields that are not None, in order."""
        return [f.name for f in fields(cast("Any", self)) if getattr(self, f.name) is not None]

    def items(self) -> list[tuple[str, Any]]:
        """The fields that are not None, in order, with their names."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class EncoderOutput(_Output):
    """Output of an encoder.

    Attributes:
        last_hidden_state: `[batch, seqlen, hidden]`, 0 at padding; `[tokens, hidden]` where a Packing was given.
        hidden_states: the input of the first layer and the output of each, in the same layout; None if not asked for.
        attentions, cross_attentions, past_key_values, cache: always None; Hugging Face's code reads these names.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    cross_attentions: None = None
    past_key_values: None = None
    cache: None = None


@dataclass
class ModelOutput(_Output):
    """Output of a whole model: as EncoderOutput, with `pooler_output` `[batch, hidden]` (None without a pooler)."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class HeadOutput(_Output):
    """Output of a model with one head.

    Attributes:
        loss: a scalar, float32 (float64 for a float64 model); None without labels.
        logits: as the head says; None where it computed a loss without them.
        hidden_states: the embeddings and the output of every layer; None if not asked for.
    """

    loss: Tensor | None
    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class PreTrainingOutput(_Output):
    """Output of EncoderForPreTraining: as HeadOutput, with logits of both heads."""

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(_Output):
    """Of EncoderForQuestionAnswering: as HeadOutput, with logits of the first and the last token of the answer."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


# Arguments that Hugging Face passes on, and that change nothing here.
_HARMLESS = {"position_ids", "cache_position", "num_items_in_batch", "shift_labels", "use_cache"}


def refuse_what_asks(hf: dict[str, Any], where: str) -> None:
    """Raise ArgumentError if one of these further arguments of Hugging Face asks `where` for something."""
    for name, value in hf.items():
        if name not in _HARMLESS and not _asks_nothing(value):
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(name, shown, "None", f"{where} has no such thing.")


def _asks_nothing(value: Any) -> bool:
    """Whether an argument is None, False or a list of None (what transformers 4 passes as `head_mask`)."""
    return value is None or value is False or (isinstance(value, list) and all(v is None for v in value))


def collected_by_transformers() -> dict[str, Any]:
    """What the transformers 5 model around us wants to be told: lists to append to, by name; empty if nothing.

    Transformers 5 gathers hidden states by hooks on its own layer classes, through a collector that is active during
    the forward pass. It finds none of them in our encoder, so the encoder appends for itself.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None or (torch.compiler.is_compiling() and not collector.compiling):  # dynamo traces no ContextVar
        return {}
    return collector.get() or {}


def append_hidden_states(collected: dict[str, Any], states: list[Tensor]) -> None:
    """Append each state that `collected` asks for; see `collected_by_transformers`.

    Raises:
        ArgumentError: attention weights are asked for; no kernel ever holds them.
    """
    if "attentions" in collected:
        raise ArgumentError("output_attentions", True, "False", "fastbert.Encoder never holds attention weights.")
    if "hidden_states" in collected:
        selected = collected.get("_hidden_states_layers")
        collected["hidden_states"] += [
            state if selected is None or i in selected else None for i, state in enumerate(states)
        ]
