"""What a family's file says: how its checkpoints and its models in transformers are spelled, and what they compute."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig, HeadConfig, HeadShape, Read
from fastbert.errors import ArgumentError

# Of heads by what their classifier reads, the field of config.json that says the dropout before it, and what it is
# where the file has none or null: a number, what another field says, or None for that of the hidden states.
Dropouts = Mapping[Read, tuple[str, float | str | None]]
CLASSIFIER_DROPOUT = ("classifier_dropout", None)
NO_FIELD: tuple[None, None] = (None, None)

# A linear layer of the tables below may be several of theirs, one after the other, or a part of one of theirs.
Spelled = str | tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """Where a layer has its modules: dotted names below the layer.

    Attributes:
        query, key, value: one name for all three where they are one linear layer.
        output_norm: of a layer that normalises first that of the next layer, see `Family.last_norm`.
        activation: of the feed-forward.
        dropout_of_weights: of attention's, which are dropped where the module above it is in training mode; may be a
            number there.
        dropout_of_context, dropout_of_output: of attention's output and of the feed-forward's; None where the family
            has no such dropout.
        position_key, position_query, dropout_of_positions: of `EncoderConfig.disentangled`.
        dropout_of_activation: of the feed-forward's activation; None where the family has no such dropout.
        gate_last: of `intermediate`, which is one linear layer of two halves, the activation is of the second.
    """

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    intermediate: Spelled
    output: str
    output_norm: str
    activation: str
    dropout_of_weights: str
    dropout_of_context: str | None
    dropout_of_output: str | None
    position_key: str = "attention.position_key"
    position_query: str = "attention.position_query"
    dropout_of_positions: str = "attention.position_dropout"
    dropout_of_activation: str | None = None
    gate_last: bool = False

    def weights(self) -> dict[str, Spelled]:
        """Of each module with weights what it is called in a layer of ours and in one of theirs."""
        ours = OURS
        parts = ("query", "key", "value", "attention_output", "attention_norm", "intermediate", "output", "output_norm")
        of_positions = ("position_key", "position_query")
        return {getattr(ours, part): getattr(self, part) for part in (*parts, *of_positions)}


OURS = Names(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    intermediate="intermediate.dense",
    output="output.dense",
    output_norm="output.LayerNorm",
    activation="intermediate.intermediate_act_fn",
    dropout_of_weights="attention.self.dropout",
    dropout_of_context="attention.output.dropout",
    dropout_of_output="output.dropout",
)


def read_fields(given: Mapping[str, Any], names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Fields of an EncoderConfig by their names in a config.json and what they are there by default.

    Raises:
        ArgumentError: it asks for a decoder.
    """
    for name in ("is_decoder", "add_cross_attention"):
        if given.get(name):
            raise ArgumentError(f"config.{name}", repr(given[name]), "False: this is a bidirectional encoder")
    return {ours: given.get(theirs, usual) for ours, (theirs, usual) in names.items()}


def check_head_dim(given: Mapping[str, Any], read: EncoderConfig) -> None:
    """Raise ArgumentError where a config.json has heads of another width than `hidden_size` by heads."""
    if given.get("head_dim") not in (None, read.head_dim):
        raise ArgumentError("config.head_dim", repr(given["head_dim"]), f"{read.head_dim}: hidden_size by heads")


def read_object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field of config.json that is an object; an empty one where it is missing or null."""
    found = given.get(name) or {}
    if not isinstance(found, dict):
        raise ArgumentError(f"config.{name}", repr(found), "an object, or null")
    return found


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of rotary positions. `rope_scaling` comes first, as in transformers."""
    parameters, scaling = (read_object(given, name) for name in ("rope_parameters", "rope_scaling"))
    found = scaling or parameters
    turned = given.get("partial_rotary_factor")
    return found if turned is None else {"partial_rotary_factor": turned, **found}


def rope_base(given: Mapping[str, Any], usual: float) -> float:
    """The base of rotary positions by `rope_parameters`, or by `rope_theta`, its form before transformers 5.

    Raises:
        ArgumentError: positions are scaled, or turn part of a head.
    """
    rope = _rope(given)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArgumentError("config.rope_parameters", repr(rope), "rotary positions of whole heads that are not scaled")
    base = rope.get("rope_theta") or given.get("rope_theta") or usual
    return float(base)


def scaled_rope(given: Mapping[str, Any], usual: float, head_dim: int) -> tuple[float, float]:
    """As `rope_base`, and what the angles are multiplied by, which may be scaled.

    "linear" divides them by `factor`. "ntk", which is Alibaba-NLP/new-impl's, has `base * factor` and divides them by
    `factor ** (2 / head_dim)`: formula (6) of https://kexue.fm/archives/9706.

    Raises:
        ArgumentError: they are scaled in another way.
    """
    rope = _rope(given)
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind not in ("linear", "ntk") or rope.get("mixed_b") is not None:
        return rope_base(given, usual), 1.0
    if not isinstance(factor, int | float) or not 1.0 <= factor < math.inf:
        raise ArgumentError("config.rope_scaling", repr(rope), "a factor of 1 or more")
    turned = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    base = rope_base({"rope_theta": given.get("rope_theta"), "rope_parameters": turned}, usual)
    return (base, 1.0 / factor) if kind == "linear" else (base * factor, factor ** (-2.0 / head_dim))


def own_hf(encoder: Any) -> Any:
    """An encoder's `config`."""
    return encoder.config


def as_config_says(_: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The dict of a config as it is."""
    return given


def nothing(*_: Any) -> None:
    """Nothing that modules do otherwise than the config says."""


def other_turns(rotary: Any, kind: str, base: float, scale: float = 1.0) -> str | None:
    """Where a model's module of rotary positions does not turn by `scale * base ** (-2i / head_dim)`.

    Args:
        kind: how its buffer of frequencies and its factor are named in front.
    """
    frequencies, factor = (getattr(rotary, f"{kind}{name}", None) for name in ("inv_freq", "attention_scaling"))
    if not isinstance(frequencies, Tensor) or frequencies.dim() != 1 or factor != 1.0:
        return "rotary positions of another kind"
    if frequencies.is_meta:
        return None
    steps = torch.arange(len(frequencies), dtype=torch.float64, device=frequencies.device) / len(frequencies)
    wanted = scale * base**-steps
    rounded = 0.01  # by a cast of the model, which may have been to bfloat16
    near = torch.isclose(frequencies.double(), wanted, rtol=rounded, atol=0.0).all()
    return None if near else "rotary positions of other frequencies than the config's"


def first_layer(encoder: Any) -> Any:
    """The first of an encoder's `layer`.

    Raises:
        ArgumentError: there is none.
    """
    if not len(encoder.layer):
        raise ArgumentError("layers", "none", "one or more")
    return encoder.layer[0]


def own_layers(encoder: Any) -> Sequence[nn.Module]:
    """An encoder's `layer`, one after the other."""
    return list(encoder.layer)


def model_layers(model: Any) -> Sequence[nn.Module]:
    """The `layers` of a model that is its own encoder."""
    return list(model.layers)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        model_types: what `model_type` in config.json is, and how the names of transformers' classes then begin. A form
            of another family has a name of its own here.
        form_of: the `model_type` that it has in common with the family that it is another form of.
        told_by: of a config.json and the keys of a checkpoint with that `model_type`, whether it is of this form.
        config: reads the dict of a config.json.
        names: of the modules of a layer.
        body: of each module outside the layers what it is called in our model and in theirs.
        layer: what layer `{}` is called in theirs.
        prefix: what a model with a head puts before the keys of its body.
        other_prefixes: what is read in its place.
        heads: by the end of a class's name, of each module of a head what it is called in our model and in theirs.
        carried: beginnings of keys that a model need not compute with, but saves as they came; those of the body are
            relative to its prefix.
        tied: keys of a head that a file may hold although they are the same tensor as another, and its key.
        num_layers: the field of config.json that says how many there are.
        class_names: what transformers' class, or the remote code's, is called where it is not as our class: by the end
            of our class's name.
        dropouts: see `Dropouts`. What reads otherwise has the dropout that `HeadConfig.classifier_dropout` says.
        shapes: by what a classifier reads, what such heads have where it is other than the `heads` of `config`.
        last_norm: the LayerNorm after the last layer, where layers normalise first; None where they do not.
        modules: as `names`, where transformers' classes have other ones than checkpoints.
        encoders: transformers' classes that `accelerate` computes, `MODULE.CLASS` below `transformers.models.`.
        models: of the classes of whole models without a head, likewise, the class of what each returns, in
            `transformers.modeling_outputs`.
        as_made: attributes of such a model, and what they are unless somebody has set them to something else.
        within: where such a model has its encoder; "" where it is that itself.
        hf: transformers' config of such an encoder.
        own: of such an encoder and the dict of its config that dict as the encoder's modules have it, where they read
            it no more.
        unlike: of such an encoder what its modules do otherwise than the config says; None where nothing is.
        watched: attributes of such an encoder's modules that `own` and `unlike` read.
        layers: of such an encoder, in the order in which they run; a layer may come several times.
        relative: of such an encoder the module with the table of distances; None where there is none.
        relative_norm: of such an encoder the LayerNorm that goes over that table; None where there is none.
        convolution: of such an encoder the module that is called after the first layer, with `conv`, `LayerNorm` and
            `dropout` in it; None where the family has none.
        entry: of such an encoder the module that hidden states go through before the first layer; None where there is
            none.
        only_padding: such an encoder's mask is `[batch, seqlen]`, 1 for a token; other forms of a mask mean something
            else there than in `masks.read_mask`.
        output: the class of what such an encoder returns, in `transformers.modeling_outputs`.
    """

    model_types: Mapping[str, str]
    config: Callable[[Mapping[str, Any]], EncoderConfig]
    names: Names
    body: Mapping[str, Spelled]
    layer: str
    prefix: str
    heads: Mapping[str, Mapping[str, str]]
    carried: tuple[str, ...]
    encoders: tuple[str, ...]
    modules: Names | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    as_made: Mapping[str, Any] = field(default_factory=dict)
    within: str = "encoder"
    tied: Mapping[str, str] = field(default_factory=dict)
    form_of: str | None = None
    told_by: Callable[[Mapping[str, Any], Collection[str]], bool] | None = None
    other_prefixes: tuple[str, ...] = ()
    num_layers: str = "num_hidden_layers"
    class_names: Mapping[str, str] = field(default_factory=dict)
    dropouts: Dropouts = field(
        default_factory=lambda: {"text": CLASSIFIER_DROPOUT, "choice": CLASSIFIER_DROPOUT, "token": CLASSIFIER_DROPOUT}
    )
    shapes: Mapping[Read, Callable[[Mapping[str, Any]], HeadShape]] = field(default_factory=dict)
    last_norm: str | None = None
    hf: Callable[[nn.Module], Any] = own_hf
    own: Callable[[Any, dict[str, Any]], dict[str, Any]] = as_config_says
    unlike: Callable[[Any, EncoderConfig], str | None] = nothing
    watched: tuple[str, ...] = ()
    layers: Callable[[nn.Module], Sequence[nn.Module]] = own_layers
    relative: str | None = None
    relative_norm: str | None = None
    convolution: str | None = None
    entry: str | None = None
    only_padding: bool = False
    output: str = "BaseModelOutput"

    @property
    def anchor(self) -> str:
        """A key that every body has: the word table."""
        return f"{self.body['embeddings.word']}.weight"

    def read_config(self, given: Mapping[str, Any], reads: Read | None = None) -> EncoderConfig:
        """What the dict of a config.json says of a model, whose head has a classifier that reads this.

        Raises:
            ArgumentError: it asks for what is not served, or a field has a value that it can't have.
        """
        read = self.config(given)
        shape = None if reads is None else self.shapes.get(reads)
        return read if shape is None else replace(read, heads=shape(given))

    def read_head(self, given: Mapping[str, Any], reads: Read | None) -> HeadConfig:
        """What the dict of a config.json says of a head whose classifier reads this; see `HeadConfig.from_hf`."""
        name, usual = NO_FIELD if reads is None else self.dropouts.get(reads, NO_FIELD)
        dropout = None if name is None else given.get(name)
        if dropout is None:
            dropout = given.get(usual) if isinstance(usual, str) else usual
        try:
            return HeadConfig.from_hf({**given, "classifier_dropout": dropout})
        except ArgumentError as error:
            if name is None or error.argument != "config.classifier_dropout":
                raise
            raise ArgumentError(f"config.{name}", error.got, error.expected, error.mend) from error

    def write_head(self, head: HeadConfig, reads: Read | None) -> dict[str, Any]:
        """The fields of a config.json that mean this head; warns of a dropout that none of them can say."""
        fields = head.to_hf()
        dropout = fields.pop("classifier_dropout")
        name, _ = NO_FIELD if reads is None else self.dropouts.get(reads, NO_FIELD)
        if name is not None:
            fields[name] = dropout
        elif reads is not None and dropout is not None:
            message = (
                f"config.json of {next(iter(self.model_types))} has no field for classifier_dropout={dropout} here"
            )
            warnings.warn(f"{message}: it is lost when the model is saved", stacklevel=4)
        return fields

    @staticmethod
    def class_name(module: nn.Module) -> str:
        """Of a module of transformers as `encoders` and `models` have it."""
        kind = type(module)
        return f"{kind.__module__}.{kind.__name__}".removeprefix("transformers.models.")
