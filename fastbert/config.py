"""EncoderConfig, everything that decides the shape and arithmetic of an encoder; HeadConfig, the same of a head."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

from fastbert.errors import ArgumentError, shown

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
# What a classifier reads: the one row of a text, of a choice or of a pair of texts, or all rows.
Read = Literal["text", "choice", "pair", "token", "answer"]
Positions = Literal["columns", "tokens", "none"]
Term = Literal["c2p", "p2c"]

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
class HeadShape:
    """What a family has between hidden states and a classifier or decoder; by default what BERT has.

    Attributes:
        transformed: what goes through a linear layer of the head's own before a classifier; for texts and choices that
            is in the place of the body's pooler.
        activation: of that linear layer.
        bias: whether it has one, and the linear layer of masked-token prediction too.
        norm: a LayerNorm follows it.
        drop_first: a dropout comes before it as well.
        first_dropout: the probability of that dropout; None for that of the one before the classifier.
        pooling: what a text is classified by: its first token, or the mean of all.
        predict: activation of masked-token prediction; None for the encoder's.
        decoder_bias: whether the decoder of masked-token prediction has a bias.

    Raises:
        ArgumentError: `first_dropout` is no probability.
    """

    transformed: tuple[Read, ...] = ()
    activation: Activation | Literal["tanh"] = "tanh"
    bias: bool = True
    norm: bool = False
    drop_first: bool = False
    first_dropout: float | None = None
    pooling: Literal["cls", "mean"] = "cls"
    predict: Activation | None = None
    decoder_bias: bool = True

    def __post_init__(self) -> None:
        if self.first_dropout is not None and not _is_probability(self.first_dropout):
            raise ArgumentError("first_dropout", repr(self.first_dropout), "a probability in [0, 1), or None")


@dataclass(frozen=True)
class Disentangled:
    """What attention's scores have besides the product of query and key (He et al. 2021, "DeBERTa").

    A table has a row for each distance, or bucket of distances, before and after a token. Products of its rows are
    added to the scores, and all are divided by `sqrt(head_dim * (1 + len(terms)))`.

    Attributes:
        terms: "c2p", the query times the key of the other token's distance; "p2c", the key times the query of it.
        farthest: the distance from which on all share a row; the last that has a bucket of its own, with `buckets`.
        buckets: half the rows of the table. Distances up to half of them have one each, farther ones share them by
            their logarithm. None where each distance has a row.
        shared: keys and queries of distances are made by the layer's own products, not by others of their own.
        normalised: a LayerNorm goes over the table.

    Raises:
        ArgumentError: a number is not in its range.
    """

    terms: tuple[Term, ...]
    farthest: int
    buckets: int | None = None
    shared: bool = False
    normalised: bool = False

    def __post_init__(self) -> None:
        if not self.terms or len(set(self.terms)) < len(self.terms) or not set(self.terms) <= set(get_args(Term)):
            raise ArgumentError("terms", self.terms, f"one or more of {', '.join(get_args(Term))}")
        if not _is_int(self.farthest) or self.farthest < 1:
            raise ArgumentError("farthest", repr(self.farthest), "a positive int")
        if self.buckets is not None:
            if not _is_int(self.buckets) or self.buckets < 2:
                raise ArgumentError("buckets", repr(self.buckets), "an int of 2 or more, or None")
            if self.farthest - 1 <= self.buckets // 2:
                raise ArgumentError("farthest", self.farthest, f"more than half of the {self.buckets} buckets, and 1")

    @property
    def span(self) -> int:
        """Half the rows of the table: that of distance d, or of its bucket, is row `span + d`."""
        return self.farthest if self.buckets is None else self.buckets


@dataclass(frozen=True)
class Convolution:
    """What is added to the output of the first layer: a convolution over its input (DeBERTa v2's largest models).

    Attributes:
        width: how many tokens in a row it sees, an odd number; the middle one is the token that it is added to.
        groups: of columns, which are convolved apart.
        activation: of what it makes.

    Raises:
        ArgumentError: a number is not in its range, or an activation that we lack.
    """

    width: int
    groups: int = 1
    activation: Activation | Literal["tanh"] = "tanh"

    def __post_init__(self) -> None:
        if not _is_int(self.width) or self.width < 1 or self.width % 2 == 0:
            raise ArgumentError("width", repr(self.width), "a positive odd int")
        if not _is_int(self.groups) or self.groups < 1:
            raise ArgumentError("groups", repr(self.groups), "a positive int")
        known = (*get_args(Activation), "tanh")
        if self.activation not in known:
            raise ArgumentError("activation", repr(self.activation), f"one of {', '.join(known)}")


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and arithmetic of an encoder; by default BERT's.

    Attributes:
        vocab_size, hidden_size, num_layers, num_heads, intermediate_size: sizes; `hidden_size` is a multiple of
            `num_heads`.
        max_positions, type_vocab_size: rows of the position and token-type tables; without token types 0. Where there
            is no position table `max_positions` is the longest sequence.
        activation: "gelu" is the exact (erf) form, "gelu_tanh" its tanh approximation.
        eps: LayerNorm epsilon.
        hidden_dropout, attention_dropout: probabilities, used in training mode only.
        dropped: the products of a layer, by their names in its steps, whose outputs `hidden_dropout` is of, besides the
            embeddings; those of "intermediate" are dropped after the activation, or the gate.
        pad_token_id: row of the word table that padding uses, which gets no gradient; None if there is none.
        initializer_range: standard deviation of freshly initialised weights.
        embedding_size: columns of the embeddings' tables, where a linear layer makes hidden states of them; None where
            they are `hidden_size` wide.
        project_first: that linear layer comes before the LayerNorm of the embeddings, and has no bias.
        positions: which row of the position table a token has: "columns", its column in the padded grid; "tokens", how
            many tokens of its sequence that are not `pad_token_id` come before it (RoBERTa), and a `pad_token_id` has
            the row before the first; "none", there is no table.
        first_position: the row of a sequence's first token.
        layer_order: of each layer the number of its modules, which layers of one number share; None where each has its
            own.
        norm_first: a LayerNorm before each half of a layer, and not after its sum.
        gated: the first product of the feed-forward has two halves; the activation of the first times the second.
        no_bias: the products of a layer that have no bias, by their names in its steps.
        norm_bias: whether a LayerNorm has a bias.
        windows: of each layer how many places away a key is seen at most, None for all; None where all see all.
        rotary: base of rotary positions; None for none.
        rotary_in_windows: that of layers with a window, where it is another.
        rotary_scale: what the angles of rotary positions are multiplied by.
        alibi: scores decrease with distance, by the slopes of Press et al. 2021.
        relative_buckets: rows of a table of biases by distance, which all layers share (Raffel et al. 2020); None for
            none.
        disentangled: attention's scores have terms of relative positions; None for none.
        convolution: after the first layer; None for none.
        heads: what heads have before their classifier or decoder.

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
    dropped: tuple[str, ...] = ("attention_output", "output")
    pad_token_id: int | None = 0
    initializer_range: float = 0.02
    embedding_size: int | None = None
    project_first: bool = False
    positions: Positions = "columns"
    first_position: int = 0
    layer_order: tuple[int, ...] | None = None
    norm_first: bool = False
    gated: bool = False
    no_bias: tuple[str, ...] = ()
    norm_bias: bool = True
    windows: tuple[int | None, ...] | None = None
    rotary: float | None = None
    rotary_in_windows: float | None = None
    rotary_scale: float = 1.0
    alibi: bool = False
    relative_buckets: int | None = None
    disentangled: Disentangled | None = None
    convolution: Convolution | None = None
    heads: HeadShape = HeadShape()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "intermediate_size", "max_positions"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ArgumentError(name, repr(getattr(self, name)), "a positive int")
        for name in ("num_layers", "type_vocab_size", "first_position"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                raise ArgumentError(name, repr(getattr(self, name)), "a whole number, zero or more")
        for name in ("embedding_size", "relative_buckets"):
            if getattr(self, name) is not None and (not _is_int(getattr(self, name)) or getattr(self, name) < 1):
                raise ArgumentError(name, repr(getattr(self, name)), "a positive int, or None")
        if self.positions not in get_args(Positions):
            raise ArgumentError("positions", self.positions, f"one of {', '.join(get_args(Positions))}")
        for name in ("rotary", "rotary_in_windows"):
            base = getattr(self, name)
            if base is not None and not (_is_number(base) and 1.0 < base < math.inf):
                raise ArgumentError(name, repr(base), "a number above 1, or None")
        if not _is_number(self.rotary_scale) or not 0.0 < self.rotary_scale < math.inf:
            raise ArgumentError("rotary_scale", repr(self.rotary_scale), "a number above 0")
        for name in ("layer_order", "windows"):
            of_layers = getattr(self, name)
            if of_layers is not None and len(of_layers) != self.num_layers:
                raise ArgumentError(name, f"{len(of_layers)} of them", f"one for each of the {self.num_layers} layers")
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
        if self.convolution is not None and (self.norm_first or self.hidden_size % self.convolution.groups):
            expected = f"groups that divide hidden_size={self.hidden_size}, and layers that normalise last"
            raise ArgumentError("convolution", self.convolution, expected)
        pad = self.pad_token_id
        if pad is not None and (not _is_int(pad) or not 0 <= pad < self.vocab_size):
            raise ArgumentError("pad_token_id", repr(pad), f"a row of the word table, from 0 to {self.vocab_size - 1}")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_positions - self.first_position

    @property
    def by_distance(self) -> bool:
        """Whether attention depends on how far apart tokens are, other than by their columns."""
        placed = (self.windows, self.rotary, self.relative_buckets, self.disentangled)
        return self.alibi or any(one is not None for one in placed)

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
        if given.get("type_vocab_size") == 0:
            raise ArgumentError("config.type_vocab_size", "0", "a positive int")
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


@dataclass(frozen=True)
class HeadConfig:
    """What a head needs to know beside the encoder.

    Attributes:
        labels: names of the classes, one output each; heads with a fixed number of outputs don't read them.
        problem_type: the loss of a sequence classifier. None decides by the labels, as Hugging Face does: regression
            for one class, single label for integers, multi label for floats.
        classifier_dropout: probability before a classifier, in training mode; None means `hidden_dropout`, and none
            before one of answers or of pairs of texts in pretraining.

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
