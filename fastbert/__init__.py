"""fastbert: BERT encoders without padding, on GPUs (Triton) and CPUs (PyTorch).

    embeddings = fastbert.encode(texts, model=folder)                    # texts in, float32 array out
    model = fastbert.load(folder)                                        # called as Hugging Face's BertModel
    model = fastbert.load(folder, fastbert.BertForTokenClassification)   # and so are those with heads
    bert.encoder = fastbert.Encoder.from_hf(bert.encoder)                # a drop-in for Hugging Face's encoder

Importing this package takes no driver call and loads neither Triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbert.backend import use_backend
from fastbert.checkpoints.load import load, save
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.encoder import Encoder
from fastbert.errors import ArgumentError, BackendError, CheckpointError, FastbertError
from fastbert.graphs import graphed
from fastbert.heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from fastbert.models import BertModel
from fastbert.packing import Packing
from fastbert.quantization import quantize

if TYPE_CHECKING:
    from fastbert.tasks import TextClassifier, TextEncoder, TextTagger, classify, encode, tag

    __version__: str

__all__ = [
    "ArgumentError",
    "BackendError",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "CheckpointError",
    "Encoder",
    "EncoderConfig",
    "FastbertError",
    "HeadConfig",
    "Packing",
    "TextClassifier",
    "TextEncoder",
    "TextTagger",
    "__version__",
    "classify",
    "encode",
    "graphed",
    "load",
    "quantize",
    "save",
    "tag",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """What needs the `tokenizers` library, or the installed package's metadata, is found when it is asked for."""
    if name in ("TextClassifier", "TextEncoder", "TextTagger", "classify", "encode", "tag"):
        from fastbert import tasks

        return getattr(tasks, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fastbert")
        except PackageNotFoundError as error:
            raise AttributeError("fastbert is not installed, so it has no version: run pip install -e .") from error
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
