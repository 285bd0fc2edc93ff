"""What a user wants done, in one call: texts in, answers out in the caller's order."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastbert.backend import bfloat16_unserved, first_device, float16_unserved, usable_device
from fastbert.checkpoints.files import checkpoint_folder
from fastbert.checkpoints.load import WithHead, dtype_name, load, read_model
from fastbert.checkpoints.sentence import Recipe, read_recipe, read_score_activation
from fastbert.config import EncoderConfig
from fastbert.cpu.machine import last_cache
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.model.bert import BertModel
from fastbert.model.heads import BertForSequenceClassification, BertForTokenClassification, HeadModel, body_of
from fastbert.model.quantization import in_int8, quantize
from fastbert.model.sentence import ACTIVATIONS, Embedder, Mode
from fastbert.packing import Packing
from fastbert.text.tokenizer import Text, Tokenizer, Tokens, batches, check_texts, check_whole
from fastbert.text.words import DEFAULT, WordRule, parted_by_spaces
from fastbert.training.metrics import TAGS, chunks, marked, odd_tag, plain_mark

Model = TypeVar("Model", bound=nn.Module)

DTypeName = Literal["fp32", "bf16", "fp16", "int8"]
Words = Literal["remembered", "whitespace"]

# Of the parameters; "int8" is made of float32.
DTYPES: dict[DTypeName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}

# Tokens of a batch at least and at most on a CPU: below, products slow down; above, nothing was gained.
LEAST_TOKENS, MOST_TOKENS = 1024, 8192
# And on a GPU at least, if its memory allows; seconds the host takes for a layer, and products' FLOP/s, which no GPU of
# today exceeds by much at BERT's sizes.
LEAST_GPU_TOKENS, HOST_SECONDS, GPU_RATE = 32768, 110e-6, 400e12
LONG_WORK = 16  # batches; less is done before a progress bar could be read


def encode(
    texts: Iterable[Text],
    model: str | os.PathLike[str] | TextEncoder,
    *,
    dtype: DTypeName | None = None,
    pooling: Mode | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embeddings of texts, float32 `[texts, width]`, in the order of `texts`.

    Args:
        texts: strings, or pairs of strings.
        model: a Hugging Face checkpoint folder, loaded anew by each call; or a `TextEncoder`, loaded once.
        dtype: what the model computes in, for a folder as in `TextEncoder.from_folder`; a `TextEncoder` has its own
            already.

    See `TextEncoder.encode` for the other arguments.

    Raises:
        ArgumentError: an argument is not as described; `texts[i]` names the item.
        CheckpointError: the folder is not a checkpoint fastbert reads.
    """
    if not isinstance(model, TextEncoder):
        model = TextEncoder.from_folder(model, dtype=dtype)
    elif dtype is not None and (DTYPES.get(dtype), dtype == "int8") != (model.dtype, in_int8(model.model.encoder)):
        own = "int8" if in_int8(model.model.encoder) else model.dtype
        raise ArgumentError("dtype", repr(dtype), f"that of the TextEncoder, {own}", "Leave dtype out.")
    return model.encode(
        texts,
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        prompt=prompt,
        prompt_name=prompt_name,
        batch_tokens=batch_tokens,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A model and its tokenizer, loaded once to encode often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
        recipe: how texts become embeddings, where a call does not say.
    """

    model: BertModel
    tokenizer: Tokenizer
    recipe: Recipe = field(default_factory=Recipe)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> TextEncoder:
        """Load a Hugging Face checkpoint folder, or one of sentence-transformers.

        Args:
            folder: holds config.json, weights, and tokenizer.json or vocab.txt; or modules.json, which names the
                folders of a transformer, its pooling, and the Dense and Normalize behind it.
            dtype: "fp32", "bf16", "fp16", or "int8" on a CPU: `fastbert.quantize` of the model in float32. By default
                "fp16" on a GPU and "fp32" on a CPU. On a CPU "fp16" is float32, with a warning, and so is "bf16" where
                the CPU has no instructions for it.
            device: where to compute; the first GPU, or the CPU where there is none.

        Raises:
            ArgumentError: `dtype` is none of these, or torch can't use `device` here.
            BackendError: the device has no int8.
            CheckpointError: the folder is not a checkpoint fastbert reads.
        """
        device = first_device() if device is None else usable_device(device)
        transformer, recipe = read_recipe(checkpoint_folder(folder), device)
        model = load(transformer, dtype=_dtype(dtype, device), device=device)
        try:
            recipe.embedder.width(model.config.hidden_size)
        except ArgumentError as error:
            raise CheckpointError(f"{folder}: {error.argument}", error.got, error.expected) from error
        tokenizer = Tokenizer.from_folder(transformer)
        if recipe.lower_case:
            tokenizer.lower_case()
        return cls(_quantized(model, dtype), tokenizer, recipe)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return next(self.model.parameters()).dtype

    def encode(
        self,
        texts: Iterable[Text],
        *,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts, float32 `[texts, width]`, in the order of `texts`.

        Args:
            texts: strings, or pairs of strings.
            pooling: how the rows of a text become one: their mean, their maximum, the first one ("cls"), or what else
                sentence-transformers has. By default what the folder says, and the mean where it says nothing. The
                folder's Dense layers follow in any case.
            normalize: scale each embedding to length 1 (a zero embedding stays zero). By default what the folder's
                modules do, and True where it has none.
            max_length: most tokens of a text, special ones included; the rest is cut off, and a warning counts the
                texts that were this long. By default what the folder says, and at most the model's positions.
            prompt: what is put before each text (before the first one of a pair).
            prompt_name: the name of one of the folder's prompts. Without it and `prompt`, the folder's default one.
            batch_tokens: most tokens of a batch (a longer text is a batch of its own); by default as many as the last
                cache of a CPU holds the activations of.
            progress: show a bar on stderr, if the work is long.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names the item.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        how = self._how(pooling, normalize, max_length, prompt, prompt_name)
        tokens = self._tokens(texts, how)
        _warn_of_cuts(tokens.full(how.max_length), how.max_length)
        return self._embed(tokens, how.embedder, batch_tokens, "encoding" if progress else None)

    def encode_stream(
        self,
        texts: Iterable[Text],
        *,
        texts_at_once: int = 8192,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """`encode` of more texts than memory holds: an array of each `texts_at_once` of them, in their order.

        `texts` is read in the thread that asks for the arrays: the next ones before an array is given, so that a thread
        of ours tokenises them while these are encoded. If `texts` raises, what came before is encoded first. Closing
        the stream closes `texts`, if that is a generator. See `encode` for the other arguments; a progress bar is that
        of an array, and the warning of texts that were cut comes at the end.

        Raises:
            ArgumentError: as `encode`, where `texts[i]` counts from the first of an array; or `texts_at_once` is not
                positive.
        """
        check_whole("texts_at_once", texts_at_once)
        if not 1 <= texts_at_once <= sys.maxsize:
            raise ArgumentError("texts_at_once", texts_at_once, "a positive number of texts")
        check_texts(texts)
        return self.encode_parts(
            _parts(iter(texts), texts_at_once),
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prompt=prompt,
            prompt_name=prompt_name,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def encode_parts(
        self,
        parts: Generator[Sequence[Text], None, None],
        *,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """`encode_stream` of texts that come in parts: an array of each.

        A part is taken before the array of the one before it is given. An empty part has no array: with it a source
        says that the next one may be long in coming, and nothing is held back. See `encode` for the other arguments.

        Raises:
            ArgumentError: as `encode`, where `texts[i]` counts from the first of a part.
        """
        how = self._how(pooling, normalize, max_length, prompt, prompt_name)
        return self._stream(parts, how, batch_tokens, "encoding" if progress else None)

    def width(self, pooling: Mode | None = None) -> int:
        """Columns of an embedding."""
        return self._embedder(pooling, None).width(self.model.config.hidden_size)

    def _stream(
        self,
        parts: Generator[Sequence[Text], None, None],
        how: _How,
        batch_tokens: int | None,
        description: str | None,
    ) -> Iterator[npt.NDArray[np.float32]]:
        full = 0
        with closing(parts), ThreadPoolExecutor(1) as tokenising:
            waiting: Future[Tokens] | None = None
            for part in chain(parts, [()]):
                following = tokenising.submit(self._tokens, part, how) if part else None
                if waiting is not None:
                    tokens = waiting.result()
                    full += tokens.full(how.max_length)
                    yield self._embed(tokens, how.embedder, batch_tokens, description)
                waiting = following
        _warn_of_cuts(full, how.max_length)

    def _how(
        self,
        pooling: Mode | None,
        normalize: bool | None,
        max_length: int | None,
        prompt: str | None,
        prompt_name: str | None,
    ) -> _How:
        """What a call asks for, and the folder's where it does not; checked before the work."""
        prompts = self.recipe.prompts
        for argument, value in (("prompt", prompt), ("prompt_name", prompt_name)):
            if not isinstance(value, str | None):
                raise ArgumentError(argument, repr(value), "a string, or None")
        if prompt is not None and prompt_name is not None:
            raise ArgumentError("prompt_name", repr(prompt_name), "None where prompt is given")
        name = prompt_name if prompt_name is not None else self.recipe.prompt_name
        if prompt is None and name is not None:
            if name not in prompts:
                known = ", ".join(prompts) or "(it has none)"
                raise ArgumentError("prompt_name", repr(name), f"one of the folder's prompts: {known}")
            prompt = prompts[name]
        embedder = self._embedder(pooling, normalize)
        embedder.width(self.model.config.hidden_size)
        longest = _longest(self.tokenizer, self.model, self.recipe.max_length)
        return _How(embedder, longest if max_length is None else _checked(max_length, self.model), prompt or "")

    def _embedder(self, pooling: Mode | None, normalize: bool | None) -> Embedder:
        if pooling is not None and pooling not in get_args(Mode):
            raise ArgumentError("pooling", repr(pooling), f"one of {', '.join(get_args(Mode))}")
        if normalize is not None and not isinstance(normalize, bool | np.bool_):
            raise ArgumentError("normalize", repr(normalize), "True, False, or None for what the folder says")
        own = self.recipe.embedder
        return replace(
            own,
            pooling=own.pooling if pooling is None else (pooling,),
            normalise=own.normalise if normalize is None else normalize,
        )

    def _tokens(self, texts: Iterable[Text], how: _How) -> Tokens:
        check_texts(texts)
        if how.prompt:
            texts = [_after(how.prompt, text) for text in texts]
        return self.tokenizer.encode(texts, how.max_length)

    def _embed(
        self, tokens: Tokens, embedder: Embedder, batch_tokens: int | None, description: str | None
    ) -> npt.NDArray[np.float32]:
        def embeddings(out: Any, packing: Packing) -> Tensor:
            return embedder(out.last_hidden_state, packing)

        shape = (len(tokens.lengths), embedder.width(self.model.config.hidden_size))
        order, found = _results(self, tokens, embeddings, shape, batch_tokens, description, output_pooled=False)
        return _of_texts(order, found, self.model)


@dataclass(frozen=True, eq=False)
class _How:
    """What one call of `TextEncoder` does."""

    embedder: Embedder
    max_length: int
    prompt: str


def _after(prompt: str, text: Any) -> Any:
    """`text`, or the first one of a pair, with a prompt before it; what is no text stays, and is an error later."""
    if isinstance(text, str):
        return prompt + text
    if isinstance(text, tuple | list) and text and isinstance(text[0], str):
        return (prompt + text[0], *text[1:])
    return text


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

    model: BertForSequenceClassification
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
        model = _with_trained_head(BertForSequenceClassification, folder, dtype, device)
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
        max_length = _longest(self.tokenizer, self.model) if max_length is None else _checked(max_length, self.model)
        tokens = self.tokenizer.encode(texts, max_length)
        _warn_of_cuts(tokens.full(max_length), max_length)
        several = self.model.head_config.problem_type == "multi_label_classification"
        likely = torch.sigmoid if several else partial(torch.softmax, dim=1)
        found: list[Classification] = []
        for row in _answers(self, tokens, likely, batch_tokens, "classifying" if progress else None).tolist():
            ranked = sorted(zip(self.model.head_config.labels, row, strict=True), key=lambda pair: -pair[1])
            found.append(Classification(ranked[0][0], dict(ranked)))
        return found


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


@dataclass(frozen=True, eq=False)
class TextScorer:
    """A head of one output, such as a cross-encoder or a regression, and its tokenizer, loaded once to be used often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
        activation: what is applied to the output, a key of `sentence.ACTIVATIONS`.
    """

    model: BertForSequenceClassification
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
        model = _with_trained_head(BertForSequenceClassification, folder, dtype, device)
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
        max_length = _longest(self.tokenizer, self.model) if max_length is None else _checked(max_length, self.model)
        tokens = self.tokenizer.encode(texts, max_length)
        _warn_of_cuts(tokens.full(max_length), max_length)
        activation = ACTIVATIONS[self.activation]
        return _answers(self, tokens, activation, batch_tokens, "scoring" if progress else None).squeeze(1)


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

    model: BertForTokenClassification
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
        model = _with_trained_head(BertForTokenClassification, folder, dtype, device)
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
        max_length = _longest(self.tokenizer, self.model) if max_length is None else _checked(max_length, self.model)
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
        order, best = _results(self, encoded.tokens, _likeliest, shape, batch_tokens, "tagging" if progress else None)
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
                raise _not_finite(len(found), self.model)
            found.append(_entities(text, places, [labels[i] for i in tags[mine].tolist()], scores[mine]))
        return found


def _answers(
    holder: TextClassifier | TextScorer,
    tokens: Tokens,
    activation: Callable[[Tensor], Tensor],
    batch_tokens: int | None,
    description: str | None,
) -> npt.NDArray[np.float32]:
    """What `activation` makes of the logits of each text, float32 `[texts, outputs]`, none of it NaN or infinite."""

    def answers(out: Any, packing: Packing) -> Tensor:
        return activation(out.logits.float())

    shape = (len(tokens.lengths), len(holder.model.head_config.labels))
    order, found = _results(holder, tokens, answers, shape, batch_tokens, description)
    return _of_texts(order, found, holder.model)


def _likeliest(out: Any, packing: Packing) -> Tensor:
    """`[tokens, 2]`: the probability of each token's likeliest tag, and its number."""
    best, label = out.logits.float().softmax(1).max(1)
    return torch.stack([best, label.float()], dim=1)


def _results(
    holder: TextEncoder | TextClassifier | TextScorer | TextTagger,
    tokens: Tokens,
    result: Callable[[Any, Packing], Tensor],
    shape: tuple[int, int],
    batch_tokens: int | None,
    description: str | None,
    **asked: bool,
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """What `result` makes of each batch's output, one after the other, `[n, width]`; and the order of the texts in it.

    A GPU works through all batches by itself: the host waits for it once, at the end.

    Args:
        result: of an output and its packing, `[n of this batch, width]`.
        shape: of all results.

    See `_outputs` for the others.
    """
    order: list[int] = []
    results = torch.empty(shape, dtype=torch.float32, device=next(holder.model.parameters()).device)
    end = 0
    for rows, packing, out in _outputs(holder.model, tokens, batch_tokens, description, **asked):
        found = result(out, packing)
        results[end : end + len(found)] = found
        end += len(found)
        order += rows
    return order, results.cpu().numpy()


def _of_texts(order: list[int], found: npt.NDArray[np.float32], model: nn.Module) -> npt.NDArray[np.float32]:
    """Of rows in this order those in the order of the texts, none of which is NaN or infinite."""
    results = np.empty_like(found)
    results[order] = found
    if not np.isfinite(results).all():
        raise _not_finite(int((~np.isfinite(results)).any(1).argmax()), model)
    return results


def _not_finite(text: int, model: nn.Module) -> BackendError:
    dtype = next(model.parameters()).dtype
    return BackendError(
        f"texts[{text}]",
        f"a result of NaN or infinity in {dtype}",
        "finite numbers",
        "Compute in float32, since activations overflow in narrower dtypes; if it is that, the weights are broken.",
    )


def _entities(
    text: str | list[str], spans: list[tuple[int, int]], tags: list[str], scores: npt.NDArray[np.float32]
) -> list[Entity]:
    found: list[Entity] = []
    for kind, first, last in chunks(tags):
        start, end = spans[first][0], spans[last - 1][1]
        there = text[start:end] if isinstance(text, str) else " ".join(text[start:end])
        found.append(Entity(kind, start, end, there, float(scores[first:last].mean())))
    return found


def _parts(texts: Iterator[Text], texts_at_once: int) -> Generator[list[Text], None, None]:
    """Lists of so many texts, the last one of fewer; if `texts` raises, what it gave before, and an empty list."""
    try:
        while True:
            part: list[Text] = []
            try:
                for text in islice(texts, texts_at_once):
                    part.append(text)
            except Exception:
                yield part
                yield []
                raise
            if not part:
                return
            yield part
    finally:
        if isinstance(texts, Generator):
            texts.close()


def _strings_or_words(texts: Iterable[str | Sequence[str]]) -> list[str | list[str]]:
    check_texts(texts)
    found: list[str | list[str]] = []
    for i, text in enumerate(texts):
        if not isinstance(text, str | list | tuple):
            raise ArgumentError(f"texts[{i}]", f"a {type(text).__name__}", "a string, or a list of words")
        for j, word in enumerate(() if isinstance(text, str) else text):
            if not isinstance(word, str) or not word:
                raise ArgumentError(f"texts[{i}][{j}]", repr(word), "a word")
        found.append(text if isinstance(text, str) else list(text))
    return found


def _quantized(model: Model, name: DTypeName | None) -> Model:
    return quantize(model, dtype="int8") if name == "int8" else model


def default_dtype(device: torch.device) -> DTypeName:
    """What a model computes in where nobody says: half precision on a GPU, whose matrix units are made for it."""
    return "fp16" if device.type == "cuda" else "fp32"


def _dtype(name: DTypeName | None, device: torch.device) -> torch.dtype:
    """Of the parameters; float32, and said, where half precision would only be slower."""
    name = default_dtype(device) if name is None else name
    if name not in DTYPES:
        raise ArgumentError("dtype", repr(name), f"one of {', '.join(DTYPES)}")
    unserved = {"bf16": bfloat16_unserved, "fp16": float16_unserved}
    if name in unserved and (slow := unserved[name](device)) is not None:
        warnings.warn(f"computing in float32, not in {dtype_name(DTYPES[name])}: {slow}", stacklevel=3)
        return torch.float32
    return DTYPES[name]


def _with_trained_head(
    kind: type[WithHead], folder: str | os.PathLike[str], dtype: DTypeName | None, device: torch.device | str | None
) -> WithHead:
    """As `load`, but a head that would begin untrained is an error: its answers would mean nothing."""
    device = first_device() if device is None else usable_device(device)
    model, untrained = read_model(folder, kind, dtype=_dtype(dtype, device), device=device)
    if untrained:
        got = f"no trained {kind.__name__}: it lacks {', '.join(untrained)}"
        raise CheckpointError(str(folder), got, "a checkpoint with its head", "Train one: fastbert train --help")
    return _quantized(model, dtype)


def _longest(tokenizer: Tokenizer, model: BertModel | HeadModel, most: int | None = None) -> int:
    """Most tokens of a text by default: `most`, else what the tokenizer allows; not more than the model's positions."""
    positions = model.config.max_positions
    return min(most or tokenizer.max_length or positions, positions)


def _checked(max_length: int, model: BertModel | HeadModel) -> int:
    check_whole("max_length", max_length)
    positions = model.config.max_positions
    if max_length > positions:
        raise ArgumentError("max_length", max_length, f"at most the model's {positions} positions")
    return max_length


def _warn_of_cuts(full: int, max_length: int) -> None:
    if full:
        which = "1 text fills" if full == 1 else f"{full} texts fill"
        message = f"{which} max_length={max_length} tokens; what is beyond was not read"
        warnings.warn(message, stacklevel=3)


def _outputs(
    model: BertModel | HeadModel, tokens: Tokens, batch_tokens: int | None, description: str | None, **asked: bool
) -> Iterator[tuple[list[int], Packing, Any]]:
    """`(rows, packing, output)` of each batch of texts, `asked` of the model beside them.

    `description` is shown beside a bar if the work is long.
    """
    tokens.check_fit(model.config)
    lengths = tokens.lengths
    device = next(model.parameters()).device
    if batch_tokens is None:
        batch_tokens = _batch_tokens(model, device)
    groups = batches(lengths, batch_tokens)
    long = description is not None and len(groups) > LONG_WORK
    for rows in _shown(groups, description) if long else groups:
        with torch.inference_mode():
            ids, types, packing = tokens.batch(rows, device)
            out = model(ids, token_type_ids=types, packing=packing, **asked)
        yield rows, packing, out


def _batch_tokens(model: BertModel | HeadModel, device: torch.device) -> int:
    size = 2 if in_int8(body_of(model).encoder) else next(model.parameters()).itemsize
    if device.type == "cuda":
        return gpu_batch_tokens(model.config, size, torch.cuda.get_device_properties(device).total_memory)
    return cpu_batch_tokens(model.config, size, last_cache())


def cpu_batch_tokens(config: EncoderConfig, itemsize: int, cache: int) -> int:
    """Tokens whose activations in a layer fill the CPU's last cache, of so many bytes.

    Within 2% of the best of 512 to 8192 with MiniLM in all dtypes on a CPU with 32 MiB.
    """
    return min(max(cache // _layer_bytes(config, itemsize), LEAST_TOKENS), MOST_TOKENS)


def gpu_batch_tokens(config: EncoderConfig, itemsize: int, memory: int) -> int:
    """Tokens that a GPU with so many bytes of memory computes for as long as the host prepares two such batches.

    So the host stays ahead; predicted, from the host's time a layer (docs/graphs.md) and `GPU_RATE`. Activations get a
    tenth of the memory.
    """
    flops = 8 * config.hidden_size**2 + 4 * config.hidden_size * config.intermediate_size  # of a token in a layer
    busy = int(2 * HOST_SECONDS * GPU_RATE / flops)
    fits = memory // 10 // _layer_bytes(config, itemsize)
    return min(max(busy, LEAST_GPU_TOKENS), max(fits, LEAST_TOKENS))


def _layer_bytes(config: EncoderConfig, itemsize: int) -> int:
    """Of a token's activations in a layer: the wide one and about five of hidden_size."""
    return (config.intermediate_size + 5 * config.hidden_size) * itemsize


def _shown(groups: list[list[int]], description: str | None) -> Iterable[list[int]]:
    from rich.console import Console
    from rich.progress import track

    return track(groups, description=description or "", console=Console(stderr=True), transient=True)
