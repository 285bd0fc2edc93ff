"""EncoderConfig, everything that decides the shape and arithmetic of an encoder; HeadConfig, the same of a head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

from fastbert.errors import ArgumentError, shown

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

MOST_LABELS = 2**20  # far more than anybody has, and still made at once

# Hugging Face's names for the activations we have; the two tanh spellings are the same function.
HF_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and arithmetic of a BERT encoder.

    Attributes:
        vocab_size, hidden_size, num_layers, num_heads, intermediate_size: sizes; `hidden_size` is a multiple of
            `num_heads`.
        max_positions, type_vocab_size: rows of the position and token-type tables.
        activation: "gelu" is the exact (erf) form, "gelu_tanh" its tanh approximation.
        eps: LayerNorm epsilon.
        hidden_dropout, attention_dropout: probabilities, used in training mode only.
        pad_token_id: row of the word table that padding uses, which gets no gradient; None if there is none.
        initializer_range: standard deviation of freshly initialised weights.

    Raises:
        ArgumentError: a size is no positive int, or a number not in its range.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    activation: Activation = "gelu"
    eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_token_id: int | None = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "intermediate_size", "max_positions", "type_vocab_size"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ArgumentError(name, repr(getattr(self, name)), "a positive int")
        if not _is_int(self.num_layers) or self.num_layers < 0:
            raise ArgumentError("num_layers", repr(self.num_layers), "zero or more layers")
        if self.hidden_size % self.num_heads:
            raise ArgumentError("num_heads", self.num_heads, f"a divisor of hidden_size={self.hidden_size}")
        for name in ("hidden_dropout", "attention_dropout"):
            if not _is_probability(getattr(self, name)):
                raise ArgumentError(name, repr(getattr(self, name)), "a probability in [0, 1)")
        for name in ("eps", "initializer_range"):
            if not _is_number(getattr(self, name)) or not 0.0 <= getattr(self, name) <= 1.0:
                raise ArgumentError(name, repr(getattr(self, name)), "a number from 0 to 1")
        if self.activation not in get_args(Activation):
            raise ArgumentError("activation", self.activation, f"one of {', '.join(get_args(Activation))}")
        pad = self.pad_token_id
        if pad is not None and (not _is_int(pad) or not 0 <= pad < self.vocab_size):
            raise ArgumentError("pad_token_id", repr(pad), f"a row of the word table, from 0 to {self.vocab_size - 1}")

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, hf: Any) -> EncoderConfig:
        """From a transformers `BertConfig`, or the dict read from its `config.json`.

        Raises:
            ArgumentError: the config asks for something a BERT encoder here does not do (decoder, cross-attention,
                relative positions, an activation we lack), or a field has a value that it can't have.
        """
        given = _fields(hf)
        for name in ("is_decoder", "add_cross_attention"):
            if given.get(name):
                raise ArgumentError(f"config.{name}", repr(given[name]), "False: this is a bidirectional encoder")
        positions = given.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise ArgumentError("config.position_embedding_type", repr(positions), "'absolute'")
        if given.get("embedding_size") not in (None, given.get("hidden_size")):
            raise ArgumentError("config.embedding_size", repr(given["embedding_size"]), "the same as hidden_size")
        activation = given.get("hidden_act", "gelu")
        if not isinstance(activation, str) or activation not in HF_ACTIVATIONS:
            raise ArgumentError("config.hidden_act", repr(activation), f"one of {', '.join(HF_ACTIVATIONS)}")
        values = {ours: given[theirs] for ours, theirs in HF_NAMES.items() if given.get(theirs) is not None}
        pad, words = given.get("pad_token_id", 0), values.get("vocab_size", cls.vocab_size)
        if _is_int(pad) and _is_int(words) and -words <= pad < 0:
            pad += words  # as torch counts from the end
        try:
            return cls(**{**values, "pad_token_id": pad}, activation=HF_ACTIVATIONS[activation])
        except ArgumentError as error:
            name = f"config.{HF_NAMES.get(error.argument, error.argument)}"
            raise ArgumentError(name, error.got, error.expected, error.mend) from error

    def to_hf(self) -> dict[str, Any]:
        """The fields of a Hugging Face `BertConfig` that mean this encoder."""
        names = {activation: name for name, activation in reversed(HF_ACTIVATIONS.items())}
        values: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in HF_NAMES.items()}
        return {"model_type": "bert", **values, "hidden_act": names[self.activation]}


# Hugging Face's names of our fields.
HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
}
assert set(HF_NAMES) | {"activation"} == {f.name for f in fields(EncoderConfig)}


@dataclass(frozen=True)
class HeadConfig:
    """What a head needs to know beside the encoder.

    Attributes:
        labels: names of the classes, one output each; heads with a fixed number of outputs don't read them.
        problem_type: the loss of a sequence classifier. None decides by the labels, as Hugging Face does: regression
            for one class, single label for integers, multi label for floats.
        classifier_dropout: probability before a classifier, in training mode; None means `hidden_dropout`.

    Raises:
        ArgumentError: no labels or two of one name, an unknown problem type, or a probability not in [0, 1).
    """

    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: ProblemType | None = None
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(label, str) for label in self.labels):
            raise ArgumentError("labels", self.labels, "strings")
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ArgumentError("labels", self.labels, "one or more different names")
        if self.problem_type is not None and self.problem_type not in get_args(ProblemType):
            raise ArgumentError("problem_type", self.problem_type, f"None or one of {', '.join(get_args(ProblemType))}")
        if self.classifier_dropout is not None and not _is_probability(self.classifier_dropout):
            raise ArgumentError("classifier_dropout", repr(self.classifier_dropout), "a probability in [0, 1)")

    @classmethod
    def from_hf(cls, hf: Any) -> HeadConfig:
        """From a transformers `BertConfig`, or the dict read from its `config.json`.

        Names that are numbers become strings. Without `id2label` the names are those of `label2id`, or LABEL_0 and on.
        They are that, too, where there are other than `num_labels` names, as transformers does; a warning says so.

        Raises:
            ArgumentError: the labels are not numbered from 0 or not different, or a field has a value that it can't
                have.
        """
        given = _fields(hf)
        number, names, reverse = (given.get(name) for name in ("num_labels", "id2label", "label2id"))
        if number is not None and not (_is_int(number) and 0 < number <= MOST_LABELS):
            raise ArgumentError("config.num_labels", repr(number), f"a whole number from 1 to {MOST_LABELS}")
        if names is None and isinstance(reverse, dict) and reverse:
            names = {value: name for name, value in reverse.items() if isinstance(value, int | str)}
        labels = _unnamed(number or 2) if names is None else _in_order(names)
        if number not in (None, len(labels)):
            if labels != _unnamed(len(labels)):
                message = f"config.json names {len(labels)} labels and has num_labels {number}: they are LABEL_0 and on"
                warnings.warn(message, stacklevel=2)
            labels = _unnamed(number)
        try:
            return cls(labels, given.get("problem_type"), given.get("classifier_dropout"))
        except ArgumentError as error:
            name = "id2label" if error.argument == "labels" else error.argument
            raise ArgumentError(f"config.{name}", error.got, error.expected, error.mend) from error

    def to_hf(self) -> dict[str, Any]:
        """The fields of a Hugging Face `BertConfig` that mean this head."""
        return {
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
            "classifier_dropout": self.classifier_dropout,
        }


def _fields(hf: Any) -> dict[str, Any]:
    if isinstance(hf, dict):
        return dict(hf)
    if not hasattr(hf, "to_dict"):
        raise ArgumentError(
            "config", f"a {type(hf).__name__}", "a BertConfig of transformers, or the dict of a config.json"
        )
    return dict(hf.to_dict())


def _unnamed(number: int) -> tuple[str, ...]:
    """Hugging Face's names for labels that have none."""
    return tuple(f"LABEL_{i}" for i in range(number))


def _in_order(names: Any) -> tuple[str, ...]:
    """The values of `id2label`, in the order of its numbers."""
    by_number = {str(number): name for number, name in names.items()} if isinstance(names, dict) else {}
    numbers = [str(i) for i in range(len(by_number))]
    if not by_number or set(by_number) != set(numbers):
        raise ArgumentError("config.id2label", shown(names), "names of labels numbered from 0, without a gap")
    if not all(isinstance(name, str | int | float) for name in by_number.values()):
        raise ArgumentError("config.id2label", shown(names), "names that are strings or numbers")
    return tuple(str(by_number[number]) for number in numbers)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_probability(value: object) -> bool:
    return _is_number(value) and 0.0 <= value < 1.0
