"""Texts to the entities in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.model.heads import EncoderForTokenClassification
from fastbert.packing import Packing
from fastbert.tasks.loading import DTypeName, with_trained_head
from fastbert.tasks.max_length import tokens_at_most
from fastbert.tasks.results import not_finite, results
from fastbert.text.checks import items_of
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.words import DEFAULT, WordRule, parted_by_spaces
from fastbert.training.metrics import TAGS, chunks, marked, odd_tag, plain_mark

Words = Literal["remembered", "whitespace"]


@dataclass(frozen=True)
class Entity:
    """A name found in a text.

    Attributes:
        kind: its type, such as "PER".
        start, end: where it is, in characters: `text == whole[start:end]`; in words, where the text came as words.
        text: what is there; words with spaces between them.
        score: the mean probability, by softmax, of the tags of its words.
    """

    kind: str
    start: int
    end: int
    text: str
    score: float


def tag(
    texts: Iterable[str | Sequence[str]],
    model: str | os.PathLike[str] | TextTagger,
    *,
    words: Words = "remembered",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[list[Entity]]:
    """The entities of each text, in the order of `texts`.

    Args:
        texts: strings, or lists of words.
        model: a checkpoint folder with a tagger, loaded anew by each call; or a `TextTagger`, loaded once.

    See `TextTagger.tag` for the other arguments and for the errors.
    """
    if not isinstance(model, TextTagger):
        model = TextTagger.from_folder(model)
    return model.tag(texts, words=words, max_length=max_length, batch_tokens=batch_tokens, progress=progress)


@dataclass(frozen=True, eq=False)
class TextTagger:
    """A token classifier and its tokenizer, loaded once to be used often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
        rule: how it cuts texts into words; a folder that `train` wrote remembers how its training file was cut.
    """

    model: EncoderForTokenClassification
    tokenizer: Tokenizer
    rule: WordRule = DEFAULT

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> TextTagger:
        """Load a checkpoint folder; arguments as `TextEncoder.from_folder`.

        Raises:
            ArgumentError: `dtype` is none of these, or torch can't use `device` here.
            CheckpointError: the folder is not a checkpoint fastbert reads, or has no classifier of tags that go
                together (`training.metrics.odd_tag`).
        """
        model = with_trained_head(EncoderForTokenClassification, folder, dtype, device)
        if (odd := odd_tag(model.head_config.labels)) is not None:
            raise CheckpointError(str(folder), f"the tag {odd!r}", TAGS)
        return cls(model, Tokenizer.from_folder(folder), WordRule.from_folder(Path(folder)))

    def tag(
        self,
        texts: Iterable[str | Sequence[str]],
        *,
        words: Words = "remembered",
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[list[Entity]]:
        """The entities of each text, in the order of `texts`, and those of a text in its order.

        A word has the tag of its first piece. Tags become entities by the rules of conlleval. Where tags have no
        prefixes, each word is an entity, as with parts of speech; but with O among them, neighbours of one tag are one.
        A text longer than `max_length` is read in windows that overlap.

        Args:
            texts: strings, or lists of words: then entities are placed in words, not in characters.
            words: how strings are cut, "remembered" by `rule` or "whitespace" by spaces alone.
            max_length: most tokens of a window, special ones included.
            batch_tokens: most tokens of a batch (a longer window is a batch of its own); by default as many as the last
                cache of a CPU holds the activations of.
            progress: show a bar on stderr, if the work is long.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names the item.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        max_length = tokens_at_most(max_length, self.tokenizer, self.model.config)
        if words not in get_args(Words):
            raise ArgumentError("words", repr(words), f"one of {', '.join(get_args(Words))}")
        cut = self.rule.spans if words == "remembered" else parted_by_spaces
        texts = _strings_or_words(texts)
        spans = [cut(text) if isinstance(text, str) else [(i, i + 1) for i in range(len(text))] for text in texts]
        sentences = [
            [text[start:end] for start, end in places] if isinstance(text, str) else text
            for text, places in zip(texts, spans, strict=True)
        ]
        encoded = self.tokenizer.encode_words(sentences, max_length)
        shape = (len(encoded.tokens.ids), 2)
        doing = "tagging" if progress else None
        order, best = results(self.model, encoded.tokens, self._likeliest, shape, batch_tokens, doing)
        tags = np.zeros(sum(map(len, sentences)), np.int64)
        scores = np.zeros(len(tags), np.float32)
        at = encoded.tokens.take(encoded.words, order)
        scores[at[at >= 0]], tags[at[at >= 0]] = best[at >= 0].T
        [labels] = marked([self.model.head_config.labels], plain_mark(self.model.head_config.labels))
        found: list[list[Entity]] = []
        first = 0
        for text, places in zip(texts, spans, strict=True):
            mine = slice(first, first + len(places))
            first = mine.stop
            if not np.isfinite(scores[mine]).all():
                raise not_finite(len(found), self.model)
            found.append(_entities(text, places, [labels[i] for i in tags[mine].tolist()], scores[mine]))
        return found

    def _likeliest(self, ids: Tensor, types: Tensor | None, packing: Packing) -> Tensor:
        """`[tokens, 2]`: the probability of each token's likeliest tag, and its number."""
        out = self.model(ids, token_type_ids=types, packing=packing)
        best, label = out.logits.float().softmax(1).max(1)
        return torch.stack([best, label.float()], dim=1)


def _entities(
    text: str | list[str], spans: list[tuple[int, int]], tags: list[str], scores: npt.NDArray[np.float32]
) -> list[Entity]:
    found: list[Entity] = []
    for kind, first, last in chunks(tags):
        start, end = spans[first][0], spans[last - 1][1]
        there = text[start:end] if isinstance(text, str) else " ".join(text[start:end])
        found.append(Entity(kind, start, end, there, float(scores[first:last].mean())))
    return found


def _strings_or_words(texts: Iterable[str | Sequence[str]]) -> list[str | list[str]]:
    found: list[str | list[str]] = []
    for i, text in enumerate(items_of(texts)):
        if not isinstance(text, str | list | tuple):
            raise ArgumentError(f"texts[{i}]", f"a {type(text).__name__}", "a string, or a list of words")
        for j, word in enumerate(() if isinstance(text, str) else text):
            if not isinstance(word, str) or not word:
                raise ArgumentError(f"texts[{i}][{j}]", repr(word), "a word")
        found.append(text if isinstance(text, str) else list(text))
    return found
