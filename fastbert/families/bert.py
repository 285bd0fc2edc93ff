"""BERT, and ELECTRA, whose embeddings may be narrower and which has no pooler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from fastbert.config import HF_ACTIVATIONS, Activation, EncoderConfig, HeadShape
from fastbert.errors import ArgumentError
from fastbert.families.names import CLASSIFIER_DROPOUT, OURS, Family

BODY = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
# What transformers once wrote beside weights, and reads no more.
NUMBERS = ("embeddings.position_ids", "embeddings.token_type_ids")
CLASSIFIER = {"classifier": "classifier"}
ANSWERS = {"qa_outputs": "qa_outputs"}
WORD = "embeddings.word_embeddings.weight"

_PREDICTIONS = {
    "predictions.dense": "cls.predictions.transform.dense",
    "predictions.norm": "cls.predictions.transform.LayerNorm",
    "predictions": "cls.predictions",
}
_NEXT = {"next_sentence": "cls.seq_relationship"}

BERT = Family(
    model_types={"bert": "Bert"},
    config=EncoderConfig.from_hf,
    names=OURS,
    body=BODY,
    layer="encoder.layer.{}",
    prefix="bert.",
    heads={
        "ForMaskedLM": _PREDICTIONS,
        "ForPreTraining": {**_PREDICTIONS, **_NEXT},
        "ForNextSentencePrediction": _NEXT,
        "ForSequenceClassification": CLASSIFIER,
        "ForMultipleChoice": CLASSIFIER,
        "ForTokenClassification": CLASSIFIER,
        "ForQuestionAnswering": ANSWERS,
    },
    carried=("cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.", "pooler.", *NUMBERS),
    tied={"cls.predictions.decoder.weight": WORD, "cls.predictions.decoder.bias": "cls.predictions.bias"},
    encoders=("bert.modeling_bert.BertEncoder",),
    models={"bert.modeling_bert.BertModel": "BaseModelOutputWithPoolingAndCrossAttentions"},
    output="BaseModelOutputWithPastAndCrossAttentions",
)


_ELECTRA_HEADS = HeadShape(transformed=("text", "choice"), activation="gelu", drop_first=True, predict="gelu")


def electra_config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `ElectraConfig`."""
    usual = {"hidden_size": 256, "embedding_size": 128, "num_attention_heads": 4, "intermediate_size": 1024}
    given = {**usual, **given}
    width = given["embedding_size"]
    config = EncoderConfig.from_hf({**given, "embedding_size": None})
    return replace(config, embedding_size=None if width == config.hidden_size else width, heads=_ELECTRA_HEADS)


def _summary(given: Mapping[str, Any]) -> HeadShape:
    """What comes before ELECTRA's classifier of choices, which config.json may say.

    Raises:
        ArgumentError: it is no linear layer of the first token with an activation that we have.
    """
    for name, usual in {"summary_type": "first", "summary_use_proj": True, "summary_proj_to_labels": False}.items():
        if given.get(name, usual) != usual:
            raise ArgumentError(f"config.{name}", repr(given[name]), repr(usual))
    activations: dict[str, Activation | Literal["tanh"]] = {**HF_ACTIVATIONS, "tanh": "tanh"}
    activation = activations.get(given.get("summary_activation", "gelu"))
    if activation is None:
        got = repr(given["summary_activation"])
        raise ArgumentError("config.summary_activation", got, f"one of {', '.join(activations)}")
    try:
        return replace(_ELECTRA_HEADS, activation=activation, first_dropout=given.get("summary_first_dropout") or 0.0)
    except ArgumentError as error:
        raise ArgumentError("config.summary_first_dropout", error.got, error.expected) from error


ELECTRA = replace(
    BERT,
    model_types={"electra": "Electra"},
    config=electra_config,
    body={**BODY, "embeddings.project": "embeddings_project"},
    prefix="electra.",
    heads={
        "ForMaskedLM": {
            "predictions.dense": "generator_predictions.dense",
            "predictions.norm": "generator_predictions.LayerNorm",
            "predictions.bias": "generator_lm_head.bias",
        },
        "ForReplacedTokens": {
            "dense": "discriminator_predictions.dense",
            "replaced": "discriminator_predictions.dense_prediction",
        },
        "ForSequenceClassification": {"transform.dense": "classifier.dense", "classifier": "classifier.out_proj"},
        "ForMultipleChoice": {"transform.dense": "sequence_summary.summary", "classifier": "classifier"},
        "ForTokenClassification": CLASSIFIER,
        "ForQuestionAnswering": ANSWERS,
    },
    carried=(
        "generator_predictions.",
        "generator_lm_head.",
        "discriminator_predictions.",
        "sequence_summary.",
        "classifier.",
        "qa_outputs.",
        *NUMBERS,
    ),
    tied={"generator_lm_head.weight": WORD},
    class_names={"ForReplacedTokens": "ElectraForPreTraining"},
    dropouts={
        **dict.fromkeys(("text", "token"), CLASSIFIER_DROPOUT),
        "choice": ("summary_last_dropout", 0.1),
    },
    shapes={"choice": _summary},
    encoders=("electra.modeling_electra.ElectraEncoder",),
    models={"electra.modeling_electra.ElectraModel": "BaseModelOutputWithPastAndCrossAttentions"},
)
