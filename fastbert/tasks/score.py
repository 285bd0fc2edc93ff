"""Texts, or pairs of texts, to one number each; documents in the order of their scores for a query."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastbert.checkpoints.files import checkpoint_folder
from fastbert.checkpoints.sentence import read_score_activation
from fastbert.errors import CheckpointError
from fastbert.model.heads import EncoderForSequenceClassification
from fastbert.model.sentence import ACTIVATIONS
from fastbert.tasks.hits import Hit, best_rows, hits
from fastbert.tasks.loading import DTypeName, with_trained_head
from fastbert.tasks.results import answers
from fastbert.text.checks import Text, check_count, check_string, strings_of
from fastbert.text.tokenizer import Tokenizer


def score(
    texts: Iterable[Text],
    model: str | os.PathLike[str] | TextScorer,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """One number for each text or pair, float32 `[texts]`, in the order of `texts`: what a cross-encoder gives.

    Args:
        texts: pairs of strings, as of a question and a passage; or strings.
        model: a checkpoint folder with a head of one output, loaded anew by each call; or a `TextScorer`, loaded once.

    See `TextScorer.score` for the other arguments and for the errors.
    """
    if not isinstance(model, TextScorer):
        model = TextScorer.from_folder(model)
    return model.score(texts, max_length=max_length, batch_tokens=batch_tokens, progress=progress)


def rerank(
    query: str,
    documents: Iterable[str],
    model: str | os.PathLike[str] | TextScorer,
    *,
    top_k: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[Hit]:
    """The documents in the order of a cross-encoder's scores for a query, the best first.

    Args:
        query: a string.
        documents: strings.
        model: a checkpoint folder with a head of one output, loaded anew by each call; or a `TextScorer`, loaded once.

    See `TextScorer.rerank` for the other arguments and for the errors.
    """
    if not isinstance(model, TextScorer):
        model = TextScorer.from_folder(model)
    return model.rerank(
        query, documents, top_k=top_k, max_length=max_length, batch_tokens=batch_tokens, progress=progress
    )


@dataclass(frozen=True, eq=False)
class TextScorer:
    """A head of one output, such as a cross-encoder or a regression, and its tokenizer, loaded once to be used often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
        activation: what is applied to the output, a key of `sentence.ACTIVATIONS`.
    """

    model: EncoderForSequenceClassification
    tokenizer: Tokenizer
    activation: str

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> TextScorer:
        """Load a checkpoint folder, or one of sentence-transformers' CrossEncoder; arguments as for `TextEncoder`.

        What is applied to the output is what the folder says. Where it says nothing it is the logistic function, and
        nothing where `problem_type` is "regression".

        Raises:
            ArgumentError: `dtype` is none of these, or torch can't use `device` here.
            CheckpointError: the folder is not a checkpoint fastbert reads, or has no head of one output.
        """
        model = with_trained_head(EncoderForSequenceClassification, folder, dtype, device)
        if (outputs := len(model.head_config.labels)) > 1:
            raise CheckpointError(str(folder), f"{outputs} outputs", "a head of one output", "Use fastbert.classify.")
        return cls(model, Tokenizer.from_folder(folder), read_score_activation(checkpoint_folder(folder)))

    def score(
        self,
        texts: Iterable[Text],
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """One number for each text or pair, float32 `[texts]`, in the order of `texts`.

        See `TextClassifier.classify` for the arguments and for the errors.
        """
        activation, doing = ACTIVATIONS[self.activation], "scoring" if progress else None
        return answers(self.model, self.tokenizer, texts, activation, max_length, batch_tokens, doing).squeeze(1)

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[Hit]:
        """The documents in the order of `score` of (query, document), the best first; of equal ones the earlier.

        Args:
            query: a string.
            documents: strings.
            top_k: how many of the best; all by default, and where there are fewer.

        See `TextClassifier.classify` for the other arguments.

        Raises:
            ArgumentError: an argument is not as described; `documents[i]` names the item.
            BackendError: a score is NaN or infinite; `texts[i]` names the document.
        """
        if top_k is not None:
            check_count("top_k", top_k)
        check_string("query", query)
        texts = strings_of(documents, "documents")
        pairs = [(query, text) for text in texts]
        scores = self.score(pairs, max_length=max_length, batch_tokens=batch_tokens, progress=progress)
        rows = best_rows(scores, len(texts) if top_k is None else top_k)
        return hits(rows, scores[rows], texts)
