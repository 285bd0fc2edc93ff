"""Models of other people as fastbert computes them: a file says all about a family."""

from __future__ import annotations

from collections.abc import Mapping

from fastbert.families.albert import ALBERT
from fastbert.families.bert import BERT, ELECTRA
from fastbert.families.deberta import DEBERTA_V2, DEBERTA_V2_OWN_HEAD
from fastbert.families.distilbert import DISTILBERT
from fastbert.families.modernbert import MODERNBERT
from fastbert.families.mpnet import MPNET
from fastbert.families.names import Family
from fastbert.families.roberta import ROBERTA

# By what `model_type` in a config.json is, and variants by names of their own; see `Family.variant`.
FAMILIES: Mapping[str, Family] = {
    model_type: family
    for family in (BERT, ELECTRA, ROBERTA, DISTILBERT, ALBERT, MPNET, DEBERTA_V2, DEBERTA_V2_OWN_HEAD, MODERNBERT)
    for model_type in family.model_types
}
