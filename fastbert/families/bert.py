"""BERT, and the families whose encoder is the same: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

from __future__ import annotations

from fastbert.families.names import Family, Names

BERT = Family(
    encoders=(
        "bert.modeling_bert.BertEncoder",
        "roberta.modeling_roberta.RobertaEncoder",
        "xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder",
        "camembert.modeling_camembert.CamembertEncoder",
        "electra.modeling_electra.ElectraEncoder",
    ),
    output="BaseModelOutputWithPastAndCrossAttentions",
    names=Names(
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
    ),
)
