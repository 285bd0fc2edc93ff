"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's layers, positions counted by tokens, heads of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastbert.config import EncoderConfig, HeadShape
from fastbert.families.bert import ANSWERS, BERT, CLASSIFIER, NUMBERS, WORD
from fastbert.families.names import CLASSIFIER_DROPOUT

HEADS = HeadShape(transformed=("text",), activation="tanh", drop_first=True, predict="gelu")

HEAD_NAMES = {
    "ForMaskedLM": {
        "predictions.dense": "lm_head.dense",
        "predictions.norm": "lm_head.layer_norm",
        "predictions": "lm_head",
    },
    "ForSequenceClassification": {"transform.dense": "classifier.dense", "classifier": "classifier.out_proj"},
    "ForMultipleChoice": CLASSIFIER,
    "ForTokenClassification": CLASSIFIER,
    "ForQuestionAnswering": ANSWERS,
}
CARRIED = ("lm_head.", "classifier.", "qa_outputs.", "pooler.", *NUMBERS)
TIED = {"lm_head.decoder.weight": WORD, "lm_head.decoder.bias": "lm_head.bias"}


def config(given: Mapping[str, Any]) -> EncoderConfig:
    """Of a transformers `RobertaConfig`: the position table begins with the row of padding."""
    read = EncoderConfig.from_hf({"vocab_size": 50265, "pad_token_id": 1, **given})
    pad = 0 if read.pad_token_id is None else read.pad_token_id
    return replace(read, positions="tokens", first_position=pad + 1, heads=HEADS)


ROBERTA = replace(
    BERT,
    model_types={"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"},
    config=config,
    prefix="roberta.",
    heads=HEAD_NAMES,
    dropouts=dict.fromkeys(("text", "token"), CLASSIFIER_DROPOUT),
    carried=CARRIED,
    tied=TIED,
    encoders=(
        "roberta.modeling_roberta.RobertaEncoder",
        "xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder",
        "camembert.modeling_camembert.CamembertEncoder",
    ),
    models=dict.fromkeys(
        (
            "roberta.modeling_roberta.RobertaModel",
            "xlm_roberta.modeling_xlm_roberta.XLMRobertaModel",
            "camembert.modeling_camembert.CamembertModel",
        ),
        "BaseModelOutputWithPoolingAndCrossAttentions",
    ),
)
