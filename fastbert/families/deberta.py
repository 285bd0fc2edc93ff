"""DeBERTa v2 and v3: attention by content and relative position, and a pooler that belongs to the heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fastbert.config import HF_ACTIVATIONS, Convolution, Disentangled, EncoderConfig, HeadShape
from fastbert.errors import ArgumentError
from fastbert.families.bert import ANSWERS, CLASSIFIER, NUMBERS, WORD
from fastbert.families.names import OURS, Family, first_layer

_USUAL = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "max_position_embeddings": 512,
}


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `DebertaV2Config`."""
    given = {**_USUAL, **given}
    read = EncoderConfig.from_hf({**given, "type_vocab_size": None, "embedding_size": None})
    same = {"attention_head_size": read.head_dim, "pooler_hidden_size": read.hidden_size}
    for name, size in same.items():
        if given.get(name) not in (None, size):
            raise ArgumentError(f"config.{name}", repr(given[name]), f"{size}, as hidden_size and the heads say")
    pooled = given.get("pooler_hidden_act", "gelu")
    if pooled != "tanh" and pooled not in HF_ACTIVATIONS:
        raise ArgumentError("config.pooler_hidden_act", repr(pooled), f"one of {', '.join((*HF_ACTIVATIONS, 'tanh'))}")
    try:
        heads = HeadShape(
            transformed=("text", "choice"),
            activation="tanh" if pooled == "tanh" else HF_ACTIVATIONS[pooled],
            drop_first=True,
            first_dropout=given.get("pooler_dropout", 0.0),
        )
    except ArgumentError as error:
        raise ArgumentError("config.pooler_dropout", error.got, error.expected) from error
    width = given.get("embedding_size")
    try:
        read = replace(read, embedding_size=None if width == read.hidden_size else width, project_first=True)
    except ArgumentError as error:
        raise ArgumentError("config.embedding_size", error.got, error.expected) from error
    return replace(
        read,
        type_vocab_size=given["type_vocab_size"],
        positions="columns" if given.get("position_biased_input", True) else "none",
        disentangled=_disentangled(given),
        convolution=_convolution(given, read.hidden_size),
        heads=heads,
    )


def _disentangled(given: Mapping[str, Any]) -> Disentangled | None:
    terms = given.get("pos_att_type") or []
    terms = terms.lower().split("|") if isinstance(terms, str) else terms
    if not isinstance(terms, list | tuple) or not all(isinstance(term, str) for term in terms):
        raise ArgumentError("config.pos_att_type", repr(terms), "a list of c2p and p2c, or null")
    terms = tuple(term.strip() for term in terms if term.strip() not in ("", "none"))
    relative = bool(given.get("relative_attention", False))
    if relative != bool(terms):
        expected = "c2p or p2c with relative_attention, and none without"
        raise ArgumentError("config.pos_att_type", f"{given.get('pos_att_type')!r}", expected)
    if not relative:
        return None
    sizes = {name: given.get(name, -1) for name in ("max_relative_positions", "position_buckets")}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ArgumentError(f"config.{name}", repr(size), "a whole number, -1 for none")
    norms = given.get("norm_rel_ebd", "none")
    if not isinstance(norms, str):
        raise ArgumentError("config.norm_rel_ebd", repr(norms), "layer_norm or none")
    farthest, buckets = sizes.values()
    try:
        return Disentangled(
            terms=tuple(terms),
            farthest=given["max_position_embeddings"] if farthest < 1 else farthest,
            buckets=buckets if buckets > 0 else None,
            shared=bool(given.get("share_att_key", False)),
            normalised="layer_norm" in [one.strip() for one in norms.lower().split("|")],
        )
    except ArgumentError as error:
        name = {"terms": "pos_att_type", "farthest": "max_relative_positions"}.get(error.argument, "position_buckets")
        raise ArgumentError(f"config.{name}", error.got, error.expected, error.mend) from error


def _convolution(given: Mapping[str, Any], hidden: int) -> Convolution | None:
    width, groups = given.get("conv_kernel_size") or 0, given.get("conv_groups", 1)
    if width == 0:
        return None
    activation = given.get("conv_act", "tanh")
    if activation != "tanh" and activation not in HF_ACTIVATIONS:
        raise ArgumentError("config.conv_act", repr(activation), f"one of {', '.join((*HF_ACTIVATIONS, 'tanh'))}")
    try:
        made = Convolution(width, groups, "tanh" if activation == "tanh" else HF_ACTIVATIONS[activation])
    except ArgumentError as error:
        name = {"width": "conv_kernel_size", "groups": "conv_groups"}[error.argument]
        raise ArgumentError(f"config.{name}", error.got, error.expected) from error
    if hidden % groups:
        raise ArgumentError("config.conv_groups", groups, f"a divisor of hidden_size={hidden}")
    return made


def hf(encoder: Any) -> Any:
    """The config, which only parts of its layers hold."""
    return first_layer(encoder).attention.config


def unlike(encoder: Any, read: EncoderConfig) -> str | None:
    """What of its relative positions is not as the config says."""
    asked = read.disentangled
    of_layer: dict[str, Any] = {"relative_attention": asked is not None}
    if asked is not None:
        sizes = {"max_relative_positions": asked.farthest, "position_buckets": asked.buckets or -1}
        of_layer |= {**sizes, "pos_ebd_size": asked.span, "share_att_key": asked.shared}
    of_encoder = {name: value for name, value in of_layer.items() if name not in ("pos_ebd_size", "share_att_key")}
    attentions = [layer.attention.self for layer in encoder.layer]
    for module, wanted in ((encoder, of_encoder), *((attention, of_layer) for attention in attentions)):
        for name, value in wanted.items():
            given = getattr(module, name, None)
            given = -1 if name == "position_buckets" and given is not None and given < 1 else given
            if given != value:
                return f"a {name} other than the config's"
    if asked is None:
        return None
    if ("layer_norm" in encoder.norm_rel_ebd) != asked.normalised:
        return "a norm_rel_ebd other than the config's"
    if any(set(attention.pos_att_type) != set(asked.terms) for attention in attentions):
        return "a pos_att_type other than the config's"
    return None


def has_own_head(given: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether the head of masked-token prediction is that of DeBERTa's authors."""
    return given.get("legacy", True) is False


_POOLED = {"transform.dense": "pooler.dense", "classifier": "classifier"}

DEBERTA_V2 = Family(
    model_types={"deberta-v2": "DebertaV2"},
    config=config,
    names=replace(
        OURS,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        position_key="attention.self.pos_key_proj",
        position_query="attention.self.pos_query_proj",
        dropout_of_positions="attention.self.pos_dropout",
    ),
    body={
        "embeddings.word": "embeddings.word_embeddings",
        "embeddings.position": "embeddings.position_embeddings",
        "embeddings.token_type": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "embeddings.project": "embeddings.embed_proj",
        "encoder.layer.0.convolution.conv": "encoder.conv.conv",
        "encoder.layer.0.convolution.LayerNorm": "encoder.conv.LayerNorm",
        "encoder.relative": "encoder.rel_embeddings",
        "encoder.relative_norm": "encoder.LayerNorm",
    },
    layer="encoder.layer.{}",
    prefix="deberta.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "cls.predictions.transform.dense",
            "predictions.norm": "cls.predictions.transform.LayerNorm",
            "predictions": "cls.predictions",
        },
        "ForSequenceClassification": _POOLED,
        "ForMultipleChoice": _POOLED,
        "ForTokenClassification": CLASSIFIER,
        "ForQuestionAnswering": ANSWERS,
    },
    # a position table is in files of models that read none, too
    carried=(
        "cls.predictions.",
        "lm_predictions.",
        "mask_predictions.",
        "pooler.",
        "classifier.",
        "qa_outputs.",
        "embeddings.position_embeddings.",
        *NUMBERS,
    ),
    tied={"cls.predictions.decoder.weight": WORD, "cls.predictions.decoder.bias": "cls.predictions.bias"},
    encoders=("deberta_v2.modeling_deberta_v2.DebertaV2Encoder",),
    models={"deberta_v2.modeling_deberta_v2.DebertaV2Model": "BaseModelOutput"},
    as_made={"z_steps": 0},
    dropouts=dict.fromkeys(("text", "choice"), ("cls_dropout", None)),
    hf=hf,
    relative="rel_embeddings",
    relative_norm="LayerNorm",
    convolution="conv",
    only_padding=True,
    unlike=unlike,
    watched=(
        "relative_attention",
        "max_relative_positions",
        "position_buckets",
        "pos_ebd_size",
        "pos_att_type",
        "share_att_key",
        "norm_rel_ebd",
    ),
)

DEBERTA_V2_OWN_HEAD = replace(
    DEBERTA_V2,
    model_types={"deberta-v2, legacy=False": "DebertaV2"},
    form_of="deberta-v2",
    told_by=has_own_head,
    heads={
        **DEBERTA_V2.heads,
        "ForMaskedLM": {
            "predictions.dense": "lm_predictions.lm_head.dense",
            "predictions.norm": "lm_predictions.lm_head.LayerNorm",
            "predictions": "lm_predictions.lm_head",
        },
    },
    tied={},
    encoders=(),
    models={},
)
