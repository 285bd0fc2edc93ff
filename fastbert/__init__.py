"""fastbert: BERT encoders without padding, on GPUs (Triton) and CPUs (PyTorch).

    embeddings = fastbert.encode(texts, model=folder)                    # texts in, float32 array out
    model = fastbert.load(folder)                                        # called as Hugging Face's BertModel
    model = fastbert.load(folder, fastbert.BertForTokenClassification)   # and so are those with heads
    bert.encoder = fastbert.Encoder.from_hf(bert.encoder)                # a drop-in for Hugging Face's encoder

Importing this package loads nothing, not even torch: a name's module is loaded when the name is first asked for. So
`fastbert --help` is quick, and the command line can say how torch's threads wait before torch is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.backend import paths_taken as paths_taken
    from fastbert.backend import use_backend as use_backend
    from fastbert.checkpoints.convert import convert as convert
    from fastbert.checkpoints.load import load as load
    from fastbert.checkpoints.load import save as save
    from fastbert.config import EncoderConfig as EncoderConfig
    from fastbert.config import HeadConfig as HeadConfig
    from fastbert.errors import ArgumentError as ArgumentError
    from fastbert.errors import BackendError as BackendError
    from fastbert.errors import CheckpointError as CheckpointError
    from fastbert.errors import FastbertError as FastbertError
    from fastbert.families.accelerated import accelerate as accelerate
    from fastbert.families.accelerated import restore as restore
    from fastbert.families.accelerated import verify as verify
    from fastbert.families.attention import register_attention as register_attention
    from fastbert.families.quantization import quantize as quantize
    from fastbert.model.body import BertModel as BertModel
    from fastbert.model.body import EncoderModel as EncoderModel
    from fastbert.model.encoder import Encoder as Encoder
    from fastbert.model.graphs import graphed as graphed
    from fastbert.model.heads import BertForMaskedLM as BertForMaskedLM
    from fastbert.model.heads import BertForMultipleChoice as BertForMultipleChoice
    from fastbert.model.heads import BertForNextSentencePrediction as BertForNextSentencePrediction
    from fastbert.model.heads import BertForPreTraining as BertForPreTraining
    from fastbert.model.heads import BertForQuestionAnswering as BertForQuestionAnswering
    from fastbert.model.heads import BertForSequenceClassification as BertForSequenceClassification
    from fastbert.model.heads import BertForTokenClassification as BertForTokenClassification
    from fastbert.model.heads import EncoderForMaskedLM as EncoderForMaskedLM
    from fastbert.model.heads import EncoderForMultipleChoice as EncoderForMultipleChoice
    from fastbert.model.heads import EncoderForNextSentencePrediction as EncoderForNextSentencePrediction
    from fastbert.model.heads import EncoderForPreTraining as EncoderForPreTraining
    from fastbert.model.heads import EncoderForQuestionAnswering as EncoderForQuestionAnswering
    from fastbert.model.heads import EncoderForReplacedTokens as EncoderForReplacedTokens
    from fastbert.model.heads import EncoderForSequenceClassification as EncoderForSequenceClassification
    from fastbert.model.heads import EncoderForTokenClassification as EncoderForTokenClassification
    from fastbert.ops.fastest import choose_products as choose_products
    from fastbert.ops.watch import weights_changed as weights_changed
    from fastbert.packing import Packing as Packing
    from fastbert.rivals.bench import bench as bench
    from fastbert.tasks.classify import TextClassifier as TextClassifier
    from fastbert.tasks.classify import classify as classify
    from fastbert.tasks.encode import TextEncoder as TextEncoder
    from fastbert.tasks.encode import encode as encode
    from fastbert.tasks.fill_mask import MaskFiller as MaskFiller
    from fastbert.tasks.fill_mask import fill_mask as fill_mask
    from fastbert.tasks.score import TextScorer as TextScorer
    from fastbert.tasks.score import rerank as rerank
    from fastbert.tasks.score import score as score
    from fastbert.tasks.similar import TextIndex as TextIndex
    from fastbert.tasks.similar import similar as similar
    from fastbert.tasks.tag import TextTagger as TextTagger
    from fastbert.tasks.tag import tag as tag

    __version__: str

# Where each public name comes from, below `fastbert.`; the imports above say the same to type checkers.
_HOMES = {
    "ArgumentError": "errors",
    "BackendError": "errors",
    "BertForMaskedLM": "model.heads",
    "BertForMultipleChoice": "model.heads",
    "BertForNextSentencePrediction": "model.heads",
    "BertForPreTraining": "model.heads",
    "BertForQuestionAnswering": "model.heads",
    "BertForSequenceClassification": "model.heads",
    "BertForTokenClassification": "model.heads",
    "BertModel": "model.body",
    "CheckpointError": "errors",
    "Encoder": "model.encoder",
    "EncoderConfig": "config",
    "EncoderForMaskedLM": "model.heads",
    "EncoderForMultipleChoice": "model.heads",
    "EncoderForNextSentencePrediction": "model.heads",
    "EncoderForPreTraining": "model.heads",
    "EncoderForQuestionAnswering": "model.heads",
    "EncoderForReplacedTokens": "model.heads",
    "EncoderForSequenceClassification": "model.heads",
    "EncoderForTokenClassification": "model.heads",
    "EncoderModel": "model.body",
    "FastbertError": "errors",
    "HeadConfig": "config",
    "MaskFiller": "tasks.fill_mask",
    "Packing": "packing",
    "TextClassifier": "tasks.classify",
    "TextEncoder": "tasks.encode",
    "TextIndex": "tasks.similar",
    "TextScorer": "tasks.score",
    "TextTagger": "tasks.tag",
    "accelerate": "families.accelerated",
    "bench": "rivals.bench",
    "choose_products": "ops.fastest",
    "classify": "tasks.classify",
    "convert": "checkpoints.convert",
    "encode": "tasks.encode",
    "fill_mask": "tasks.fill_mask",
    "graphed": "model.graphs",
    "load": "checkpoints.load",
    "paths_taken": "backend",
    "quantize": "families.quantization",
    "register_attention": "families.attention",
    "rerank": "tasks.score",
    "restore": "families.accelerated",
    "save": "checkpoints.load",
    "score": "tasks.score",
    "similar": "tasks.similar",
    "tag": "tasks.tag",
    "use_backend": "backend",
    "verify": "families.accelerated",
    "weights_changed": "ops.watch",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fastbert.{_HOMES[name]}"), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    globals()[name] = value  # the next time it is found without us
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))


def _version() -> str:
    from fastbert import installed

    if (found := installed.version("fastbert")) is None:
        raise AttributeError("fastbert is not installed, so it has no version: run pip install -e .")
    return found
