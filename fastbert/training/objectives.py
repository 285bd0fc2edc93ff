"""What each task reads, learns and is measured by: classify, tag, mlm, pretrain."""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastbert.checkpoints.files import TOKENIZER_CONFIG, WORDS, json_bytes, read_config, read_json
from fastbert.checkpoints.load import Origin, load, read_model, trained_head
from fastbert.config import EncoderConfig, HeadConfig, ProblemType
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.model.heads import (
    EncoderForMaskedLM,
    EncoderForPreTraining,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    HeadModel,
)
from fastbert.ops.cross_entropy import IGNORED, cross_entropy
from fastbert.packing import Packing
from fastbert.text.batches import batches
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.tokens import SentenceTokens, Tokens
from fastbert.text.words import WordRule
from fastbert.training import metrics
from fastbert.training.data import read_classified, read_documents, read_sentences, read_tagged
from fastbert.transfer import send

MAX_EXPONENT = 700.0  # exp of more is no float64
INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")
LABELS_SHOWN = 5

MASKED_SHARE = 0.15  # Devlin et al. 2018: of the tokens, these are predicted;
MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1  # of those, these are hidden or replaced, and the rest stay as they are
STRANGER_SHARE = 0.5  # the same: of the pairs, these have a second text from another document


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: a row each.
        targets: what is to be predicted, int64: `[rows]` for classify, `[tokens]` for tag; None for mlm and pretrain,
            whose targets are drawn anew for each batch, and for tags that are measured only.
        gold: what the file said, for the metrics; nothing for mlm and pretrain.
        words: see `WordTokens.words`; None but for tag.
        sentences: where they begin, and the tokens once more; None but for pretrain.
    """

    tokens: Tokens
    targets: npt.NDArray[np.int64] | None = None
    gold: Sequence[Any] = ()
    words: npt.NDArray[np.int64] | None = None
    sentences: SentenceTokens | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed examples on the CPU, ready for a model with a head.

    Attributes:
        ids, types: int64 `[tokens]`; types are None when all are 0.
        packing: their layout.
        labels: int64 `[rows]` or `[tokens]`; None where only the logits are asked for.
        next_sentence: int64 `[rows]`, 1 where the second text is from elsewhere; None but for pretrain.
        labels_stay: whether the model takes the labels from the CPU, because it looks how many of them count.
    """

    ids: Tensor
    types: Tensor | None
    packing: Packing
    labels: Tensor | None
    next_sentence: Tensor | None = None
    labels_stay: bool = False

    @property
    def counts(self) -> list[int]:
        """Of each loss, the labels that it is the mean over."""
        labels = (self.labels, self.next_sentence)
        return [int((part != IGNORED).sum()) for part in labels if part is not None]

    def take(self, places: list[int]) -> Batch:
        """The batch of the sequences at these places; of the first one, without labels, if there is no place.

        Processes run in step, so one that has nothing to learn from a batch still has to run its model.
        """
        ends = self.packing.cu_seqlens.tolist()
        spans = [(ends[place], ends[place + 1]) for place in places or [0]]
        rows = torch.tensor(places or [0], dtype=torch.int64, device="cpu")
        tokens = torch.cat([torch.arange(*span, device="cpu") for span in spans])
        by_label = tokens if self.labels is not None and len(self.labels) == len(self.ids) else rows
        parts = (self.types, tokens), (self.labels, by_label), (self.next_sentence, rows)
        types, labels, next_sentence = (None if x is None else x[index] for x, index in parts)
        for x in (labels, next_sentence):
            if x is not None and not places:
                x.fill_(IGNORED)
        packing = Packing.from_lengths([end - begin for begin, end in spans], device="cpu")
        return Batch(self.ids[tokens], types, packing, labels, next_sentence, self.labels_stay)

    def run(self, model: nn.Module) -> Any:
        """The model's output, with the loss of `labels`; what it reads is sent to its device by one copy."""
        given = {"input_ids": self.ids, "token_type_ids": self.types}
        labels = {"labels": self.labels}
        sent = given if self.labels_stay else given | labels
        packing, there = self.packing.sent(next(model.parameters()).device, **sent)
        return model(packing=packing, **(labels | there))

    def losses(self, out: Any) -> list[Tensor]:
        """The losses of the model's output, as many as `counts`."""
        if self.next_sentence is None:
            return [out.loss]
        logits = out.seq_relationship_logits
        [next_sentence] = send([self.next_sentence], logits.device)
        return [out.loss, cross_entropy(logits, next_sentence)]


class Objective(ABC):
    """A task: its examples, its batches, its metrics, its model. The base of the four."""

    score: str  # the metric that says which epoch is best
    labels: list[str]  # in the order of the logits
    complaint: str = ""  # of the last evaluation: that nothing was learned, if so

    def __init__(self, folder: Path, max_length: int, device: torch.device) -> None:
        self.folder, self.max_length, self.device = folder, max_length, device
        self.tokenizer = Tokenizer.from_folder(folder)

    @abstractmethod
    def read_training(self, path: Path) -> Examples:
        """The examples to learn from; they decide the labels."""

    @abstractmethod
    def read_validation(self, path: Path) -> Examples:
        """The examples to measure by."""

    @abstractmethod
    def model(self) -> HeadModel:
        """The model to train, float32, on the device; of its labels, once the training examples are read."""

    @abstractmethod
    def batch(self, examples: Examples, rows: list[int], random: np.random.Generator) -> Batch:
        """The batch of these rows."""

    @abstractmethod
    def evaluate(self, run: Callable[[Batch], Any], examples: Examples, batch_tokens: int) -> dict[str, float]:
        """The metrics of a model that `run` runs, in eval mode."""

    def remembered(self, origin: Origin) -> Origin:
        """What the folder is to remember of the training besides the model: `max_length`, as transformers reads it."""
        path = self.folder / TOKENIZER_CONFIG
        settings = read_json(path) if path.exists() else {}
        content = json_bytes({**settings, "model_max_length": self.max_length})
        return replace(origin, others={**origin.others, TOKENIZER_CONFIG: content})

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """Whether metrics are better than others, or than none."""
        return old is None or new[self.score] > old[self.score]

    def _name_labels(self, path: Path, kind: type[HeadModel], found: set[str]) -> dict[str, str]:
        """Decide `labels`, and what those of the files are called there.

        They are the labels of the folder's own head, which so goes on learning, where it has all that were found, or
        those are integers that number its outputs. Else they are what was found: integers by value, others sorted.
        """
        head = trained_head(self.folder, kind)
        own = {} if head is None else dict(enumerate(head.labels))
        integers = all(INTEGER.fullmatch(label) for label in found)
        if found <= set(own.values()):
            self.labels = list(own.values())
            return {label: label for label in self.labels}
        if integers and {int(label) for label in found} <= own.keys():
            self.labels = list(own.values())
            if any(name != f"LABEL_{i}" for i, name in own.items()):
                meant = _listed(f"{label} is {own[int(label)]!r}" for label in sorted(found, key=int))
                warnings.warn(f"{path}: the labels number those of {self.folder}: {meant}", stacklevel=2)
            return {str(i): name for i, name in own.items()}
        self.labels = sorted(found, key=int) if integers else sorted(found)
        if own:
            got, had = _listed(self.labels), _listed(own.values())
            warnings.warn(
                f"the trained classifier of {self.folder} is not gone on with, and a new one begins: its labels are "
                f"{had}, and those of {path} {got}",
                stacklevel=2,
            )
        if integers and self.labels != [str(i) for i in range(len(self.labels))]:
            meant = _listed(f"output {i} is label {label}" for i, label in enumerate(self.labels))
            warnings.warn(f"{path}: the labels are not 0 to {len(self.labels) - 1}: {meant}", stacklevel=2)
        return {label: label for label in self.labels}

    def _with_classifier(self, kind: type[HeadModel], problem: ProblemType | None) -> HeadModel:
        head = HeadConfig(tuple(self.labels), problem)
        model, _ = read_model(self.folder, kind, head=head, dtype=torch.float32, device=self.device)
        return model

    def _packing(self, examples: Examples, rows: list[int]) -> Packing:
        return Packing.from_lengths(examples.tokens.lengths[rows].tolist(), device="cpu")


class Classify(Objective):
    """One label for each text."""

    score = "accuracy"

    def read_training(self, path: Path) -> Examples:
        """What `read_classified` reads."""
        texts, labels = read_classified(path)
        found = set(labels)
        if len(found) < 2:
            raise ArgumentError(str(path), f"one label, {labels[0]!r}", "at least two different labels")
        self._names = self._name_labels(path, EncoderForSequenceClassification, found)
        return self._examples(path, texts, labels)

    def read_validation(self, path: Path) -> Examples:
        """What `read_classified` reads; no label that neither the training file nor the folder's classifier has."""
        texts, labels = read_classified(path)
        if strangers := sorted(set(labels) - set(self._names)):
            raise ArgumentError(str(path), f"the label {strangers[0]!r}", "labels that the training file has too")
        return self._examples(path, texts, labels)

    def model(self) -> HeadModel:
        """A sequence classifier; the checkpoint's own head if it has these labels."""
        return self._with_classifier(EncoderForSequenceClassification, "single_label_classification")

    def batch(self, examples: Examples, rows: list[int], random: np.random.Generator) -> Batch:
        """A label a row."""
        assert examples.targets is not None
        ids, types = examples.tokens.packed(rows)
        return Batch(ids, types, self._packing(examples, rows), torch.from_numpy(examples.targets[rows]))

    def evaluate(self, run: Callable[[Batch], Any], examples: Examples, batch_tokens: int) -> dict[str, float]:
        """`accuracy`, `macro_f1` and the mean `loss`."""
        predicted = [""] * len(examples.gold)
        loss = 0.0
        for rows in batches(examples.tokens.lengths, batch_tokens):
            out = run(self.batch(examples, rows, np.random.default_rng(0)))
            loss += out.loss.item() * len(rows)
            for row, best in zip(rows, out.logits.argmax(1).tolist(), strict=True):
                predicted[row] = self.labels[best]
        self.complaint = _complaint(examples.gold, predicted, "text", "label")
        return {
            "accuracy": metrics.accuracy(examples.gold, predicted),
            "macro_f1": metrics.macro_f1(examples.gold, predicted),
            "loss": loss / len(predicted),
        }

    def _examples(self, path: Path, texts: list[str], labels: list[str]) -> Examples:
        tokens = self.tokenizer.encode(texts, self.max_length)
        if full := tokens.full(self.max_length):
            warnings.warn(
                f"{path}: {full} of {len(texts)} texts fill max_length={self.max_length} tokens; what is beyond is not "
                "read",
                stacklevel=2,
            )
        gold = [self._names[label] for label in labels]
        numbers = {label: i for i, label in enumerate(self.labels)}
        return Examples(tokens, np.array([numbers[label] for label in gold], dtype=np.int64), gold)


class Tag(Objective):
    """A tag for each word, read at its first piece: of the IOB kind, or plain, such as a part of speech."""

    score = "f1"

    def read_training(self, path: Path) -> Examples:
        """What `read_tagged` reads."""
        sentences, tags = read_tagged(path)
        found = {tag for sentence in tags for tag in sentence}
        if len(found) < 2:
            raise ArgumentError(str(path), f"one tag, {tags[0][0]!r}", "at least two different tags")
        self._names = self._name_labels(path, EncoderForTokenClassification, found)
        self._rule = WordRule.learned(sentences)
        examples = self._examples(sentences, tags)
        numbers = {label: i for i, label in enumerate(self.labels)}
        flat = np.array([*(numbers[tag] for sentence in examples.gold for tag in sentence), IGNORED], dtype=np.int64)
        return Examples(examples.tokens, flat[examples.words], examples.gold, examples.words)  # flat[-1] is IGNORED

    def read_validation(self, path: Path) -> Examples:
        """What `read_tagged` reads; tags that the training file lacks count as missed.

        Raises:
            ArgumentError: see `read_tagged`; or the tags are of the IOB kind in only one of the files.
        """
        sentences, tags = read_tagged(path)
        found = {tag for sentence in tags for tag in sentence}
        if (odd := metrics.odd_tag([*self.labels, *sorted(self._names.get(tag, tag) for tag in found)])) is not None:
            raise ArgumentError(str(path), f"tags beside {odd!r}", "tags of the training file's kind")
        return self._examples(sentences, tags)

    def model(self) -> HeadModel:
        """A token classifier; the checkpoint's own head if it has these tags."""
        return self._with_classifier(EncoderForTokenClassification, None)

    def remembered(self, origin: Origin) -> Origin:
        """Also how the training file was cut into words."""
        origin = super().remembered(origin)
        return replace(origin, others={**origin.others, WORDS: self._rule.to_json()})

    def batch(self, examples: Examples, rows: list[int], random: np.random.Generator) -> Batch:
        """A label at the first piece of each word."""
        ids, types = examples.tokens.packed(rows)
        if examples.targets is None:
            return Batch(ids, types, self._packing(examples, rows), None)
        labels = torch.from_numpy(examples.tokens.take(examples.targets, rows))
        return Batch(ids, types, self._packing(examples, rows), labels)

    def evaluate(self, run: Callable[[Batch], Any], examples: Examples, batch_tokens: int) -> dict[str, float]:
        """`f1`, `precision` and `recall` of entities, and the words' `accuracy`; all one where each word has a tag."""
        assert examples.words is not None
        flat = [""] * sum(map(len, examples.gold))
        for rows in batches(examples.tokens.lengths, batch_tokens):
            words = examples.tokens.take(examples.words, rows)
            best = run(self.batch(examples, rows, np.random.default_rng(0))).logits.argmax(1).cpu().numpy()
            for word, label in zip(words[words >= 0].tolist(), best[words >= 0].tolist(), strict=True):
                flat[word] = self.labels[label]
        gold = [tag for tags in examples.gold for tag in tags]
        self.complaint = _complaint(gold, flat, "word", "tag")
        remaining = iter(flat)
        predicted = [[next(remaining) for _ in tags] for tags in examples.gold]
        mark = metrics.plain_mark(self.labels)
        return metrics.entity_scores(*(metrics.marked(sentences, mark) for sentences in (examples.gold, predicted)))

    def _examples(self, sentences: list[list[str]], tags: list[list[str]]) -> Examples:
        encoded = self.tokenizer.encode_words(sentences, self.max_length)
        gold = [[self._names.get(tag, tag) for tag in sentence] for sentence in tags]
        return Examples(encoded.tokens, None, gold, encoded.words)


class MaskedLM(Objective):
    """The tokens that were hidden from the model, in documents cut to rows of `max_length`."""

    score = "loss"

    def __init__(self, folder: Path, max_length: int, device: torch.device) -> None:
        super().__init__(folder, max_length, device)
        self._rows = EncoderConfig.from_hf(read_config(folder)).vocab_size
        if self.tokenizer.mask_id >= self._rows:
            got, expected = f"a mask token of id {self.tokenizer.mask_id}", f"one of the model's {self._rows} rows"
            raise CheckpointError(str(folder), got, expected, "Is it in the vocabulary, under the name that is given?")

    def read_training(self, path: Path) -> Examples:
        """What `read_documents` reads."""
        return self.read_validation(path)

    def read_validation(self, path: Path) -> Examples:
        """What `read_documents` reads, without rows that have no token to predict."""
        tokens = self.tokenizer.encode_documents(read_documents(path), self.max_length)
        lengths = tokens.lengths
        owners = np.repeat(np.arange(len(lengths)), lengths)
        kept = np.bincount(owners, self._may_be_masked(tokens.ids), len(lengths)) > 0
        if not kept.any():
            raise _nothing_to_predict(path)
        if lost := int((~kept).sum()):
            warnings.warn(
                f"{path}: {lost} of {len(kept)} rows have only special or unknown tokens and are not read", stacklevel=2
            )
        offsets = np.concatenate([[0], np.cumsum(lengths[kept])])
        return Examples(Tokens(tokens.ids[kept[owners]], None, offsets))

    def model(self) -> HeadModel:
        """A masked language model."""
        return load(self.folder, EncoderForMaskedLM, dtype=torch.float32, device=self.device)

    def batch(self, examples: Examples, rows: list[int], random: np.random.Generator) -> Batch:
        """Tokens masked by `random`."""
        ids, types = examples.tokens.packed(rows)
        ids, labels = self.mask(ids, random)
        return Batch(ids, types, self._packing(examples, rows), labels, labels_stay=True)

    def mask(self, ids: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """BERT's masking of int64 `[tokens]`: `(ids, labels)`; at least one is predicted, if any may be."""
        masked = ids.numpy().copy()
        candidates = np.flatnonzero(self._may_be_masked(masked))
        chosen = candidates[random.random(len(candidates)) < MASKED_SHARE]
        if not len(chosen) and len(candidates):
            chosen = random.choice(candidates, 1)
        labels = np.full_like(masked, IGNORED)
        labels[chosen] = masked[chosen]
        fate = random.random(len(chosen))
        hidden = chosen[fate < MASK_TOKEN_SHARE]
        replaced = chosen[(fate >= MASK_TOKEN_SHARE) & (fate < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)]
        masked[hidden] = self.tokenizer.mask_id
        masked[replaced] = random.integers(0, min(self.tokenizer.size, self._rows), len(replaced))
        return torch.from_numpy(masked), torch.from_numpy(labels)

    def _may_be_masked(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return ~np.isin(ids, self.tokenizer.special_ids)

    def evaluate(self, run: Callable[[Batch], Any], examples: Examples, batch_tokens: int) -> dict[str, float]:
        """The mean `loss` over masked tokens, and its `perplexity`."""
        total, count = 0.0, 0
        for i, rows in enumerate(batches(examples.tokens.lengths, batch_tokens)):
            batch = self.batch(examples, rows, np.random.default_rng(i))  # the same masks in every epoch
            [labels] = batch.counts
            total += run(batch).loss.item() * labels
            count += labels
        return {"loss": total / count, "perplexity": _perplexity(total / count)}

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """Whether the loss is lower."""
        return old is None or new["loss"] < old["loss"]


class Pretrain(MaskedLM):
    """The hidden tokens of pairs of texts, and whether the second text follows the first.

    A row is neighbouring sentences of one document. For each batch it is cut in two anew, between two of its sentences;
    of half of the pairs the second text is then replaced by one of at most its length from another document.
    """

    def read_validation(self, path: Path) -> Examples:
        """What `read_sentences` reads."""
        documents = read_sentences(path)
        sentences = self.tokenizer.encode_sentences(documents, self.max_length)
        read = len(np.unique(sentences.documents))
        if read < 2:
            got = f"{read} of {len(documents)} documents with two sentences or more"
            raise ArgumentError(str(path), got, "two such documents", "Half of the pairs take their second text there.")
        if read < len(documents):
            alone = len(documents) - read
            warnings.warn(
                f"{path}: {alone} of {len(documents)} documents have less than two sentences and are not read",
                stacklevel=2,
            )
        if not self._may_be_masked(sentences.tokens.ids).any():
            raise _nothing_to_predict(path)
        return Examples(sentences.tokens, sentences=sentences)

    def model(self) -> HeadModel:
        """A masked language model that also predicts the next sentence."""
        return load(self.folder, EncoderForPreTraining, dtype=torch.float32, device=self.device)

    def batch(self, examples: Examples, rows: list[int], random: np.random.Generator) -> Batch:
        """Pairs cut and masked by `random`, at most as long as their rows."""
        assert examples.sentences is not None
        pairs = [_pair(examples.sentences, row, random) for row in rows]
        ids, labels = self.mask(torch.from_numpy(np.concatenate([ids for ids, _, _ in pairs])), random)
        types = torch.cat([torch.arange(len(ids), device="cpu") >= second for ids, second, _ in pairs]).long()
        packing = Packing.from_lengths([len(ids) for ids, _, _ in pairs], device="cpu")
        strangers = [int(stranger) for _, _, stranger in pairs]
        next_sentence = torch.tensor(strangers, dtype=torch.int64, device="cpu")
        return Batch(ids, types, packing, labels, next_sentence, labels_stay=True)

    def evaluate(self, run: Callable[[Batch], Any], examples: Examples, batch_tokens: int) -> dict[str, float]:
        """`mlm_loss` and its `perplexity`, `next_sentence_loss` and -`_accuracy`, and the sum of the losses, `loss`."""
        totals, counts, right = np.zeros(2), np.zeros(2), 0
        for i, rows in enumerate(batches(examples.tokens.lengths, batch_tokens)):
            batch = self.batch(examples, rows, np.random.default_rng(i))  # the same pairs and masks in every epoch
            assert batch.next_sentence is not None
            out = run(batch)
            totals += [loss.item() * count for loss, count in zip(batch.losses(out), batch.counts, strict=True)]
            counts += batch.counts
            right += int((out.seq_relationship_logits.argmax(1).cpu() == batch.next_sentence).sum())
        mlm, next_sentence = (totals / np.maximum(counts, 1)).tolist()  # of no token in a few pairs
        return {
            "loss": mlm + next_sentence,
            "mlm_loss": mlm,
            "perplexity": _perplexity(mlm),
            "next_sentence_loss": next_sentence,
            "next_sentence_accuracy": right / counts[1].item(),
        }


def _pair(sentences: SentenceTokens, row: int, random: np.random.Generator) -> tuple[npt.NDArray[np.int64], int, bool]:
    """A row as a pair: `(ids, the place where the second text begins, whether that is from another document)`."""
    ids, offsets, starts = sentences.tokens.ids, sentences.tokens.offsets, sentences.starts
    begin, end = offsets[row], offsets[row + 1]
    first, last = np.searchsorted(starts, [begin, end])
    second = starts[random.integers(first + 1, last)]
    text = ids[second : end - 2]
    stranger = bool(random.random() < STRANGER_SHARE)
    if stranger:
        low, high = np.searchsorted(sentences.documents, sentences.documents[first] + np.array([0, 1]))
        other = random.integers(len(starts) - (high - low))  # any sentence that is not in this document
        start = starts[other if other < low else other + high - low]
        text = ids[start : min(start + len(text), offsets[np.searchsorted(offsets, start, "right")] - 2)]
    separator = ids[end - 1 : end]
    pair = np.concatenate([ids[begin:second], separator, text, separator], dtype=np.int64)
    return pair, int(second - begin) + 1, stranger


def _nothing_to_predict(path: Path) -> ArgumentError:
    return ArgumentError(
        str(path), "only special or unknown tokens", "tokens to predict", "Is it the vocabulary of this language?"
    )


def _complaint(gold: Sequence[str], predicted: Sequence[str], thing: str, what: str) -> str:
    """That one label is given to everything, where there are more; "" if not."""
    if len(set(predicted)) > 1 or len(set(gold)) == 1:
        return ""
    return f"every {thing} of the validation file gets the {what} {predicted[0]!r}"


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    more = len(first) - LABELS_SHOWN
    return ", ".join(first[:LABELS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, MAX_EXPONENT))


Task = Literal["classify", "tag", "mlm", "pretrain"]
OBJECTIVES: dict[str, type[Objective]] = {"classify": Classify, "tag": Tag, "mlm": MaskedLM, "pretrain": Pretrain}
