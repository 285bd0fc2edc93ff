"""Models of other people as fastbert computes them: a file says all about a family."""

from __future__ import annotations

from collections.abc import Mapping

from fastbert.families.albert import ALBERT
from fastbert.families.bert import BERT, ELECTRA
from fastbert.families.deberta import DEBERTA_V2, DEBERTA_V2_OWN_HEAD
from fastbert.families.distilbert import DISTILBERT
from fastbert.families.gte import GTE, GTE_CLASS, NEW
from fastbert.families.jina import JINA
from fastbert.families.modernbert import MODERNBERT
from fastbert.families.mpnet import MPNET
from fastbert.families.names import Family
from fastbert.families.nomic import NOMIC, NOMIC_CLASS, NOMIC_ORIGINAL
from fastbert.families.roberta import ROBERTA

_ALL = (
    BERT,
    ELECTRA,
    ROBERTA,
    DISTILBERT,
    ALBERT,
    MPNET,
    DEBERTA_V2,
    DEBERTA_V2_OWN_HEAD,
    MODERNBERT,
    NOMIC,
    NOMIC_ORIGINAL,
    NOMIC_CLASS,
    NEW,
    GTE,
    GTE_CLASS,
    JINA,
)

# By what `model_type` in a config.json is; forms of another family by a name of their own.
FAMILIES: Mapping[str, Family] = {model_type: family for family in _ALL for model_type in family.model_types}
