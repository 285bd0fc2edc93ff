"""Texts to labels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from fastbert.errors import CheckpointError
from fastbert.model.heads import EncoderForSequenceClassification
from fastbert.tasks.loading import DTypeName, with_trained_head
from fastbert.tasks.results import answers
from fastbert.text.checks import Text
from fastbert.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Classification:
    """What a text was found to be.

    Attributes:
        label: the likeliest.
        probabilities: of every label, the likeliest first; by softmax, and each by itself, by the logistic function,
            where a text may have several labels.
    """

    label: str
    probabilities: dict[str, float]


def classify(
    texts: Iterable[Text],
    model: str | os.PathLike[str] | TextClassifier,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[Classification]:
    """The label of each text, in the order of `texts`.

    Args:
        texts: strings, or pairs of strings.
        model: a checkpoint folder with a classifier, loaded anew by each call; or a `TextClassifier`, loaded once.

    See `TextClassifier.classify` for the other arguments and for the errors.
    """
    if not isinstance(model, TextClassifier):
        model = TextClassifier.from_folder(model)
    return model.classify(texts, max_length=max_length, batch_tokens=batch_tokens, progress=progress)


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A sequence classifier and its tokenizer, loaded once to be used often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
    """

    model: EncoderForSequenceClassification
    tokenizer: Tokenizer

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> TextClassifier:
        """Load a checkpoint folder; arguments as `TextEncoder.from_folder`.

        Raises:
            ArgumentError: `dtype` is none of these, or torch can't use `device` here.
            CheckpointError: the folder is not a checkpoint fastbert reads, or has no classifier of several labels.
        """
        model = with_trained_head(EncoderForSequenceClassification, folder, dtype, device)
        problem, outputs = model.head_config.problem_type, len(model.head_config.labels)
        if problem == "regression" or outputs < 2:
            mend = "fastbert.score gives the number of a model with one output." if outputs == 1 else ""
            got = f"{problem or 'regression'} with {outputs} outputs"
            raise CheckpointError(str(folder), got, "a classifier of several labels", mend)
        return cls(model, Tokenizer.from_folder(folder))

    def classify(
        self,
        texts: Iterable[Text],
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[Classification]:
        """The label of each text, in the order of `texts`.

        Args:
            texts: strings, or pairs of strings.
            max_length: most tokens of a text, special ones included; the rest is cut off, and a warning counts the
                texts that were this long.
            batch_tokens: most tokens of a batch (a longer text is a batch of its own); by default as many as the last
                cache of a CPU holds the activations of.
            progress: show a bar on stderr, if the work is long.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names the item.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        several = self.model.head_config.problem_type == "multi_label_classification"
        likely = torch.sigmoid if several else partial(torch.softmax, dim=1)
        doing = "classifying" if progress else None
        found: list[Classification] = []
        for row in answers(self.model, self.tokenizer, texts, likely, max_length, batch_tokens, doing).tolist():
            ranked = sorted(zip(self.model.head_config.labels, row, strict=True), key=lambda pair: -pair[1])
            found.append(Classification(ranked[0][0], dict(ranked)))
        return found
