"""Training data: files to examples, and examples to batches of a fixed number of real tokens."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.errors import ArgumentError
from fastbert.text import cut
from fastbert.training.metrics import split_tag

WINDOW_BATCHES = 50  # lengths are sorted inside windows of this many batches: alike in a batch, random over an epoch
RECORDS = (".csv", ".json", ".jsonl")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[\r\n]+")
CSV_FIELD_CHARACTERS = 2**31 - 1  # csv's own limit is 131072, and documents are longer


def read_classified(path: Path) -> tuple[list[str], list[str]]:
    """`(texts, labels)` of a .csv with the columns text and label, or JSON lines with those keys.

    Other columns and keys are ignored. A label may be a string or an int.

    Raises:
        ArgumentError: the file is missing or not UTF-8, has neither ending, or a row lacks a text or a label.
    """
    texts, labels = [], []
    for number, record in read_records(path):
        texts.append(_field(path, number, record, "text", str))
        labels.append(str(_field(path, number, record, "label", (str, int))))
    return _some(path, texts), labels


def read_tagged(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """`(sentences, tags)` of JSON lines with the keys tokens and tags, or of CoNLL columns (any other ending).

    Sentences without words are left out.

    CoNLL columns: one word a line, the word first and its IOB tag last, whatever is between; an empty line ends a
    sentence, and -DOCSTART- lines are no words.

    Raises:
        ArgumentError: the file is missing or not UTF-8, a line has no tag, a tag is not O, B-TYPE or I-TYPE, or there
            are not as many tags as tokens.
    """
    sentences, tags = (_read_tagged_records if path.suffix in (".json", ".jsonl") else _read_conll)(path)
    return _some(path, [words for words in sentences if words]), [marks for marks in tags if marks]


def read_documents(path: Path) -> list[str]:
    """Documents: column text of a .csv, key text of JSON lines, else the lines of a text file. Empty ones are left out.

    Raises:
        ArgumentError: the file is missing or not UTF-8, has no document, or a row lacks a text.
    """
    if path.suffix in RECORDS:
        documents = [_field(path, number, record, "text", str) for number, record in read_records(path)]
    else:
        documents = _lines(path)
    return _some(path, [document for document in documents if document.strip()])


def read_sentences(path: Path) -> list[list[str]]:
    """Documents as lists of sentences. Empty ones are left out.

    Of a .csv (column text) or JSON lines (key text), a document a row, cut at the ends of lines and after `.`, `!` and
    `?` before a space; of any other ending, a sentence a line, and an empty line between documents.

    Raises:
        ArgumentError: the file is missing or not UTF-8, has no sentence, or a row lacks a text.
    """
    if path.suffix in RECORDS:
        documents = [SENTENCE_END.split(document) for document in read_documents(path)]
    else:
        documents = [[]]
        for line in _lines(path):
            if line.strip():
                documents[-1].append(line)
            else:
                documents.append([])
    sentences = [[sentence for sentence in document if sentence.strip()] for document in documents]
    return _some(path, [document for document in sentences if document])


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, record)` of a .csv with a header, or of JSON lines.

    Raises:
        ArgumentError: the file is missing, not UTF-8 or damaged, or has neither ending.
    """
    if path.suffix == ".csv":
        csv.field_size_limit(CSV_FIELD_CHARACTERS)
        rows = csv.DictReader(io.StringIO(_content(path), newline=""), strict=True)
        try:
            for record in rows:
                yield rows.line_num, record
        except csv.Error as error:
            raise ArgumentError(
                f"{path}, after line {rows.line_num}", str(error), "a CSV file with a header"
            ) from error
    elif path.suffix in (".json", ".jsonl"):
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ArgumentError(f"{path}, line {number}", str(error), "a JSON object a line") from error
                if not isinstance(record, dict):
                    raise ArgumentError(f"{path}, line {number}", f"{line!r:.80}", "a JSON object a line")
                yield number, record
    else:
        raise ArgumentError(str(path), f"the ending {path.suffix!r}", ".csv or .jsonl")


@dataclass(frozen=True, eq=False)
class Sampler:
    """Which examples are in which batch: a pure function of the seed and the epoch, so a position is two numbers.

    Each epoch is shuffled anew and cut into windows of `WINDOW_BATCHES` batches. A window is sorted by length, up and
    down in turn, so that neighbours across its border are alike too; then the whole row is cut into batches of at most
    `batch_tokens` tokens (a longer example is a batch of its own), and the batches are shuffled.

    Attributes:
        lengths: int64 `[examples]`, tokens of each.
        batch_tokens: most tokens of a batch.
        accumulate: batches of a step.
        seed: of the shuffles.

    Raises:
        ArgumentError: `batch_tokens` or `accumulate` is not positive.
    """

    lengths: npt.NDArray[np.int64]
    batch_tokens: int
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "a positive number")

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """The steps of an epoch: `accumulate` batches each (the last may have fewer), a batch being rows."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        mean = max(float(self.lengths.mean()), 1.0) if len(order) else 1.0
        window = max(1, round(WINDOW_BATCHES * self.batch_tokens / mean))
        rows: list[int] = []
        for i, start in enumerate(range(0, len(order), window)):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            rows += (part if i % 2 == 0 else part[::-1]).tolist()
        batches = cut(rows, self.lengths, self.batch_tokens)
        shuffled = [batches[i] for i in random.permutation(len(batches)).tolist()]
        return [shuffled[i : i + self.accumulate] for i in range(0, len(shuffled), self.accumulate)]


def _read_tagged_records(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    sentences: list[list[str]] = []
    tags: list[list[str]] = []
    for number, record in read_records(path):
        for name, kept in (("tokens", sentences), ("tags", tags)):
            strings = _field(path, number, record, name, list)
            if not all(isinstance(string, str) for string in strings):
                raise ArgumentError(f"{path}, line {number}", f"{name} {strings!r:.80}", "a list of strings")
            kept.append(strings)
        _check_tags(path, number, tags[-1])
        if len(sentences[-1]) != len(tags[-1]):
            got = f"{len(sentences[-1])} tokens and {len(tags[-1])} tags"
            raise ArgumentError(f"{path}, line {number}", got, "as many tags as tokens")
    return sentences, tags


def _read_conll(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    if path.suffix == ".csv":
        raise ArgumentError(str(path), "a .csv", "JSON lines (.jsonl) with tokens and tags, or CoNLL columns")
    sentences: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(_lines(path), start=1):
        columns = [column for column in re.split("[ \t]", line) if column]  # other kinds of space are words' own
        if not columns or columns[0] == "-DOCSTART-":
            sentences.append([])
            tags.append([])
            continue
        if len(columns) < 2:
            raise ArgumentError(f"{path}, line {number}", repr(line), "a word, then its tag in the last column")
        _check_tags(path, number, columns[-1:])
        sentences[-1].append(columns[0])
        tags[-1].append(columns[-1])
    return sentences, tags


def _check_tags(path: Path, number: int, tags: Sequence[str]) -> None:
    for tag in tags:
        try:
            split_tag(tag)
        except ArgumentError as error:
            raise ArgumentError(f"{path}, line {number}", f"tag {error.got}", error.expected, error.mend) from error


def _field(path: Path, number: int, record: dict[str, Any], name: str, kind: Any) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = (
            f"{name} {value!r:.80}" if name in record else f"no {name}, only {', '.join(map(str, record)) or 'nothing'}"
        )
        raise ArgumentError(f"{path}, line {number}", got, f"{name} in each row")
    return value


def _lines(path: Path) -> list[str]:
    """Told apart by \\n alone, as the command line does: U+2028 and form feed are text."""
    return [line.removesuffix("\r") for line in _content(path).split("\n")]


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError(str(path), str(error.strerror), "a file of training data") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(str(path), str(error), "text in UTF-8", "Convert it: iconv -f latin1 -t utf8") from error


def _some(path: Path, items: list[Any]) -> list[Any]:
    if not items:
        raise ArgumentError(str(path), "no examples", "at least one")
    return items
